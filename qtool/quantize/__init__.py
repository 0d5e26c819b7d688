"""Full-precision checkpoint in, bitsandbytes-layout checkpoint out, tensor by tensor.

    plan = build_plan(checkpoint, Recipe(QuantFormat("nf4-dq")))   # pure: headers + config
    quantize_checkpoint(checkpoint, plan, Path("out"))             # one pass over the bytes

`plan` decides everything, sizes included; `tiles` and `pipeline` move the bytes; `folder_state` and
`output_folder` make sure that a folder that looks finished is finished.
"""

from __future__ import annotations

from qtool.quantize.plan import QuantPlan, Recipe, ShardPlan, TensorPlan, build_plan, plan_tensors

__all__ = ["QuantPlan", "Recipe", "ShardPlan", "TensorPlan", "build_plan", "plan_tensors"]
