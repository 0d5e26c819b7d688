"""Choosing tokens: greedy, narrowed, in the right proportions."""

from __future__ import annotations

import pytest
import torch

from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.decoders.sampling import choose_tokens, seed_generator

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
NUM_DRAWN = 20_000


def draw(sampling: Sampling, num: int = NUM_DRAWN, seed: int = 0) -> torch.Tensor:
    """How often each token comes, as a share."""
    generator = torch.Generator().manual_seed(seed)
    logits = PROBABILITIES.log().expand(num, -1).contiguous()
    return torch.bincount(choose_tokens(logits, sampling, generator), minlength=5) / num


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_0_takes_the_most_likely(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]], dtype=dtype)
    assert choose_tokens(logits, Sampling(), torch.Generator()).tolist() == [1, 0]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    assert torch.allclose(draw(Sampling(temperature=1.0)), PROBABILITIES, atol=0.01)


def test_temperature_sharpens_and_flattens() -> None:
    for temperature in (0.5, 2.0):
        expected = (PROBABILITIES.log() / temperature).softmax(0)
        assert torch.allclose(draw(Sampling(temperature)), expected, atol=0.01)


def test_top_k_keeps_the_likeliest() -> None:
    expected = torch.tensor([0, 0.4, 0, 0.25, 0]) / 0.65
    assert torch.allclose(draw(Sampling(1.0, top_k=2)), expected, atol=0.01)
    assert torch.allclose(draw(Sampling(1.0, top_k=99)), PROBABILITIES, atol=0.01)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1e-6, [1]), (0.39, [1]), (0.41, [1, 3]), (0.66, [1, 3, 4]), (0.9, [0, 1, 3, 4])],
)
def test_top_p_keeps_what_reaches_it(top_p: float, kept: list[int]) -> None:
    shares = draw(Sampling(1.0, top_p=top_p))
    assert shares.nonzero().flatten().tolist() == kept
    expected = PROBABILITIES[kept] / PROBABILITIES[kept].sum()
    assert torch.allclose(shares[kept], expected, atol=0.015)


def test_top_p_counts_what_top_k_left() -> None:
    shares = draw(Sampling(1.0, top_k=2, top_p=0.6))  # 0.4 of 0.65 reaches 0.6
    assert shares.nonzero().flatten().tolist() == [1]


def test_seeds_decide() -> None:
    logits = torch.zeros(1, 1000)
    generator = torch.Generator()

    def one(seed: int | None) -> int:
        seed_generator(generator, seed)
        return int(choose_tokens(logits, Sampling(1.0), generator))

    assert one(5) == one(5)
    assert one(5) != one(6)
    assert len({one(None) for _ in range(8)}) > 1
