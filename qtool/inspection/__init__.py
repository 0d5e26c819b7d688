"""What is in a checkpoint, how far is it from its original, and is it whole?

    inspection = inspect_checkpoint(open_checkpoint("./out", need="files"))
    comparison = compare_checkpoints(quantized, original)
    verification = verify_folder(Path("./out"))

Works on any safetensors folder, bitsandbytes' own included. Reads headers and statistics; weights
only to compare them, tile by tile; writes nothing. Imports no torch.
"""

from __future__ import annotations

from qtool.inspection.compare import compare_checkpoints
from qtool.inspection.records import (
    Comparison,
    Difference,
    InspectedTensor,
    Inspection,
    LayerError,
    Problem,
    Total,
    Verification,
)
from qtool.inspection.summary import inspect_checkpoint
from qtool.inspection.verify import RULES, verify_folder

__all__ = [
    "RULES",
    "Comparison",
    "Difference",
    "InspectedTensor",
    "Inspection",
    "LayerError",
    "Problem",
    "Total",
    "Verification",
    "compare_checkpoints",
    "inspect_checkpoint",
    "verify_folder",
]
