"""The five verbs put to a small model that ships with qtool; needs no network.

    with open_demo() as demo:
        estimate = demo.estimate()
        planned, result = demo.quantize()

Each step calls the function that its verb calls, so what is shown is what the verbs do. How the
model was made is told in the README.md of its folder.
"""

from __future__ import annotations

from qtool.demo.speed import KernelSpeed
from qtool.demo.steps import Demo, open_demo

__all__ = ["Demo", "KernelSpeed", "open_demo"]
