"""The bytes that one step of decoding has to read, whoever runs it: the ceiling of its speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qtool.checkpoint.records import Checkpoint
from qtool.formats.bitsandbytes import packed_layouts
from qtool.formats.precisions import QUANTIZED_PRECISIONS, Precision, QuantFormat
from qtool.formats.tensors import TensorLayout
from qtool.planner.kv_cache import kv_cache_bytes
from qtool.planner.model import PlannedModel, describe_model
from qtool.planner.weights import is_on_device


@dataclass(frozen=True, slots=True)
class StepBytes:
    """A model at a precision; `head_precision` None leaves the output head as the model has it."""

    model: PlannedModel
    precision: str
    head_precision: Precision | None = None

    @classmethod
    def of_config(
        cls, config: Mapping[str, Any], precision: str, head_precision: Precision | None
    ) -> Self:
        """Of the model that a config.json describes."""
        checkpoint = Checkpoint.of_config("random weights", config)
        return cls(describe_model(checkpoint), precision, head_precision)

    def count(self, *, batch: int, context: int) -> int:
        """Bytes for one new token of each of `batch` sequences that have `context` tokens so far.

        Packed weights with their statistics, norms, the output head, keys and values, and one row
        of the embedding for each sequence.
        """
        weights = self.model.weights(self.precision)
        architecture = self.model.architecture
        if architecture is None:
            return weights.read_per_token_bytes
        cache_bytes = kv_cache_bytes(
            Counter(architecture.cache_layers),
            context=context,
            batch=batch,
            element_bytes=weights.element_bytes,
        )
        row_bytes = 0
        if not architecture.tied_embeddings or self._packs_head:  # else the whole of it is read
            row_bytes = batch * architecture.hidden_size * weights.element_bytes
        saved_bytes = self._saved_by_head(weights.element_bytes) if self._packs_head else 0
        return weights.read_per_token_bytes - saved_bytes + cache_bytes + row_bytes

    @property
    def _packs_head(self) -> bool:
        return self.head_precision in QUANTIZED_PRECISIONS

    def _saved_by_head(self, element_bytes: int) -> int:
        architecture = self.model.architecture
        assert architecture is not None and self.head_precision in QUANTIZED_PRECISIONS
        shape = (architecture.vocab_size, architecture.hidden_size)
        layout = TensorLayout("lm_head.weight", "BF16", shape)
        parts = packed_layouts(layout, QuantFormat(self.head_precision))
        packed_bytes = sum(part.num_bytes for part in parts if is_on_device(part))
        return layout.num_elements * element_bytes - packed_bytes
