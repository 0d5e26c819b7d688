"""How `qtool demo` looks: each verb's own report below the command that makes it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Final

from qtool.demo import Demo, KernelSpeed
from qtool.demo.steps import NUM_NEW_TOKENS, PROMPT, SEED, TEMPERATURE, VRAM_GIB
from qtool.inspection.command import InspectionResult
from qtool.planner.records import Estimate, Sizing
from qtool.quantize.command import PlannedRequest
from qtool.quantize.run import QuantizeResult
from qtool.report.estimate import report_estimate
from qtool.report.inspect import report_inspection
from qtool.report.output import Output
from qtool.report.quantize import report_plan
from qtool.report.quantize import report_result as report_quantized
from qtool.report.sizing import report_sizing
from qtool.report.units import format_bytes, format_rate

INTRODUCTION: Final = (
    "[bold]The five verbs on a small Llama that ships with qtool.[/] "
    "With these two lines in your shell every command below works for you too:"
)
NEXT_COMMANDS: Final = (
    ("qtool estimate Qwen/Qwen3-8B --gpu auto", "does it fit? only headers are read"),
    ("qtool quantize Qwen/Qwen3-8B -o out", "16.4 GB become 6.1"),
    ('qtool generate out "Hello"', "use it"),
    ("qtool doctor", "what this machine has and lacks"),
)
LARGE_MODEL_BYTES: Final = 16_060_522_496  # Llama 3.1 8B in bf16


class StepOutput(Output):
    """A verb's output within the demo: its JSON document is kept for the demo's own."""

    def __init__(self, demo_output: Output, verb: str) -> None:
        super().__init__(
            verb,
            json_mode=demo_output.json_mode,
            quiet=demo_output.quiet,
            verbose=demo_output.verbose,
            color=demo_output.color,
            name_option=demo_output.name_option,
        )
        self.warnings = demo_output.warnings
        self.fields: dict[str, Any] = {}

    def document(self, fields: dict[str, Any]) -> None:
        """Keep the verb's document."""
        self.fields = fields


class DemoReport:
    """Shows the demo step by step.

    The commands are shown for a shell in which M and OUT are set as the introduction says.
    """

    def __init__(self, output: Output, demo: Demo, *, is_kept: bool) -> None:
        self._output = output
        self._demo = demo
        self._is_kept = is_kept
        self._documents: dict[str, Any] = {"generate": None}
        output.answer(INTRODUCTION)
        output.write_text(f"\nM={demo.model}\nOUT={demo.output}\n")

    def estimate(self, estimate: Estimate) -> None:
        """The memory budget."""
        step = self._begin("Will it fit?", 'estimate "$M"')
        report_estimate(step, estimate)
        self._documents["estimate"] = step.fields

    def quantize(self, planned: PlannedRequest, result: QuantizeResult, speed: KernelSpeed) -> None:
        """The plan, what it took, and what the kernels do on a weight of a usual size."""
        step = self._begin("Make it smaller", 'quantize "$M" -o "$OUT"')
        report_plan(step, planned, dry_run=False)
        report_quantized(step, planned, result)
        self._output.answer(_speed_sentence(speed))
        self._documents["quantize"] = step.fields
        self._documents["kernel_speed"] = asdict(speed)

    def inspect(self, result: InspectionResult) -> None:
        """The error of each kind of layer."""
        step = self._begin("What did that cost?", 'inspect "$OUT" --against "$M" --verify')
        report_inspection(step, result, tensors=False)
        self._documents["inspect"] = step.fields

    def generate(self) -> None:
        """Text before and after, as it is made."""
        from qtool.runtime.lean_imports import lean_imports

        with self._output.importing("PyTorch", "transformers"), lean_imports():
            from qtool.report.generate import report_result
        how = f"--temperature {TEMPERATURE} --seed {SEED} --max-new-tokens {NUM_NEW_TOKENS}"
        documents = {}
        for when, variable, model in (
            ("before", "M", self._demo.model),
            ("after", "OUT", str(self._demo.output)),
        ):
            step = self._begin(f"Use it: {when}", f'generate "${variable}" "{PROMPT}" {how}')
            loaded, result = self._demo.generate(model, step.write_text)
            report_result(step, loaded, result, seed=SEED)
            documents[when] = step.fields
        self._documents["generate"] = documents

    def sizing(self, sizing: Sizing) -> None:
        """The guide for models of common sizes."""
        classes = " ".join(f"--vram {gib:g}" for gib in VRAM_GIB)
        step = self._begin("What runs on your GPU?", f"sizing --quant nf4-dq {classes}")
        report_sizing(step, sizing)
        self._documents["sizing"] = step.fields

    def end(self) -> None:
        """What to try next; the JSON document."""
        self._heading("Now with a model of your own")
        for command, meaning in NEXT_COMMANDS:
            self._output.write_text(f"{command:42}{meaning}\n")
        kept = f"is kept in {self._demo.output}" if self._is_kept else "stays with --keep DIR"
        self._output.write_text(f"\nThe quantized demo model {kept}.\n")
        output_path = str(self._demo.output) if self._is_kept else None
        document = {"model": self._demo.model, "output": output_path, **self._documents}
        self._output.document(document)

    def _begin(self, title: str, command: str) -> StepOutput:
        self._heading(title)
        # As it is, not wrapped: it can be copied.
        self._output.write_text(f"$ qtool {command}\n\n")
        return StepOutput(self._output, command.partition(" ")[0])

    def _heading(self, title: str) -> None:
        self._output.answer("", f"[bold cyan]{title}[/]")


def _speed_sentence(speed: KernelSpeed) -> str:
    rows, columns = speed.shape
    rate = format_rate(speed.input_bytes, speed.seconds)
    seconds = LARGE_MODEL_BYTES * speed.seconds / speed.input_bytes
    return (
        f"such small files take longer to open than to quantize: on a {rows}×{columns} weight in "
        f"memory the kernels do {rate} with {speed.num_threads} threads, so an 8 B model's "
        f"{format_bytes(LARGE_MODEL_BYTES)} take {seconds:.0f} s where the disk keeps up"
    )
