"""How a checkpoint's tensor names relate to the names of the model that transformers builds.

Checkpoints outlive the code that wrote them: base models are saved without the prefix of their
class (`h.0...` for `transformer.h.0...`), vision-language models were reordered, and old files
carry buffers that the model now computes. transformers maps all of these while loading; so do we.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# One tensor per routed expert, as most checkpoints hold them: the expert's number goes, and its
# gate and up projections (Mixtral's w1 and w3) share a parameter.
PER_EXPERT = (
    (r"\.experts\.\d+\.(?:gate_proj|up_proj|w1|w3)\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.(?:down_proj|w2)\.weight$", ".experts.down_proj"),
)


@dataclass(frozen=True, slots=True)
class StoredNames:
    """The rules for one model class.

    `prefix` is the base model's attribute ("model", "transformer"). `renames` are (pattern,
    replacement), applied in order; several stored tensors may lead to one parameter, as the parts
    of a mixture's experts do. `ignored` are (pattern, what it is) for stored tensors that
    are no parameters of the model.
    """

    prefix: str
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()

    def candidates(self, stored_name: str) -> Iterator[str]:
        """Names that `stored_name` may have in the model, likeliest first."""
        yield stored_name
        renamed = stored_name
        for pattern, replacement in self.renames:
            renamed = re.sub(pattern, replacement, renamed)
        yield renamed
        yield f"{self.prefix}.{renamed}"
        yield renamed.removeprefix(f"{self.prefix}.")

    def why_ignored(self, stored_name: str) -> str | None:
        """What a tensor is that the model has no parameter for, where that is known."""
        return next(
            (what for pattern, what in self.ignored if re.search(pattern, stored_name)), None
        )
