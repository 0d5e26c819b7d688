"""Ways to run a loaded model token by token over a cache: eager, under a CUDA graph, or fused.

All have the interface in `protocol`; `choose` says which one a model gets, and why.
"""
