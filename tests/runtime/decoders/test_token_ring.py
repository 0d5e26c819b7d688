"""Tokens on their way to the host: order, how far ahead, and the end."""

from __future__ import annotations

import torch

from qtool.runtime.decoders.token_ring import FIRST_STEPS_AHEAD, STEPS_AHEAD, TokenRing, run_ahead

NUM_STEPS = 3 * STEPS_AHEAD + 2


def test_steps_are_taken_in_order_and_launched_ahead() -> None:
    events: list[tuple[str, int]] = []

    def launch(step: int) -> None:
        events.append(("launch", step))

    def take(step: int) -> list[int]:
        events.append(("take", step))
        return [step]

    assert list(run_ahead(launch, take, NUM_STEPS)) == [[step] for step in range(NUM_STEPS)]
    launched = 0
    for kind, step in events:
        if kind == "launch":
            assert step == launched
            launched += 1
        else:
            num_ahead = STEPS_AHEAD if step else FIRST_STEPS_AHEAD
            assert launched == min(step + num_ahead, NUM_STEPS), "neither less nor more"


def test_closing_it_launches_no_more() -> None:
    launched: list[int] = []
    tokens = run_ahead(launched.append, lambda step: [step], NUM_STEPS)
    next(tokens)
    tokens.close()
    assert launched == list(range(FIRST_STEPS_AHEAD))


def test_nothing_is_launched_for_no_steps() -> None:
    launched: list[int] = []
    assert list(run_ahead(launched.append, lambda step: [step], 0)) == []
    assert launched == []


def test_a_ring_keeps_as_many_steps_as_run_ahead() -> None:
    ring = TokenRing(2, torch.device("cpu"))

    def launch(step: int) -> None:
        ring.write(torch.tensor([step, 100 + step]))
        ring.send(step)

    for _ in range(2):  # a new text begins at row 0 again, wherever the last one ended
        ring.restart()
        taken = list(run_ahead(launch, ring.take, NUM_STEPS))
        assert taken == [[step, 100 + step] for step in range(NUM_STEPS)]
