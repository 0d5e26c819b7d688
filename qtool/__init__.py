"""qtool: does this language model fit my GPU? Plan its memory, quantize it, inspect it, run it.

Importing this package imports neither torch, transformers nor cupy; see docs/architecture.md
for the direction of imports.
"""

__version__ = "0.1.0"
