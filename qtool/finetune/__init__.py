"""Fine-tuning over packed weights: adapters by PEFT, their products by our operators."""
