"""What `qtool finetune` says of memory, which the CPU's runs do not measure."""

from __future__ import annotations

import pytest

from qtool.finetune.records import FinetuneResult, Progress
from qtool.report import finetune
from qtool.report.units import GIB, MIB


@pytest.mark.parametrize(
    ("peak_bytes", "planned_bytes", "said"),
    [
        (20 * MIB, 30 * MIB, "20.00 MiB allocated at the peak, 30.00 MiB planned"),
        (2 * GIB, GIB // 2, "2.00 GiB allocated at the peak, 0.50 GiB planned"),
        (MIB, None, "1.00 MiB allocated at the peak"),
    ],
)
def test_the_peak_and_its_plan_share_a_unit_that_keeps_their_digits(
    peak_bytes: int, planned_bytes: int | None, said: str
) -> None:
    result = FinetuneResult(
        output="out",
        method="lora",
        quant="nf4",
        first_loss=2.0,
        final_loss=1.0,
        eval_loss=None,
        steps=1,
        tokens=100,
        tokens_per_s=10.0,
        seconds=10.0,
        allocated_peak_bytes=peak_bytes,
        planned_peak_bytes=planned_bytes,
        planned_allocated_peak_bytes=planned_bytes,
        trainable_parameters=1000,
        device="cuda:0",
        resumed_from_step=None,
    )
    assert list(finetune._statistics(result))[1:] == [said]


@pytest.mark.parametrize(
    ("planned_bytes", "said"), [(30 * MIB, "20.00/30.00 MiB"), (None, "20.00 MiB")]
)
def test_so_they_do_while_it_trains(planned_bytes: int | None, said: str) -> None:
    progress = Progress(1, 2, 2.0, 10.0, 10.0, memory_bytes=20 * MIB)
    assert said in finetune._parts(progress, planned_bytes)
