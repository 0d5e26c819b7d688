"""What a decoder remembers of its tokens, and when it reads them."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from qtool.runtime.decoders.transcript import Transcript


def test_tokens_are_read_before_work_is_queued():
    """On a GPU reading waits for all that is queued before."""
    happened = []
    ids = torch.tensor([[5, 6]])
    on_device = SimpleNamespace(cpu=lambda: happened.append("read") or ids)
    transcript = Transcript(batch=1, capacity=8)
    with transcript.taking(on_device, 0):
        happened.append("queued")
    assert happened == ["read", "queued"]
    assert transcript.is_exactly(2)
    assert transcript.whole(torch.tensor([[7]]), 2).tolist() == [[5, 6, 7]]


def test_what_breaks_off_is_not_remembered():
    transcript = Transcript(batch=1, capacity=8)
    try:
        with transcript.taking(torch.tensor([[5, 6]]), 0):
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert not transcript.is_exactly(0) and transcript.length == 0
