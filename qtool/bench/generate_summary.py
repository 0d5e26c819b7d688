"""From timings to rates, shares of the ceiling, and the speed of whole models."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from qtool.bench.generate_records import GenerateRun, Samples, ScaledRun
from qtool.bench.generate_subject import Subject
from qtool.bench.records import Limit


def summarize(
    subject: Subject,
    taken: Sequence[Samples],
    limit: Limit,
    *,
    fewer: Sequence[Samples],
    warnings: list[str],
) -> list[GenerateRun]:
    """A run for each of `taken`, in their order.

    Args:
        fewer: the same with `subject.with_fewer_layers()`, empty for a whole model.
        warnings: gets a sentence for what cannot be said.
    """
    partners = {(samples.engine, samples.size): samples for samples in fewer}
    runs = []
    for samples in taken:
        run = _run_of(subject, samples, limit)
        partner = partners.get((samples.engine, samples.size))
        if partner is not None and partner.path != samples.path:
            warnings.append(
                f"{samples.engine}, {samples.size.text}: {subject.num_fewer_layers} layers ran "
                f"on the {partner.path} path ({partner.path_reason}), so the whole model's speed "
                "cannot be told"
            )
        elif partner is not None:
            scaled = _scale(subject, samples, partner, limit)
            if scaled is None:
                warnings.append(
                    f"{samples.engine}, {samples.size.text}: more layers took no more time, so "
                    "the whole model's speed cannot be told"
                )
            run = replace(run, scaled=scaled)
        runs.append(run)
    return runs


def _scale(subject: Subject, taken: Samples, fewer: Samples, limit: Limit) -> ScaledRun | None:
    """What the model with all its layers would do; None if the clock cannot tell."""
    assert subject.full_layers is not None
    size, num_taken, num_fewer = taken.size, subject.num_layers, subject.num_fewer_layers
    missing = (subject.full_layers - num_taken) / (num_taken - num_fewer)
    more_step_s = taken.step_s - fewer.step_s
    more_prefill_s = taken.prefill_s - fewer.prefill_s
    if more_step_s <= 0:
        return None
    step_s = taken.step_s + missing * more_step_s
    step_bytes = subject.with_layers(subject.full_layers).step_bytes(size)
    return ScaledRun(
        layers=subject.full_layers,
        measured_layers=(num_fewer, num_taken),
        # Short prompts wait for the host, so that the difference may be less than the noise.
        prefill_tok_s=size.batch * size.prompt_tokens / (taken.prefill_s + missing * more_prefill_s)
        if more_prefill_s > 0
        else None,
        decode_tok_s=size.batch / step_s,
        step_bytes=step_bytes,
        bandwidth_share=step_bytes / step_s / limit.bytes_per_s,
    )


def _run_of(subject: Subject, samples: Samples, limit: Limit) -> GenerateRun:
    size, step_bytes = samples.size, subject.step_bytes(samples.size)
    prefill = [size.batch * size.prompt_tokens / t.prefill_s for t in samples.timings]
    decode = [size.batch * size.num_steps / t.decode_s for t in samples.timings]
    decode_tok_s = statistics.fmean(decode)
    return GenerateRun(
        engine=samples.engine,
        path=samples.path,
        path_reason=samples.path_reason,
        batch=size.batch,
        prompt_tokens=size.prompt_tokens,
        new_tokens=size.new_tokens,
        n=len(samples.timings),
        prefill_tok_s=statistics.fmean(prefill),
        prefill_tok_s_sd=_deviation(prefill),
        decode_tok_s=decode_tok_s,
        decode_tok_s_sd=_deviation(decode),
        step_bytes=step_bytes,
        bandwidth_share=step_bytes * decode_tok_s / size.batch / limit.bytes_per_s,
        allocated_peak_bytes=samples.allocated_peak_bytes,
    )


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
