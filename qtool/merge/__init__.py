"""An adapter put into its base model's weights: tensor by tensor, in bounded memory.

    planned = plan_merge(MergeRequest(Path("adapter"), Path("out")))
    run_merge(planned)

`adapter` reads what was trained, `base` finds what it belongs to, `plan` pairs the two, `reading`
makes the merged values for the writer of `qtool quantize`, and `logits` looks at what came of it.
"""

from __future__ import annotations
