"""The rules that a sound folder keeps, one small function each, and the table of all of them.

A rule is a generator whose name and docstring are the rule: it looks at a `StoredFolder` and yields
what it finds wrong. Rules do not depend on each other: what an earlier one reports as unreadable,
later ones leave alone.
"""

from __future__ import annotations

from typing import Final

from qtool.inspection.rules.config import CONFIG_RULES
from qtool.inspection.rules.files import FILE_RULES
from qtool.inspection.rules.layers import LAYER_RULES
from qtool.inspection.rules.manifest import MANIFEST_RULES
from qtool.inspection.rules.model import MODEL_RULES
from qtool.inspection.rules.rule import Finding, Rule, rule_name

RULES: Final[tuple[Rule, ...]] = (
    *FILE_RULES,
    *LAYER_RULES,
    *CONFIG_RULES,
    *MODEL_RULES,
    *MANIFEST_RULES,
)

__all__ = ["RULES", "Finding", "Rule", "rule_name"]
