"""On an NVIDIA GPU: the fused path makes what transformers' operations make, kind by kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cupy_kernels.linear_few import NormWeight
from cupy_kernels.prompt_rows import NormRows
from qtool.runtime.decoders.choose import DecoderOptions, choose_decoder
from qtool.runtime.decoders.fused_prompt import flash_attention
from qtool.runtime.decoders.protocol import Sampling
from qtool.runtime.loading import LoadedModel
from qtool.runtime.random_model import build_random_model
from tests.runtime.decoders.common_blocks import BASE, MODELS
from tests.runtime.decoders.cpu_launches import DTYPES, attention

pytestmark = pytest.mark.gpu

PROMPT_TOKENS = 70
NEW_TOKENS = 40


def load(name: str, quant: str) -> LoadedModel:
    loaded = build_random_model(BASE | MODELS[name], quant, device="cuda", model_id=name)  # type: ignore[arg-type]
    if name == "gemma2":  # whose scores' cap PyTorch's attention leaves out
        loaded.model.set_attn_implementation("eager")
    return loaded


def make(loaded: LoadedModel, path: str, batch: int = 1) -> Any:
    return choose_decoder(loaded, 128, batch, options=DecoderOptions(path=path, prefill_chunk=48))  # type: ignore[arg-type]


def prompt(batch: int, num_tokens: int = PROMPT_TOKENS) -> torch.Tensor:
    return torch.randint(0, 1000, (batch, num_tokens), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "bf16"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_are_those_of_the_model(name, quant):
    """Step by step over the same tokens, so that one close call does not change all that follow."""
    loaded = load(name, quant)
    fused, eager = make(loaded, "fused"), make(loaded, "eager")
    assert fused.path == "fused"
    assert ("prompts on the model's own" in fused.path_reason) == (name == "gemma2")
    for start, num_tokens in ((0, PROMPT_TOKENS), (PROMPT_TOKENS, 1), (PROMPT_TOKENS + 1, 40)):
        ids = prompt(1, num_tokens)
        fused.prefill(ids, start)
        eager.prefill(ids, start)
        expected = eager._logits.float()
        difference = (fused._logits.float() - expected).abs().max()
        assert difference <= 0.03 * expected.abs().max(), (start, num_tokens)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("quant", ["nf4-dq", "int8", "bf16"])
def test_a_greedy_text_differs_only_where_two_tokens_are_close(quant, batch):
    loaded = load("llama", quant)
    ids = prompt(batch)
    made = {}
    for path in ("fused", "eager"):
        decoder = make(loaded, path, batch)
        decoder.prefill(ids, 0)
        made[path] = torch.tensor(list(decoder.decode(Sampling(), NEW_TOKENS)))
    for sequence in range(batch):
        fused, eager = made["fused"][:, sequence], made["eager"][:, sequence]
        different = (fused != eager).nonzero()
        if not len(different):
            continue
        at = int(different[0])
        with torch.inference_mode():
            text = torch.cat([ids[sequence], eager[:at]])[None].cuda()
            logits = loaded.model(text).logits[0, -1].float()
        gap = logits.max() - logits[int(fused[at])]
        assert gap <= 0.03 * logits.abs().max(), (sequence, at)


def test_a_second_prompt_goes_on_from_the_cache():
    loaded = load("llama", "nf4-dq")
    decoder = make(loaded, "fused")
    decoder.prefill(prompt(1), 0)
    first = list(decoder.decode(Sampling(), 10))
    decoder.prefill(prompt(1)[:, :40], 0)
    decoder.prefill(prompt(1)[:, 40:], 40)
    assert list(decoder.decode(Sampling(), 10)) == first


@pytest.mark.parametrize("packed", ["few", "many", "neither"])
@torch.inference_mode()
def test_prompts_of_other_lengths_find_their_own_places(packed):
    """Launches are told where tensors lie now, whichever read them before."""
    loaded = load("llama", "nf4-dq")
    options = {path: DecoderOptions(path=path, prefill_chunk=128) for path in ("fused", "eager")}
    fused, eager = (choose_decoder(loaded, 256, options=it) for it in options.values())
    takes_up = fused._network._prompt
    if packed == "many" and not takes_up.can_multiply_many():
        pytest.skip("no kernel for many tokens")
    takes_up.max_packed_tokens = 64 if packed == "few" else 0
    takes_up.multiplies_many = packed == "many"
    in_the_way = []
    for num_tokens in (40, 23, 40, 64, 23):
        num_tokens += 0 if packed == "few" else 60
        ids = prompt(1, num_tokens)
        fused.prefill(ids, 0)
        eager.prefill(ids, 0)
        expected = eager._logits.float()
        difference = (fused._logits.float() - expected).abs().max()
        assert difference <= 0.03 * expected.abs().max(), num_tokens
        in_the_way.append(torch.full((num_tokens, 512), torch.nan, device="cuda"))


def test_sampling_with_a_seed_repeats():
    loaded = load("llama", "nf4-dq")
    decoder = make(loaded, "fused")
    texts = []
    for _ in range(2):
        decoder.prefill(prompt(1), 0)
        texts.append(list(decoder.decode(Sampling(temperature=1.0, top_k=50, seed=7), 20)))
    assert texts[0] == texts[1]


def test_what_is_not_fused_says_why():
    loaded = load("llama", "nf4-dq")
    assert (
        "9" in choose_decoder(loaded, 128, 9).path_reason or make(loaded, "auto", 9).path == "graph"
    )


@pytest.mark.parametrize("window", [0, 1, 2, 24, 99, 500])
@pytest.mark.parametrize("num_queries", [2, 40, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (4, 4, 128), (4, 1, 256)])
@torch.inference_mode()
def test_attention_of_a_prompt_sees_what_it_should(heads, kv_heads, head_dim, num_queries, window):
    num_keys = 100

    def draw(heads, count):
        return torch.randn(2, heads, count, head_dim, device="cuda").bfloat16()

    queries = draw(heads, num_queries)
    keys, values = (draw(kv_heads, 128)[:, :, :num_keys] for _ in range(2))
    how = {"scale": head_dim**-0.5, "window": window}
    found = flash_attention(*(it.transpose(1, 2) for it in (queries, keys, values)), **how)
    expected = attention(queries.float(), keys, values, **how).transpose(1, 2)
    assert (found.float() - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("kind", ["rms", "rms_plus_one"])
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("columns", [64, 1152, 5376, 16_384, 28_672])
def test_a_norm_is_added_to_what_is_there(columns, dtype, kind):
    num_rows, epsilon = 5, 1e-6
    x, before, weight = (
        torch.randn(rows, columns, device="cuda").to(DTYPES[dtype])
        for rows in (num_rows,) * 2 + (1,)
    )
    hidden = before.clone()
    launch = NormRows(columns, dtype, kind, added=True)
    norm = NormWeight(weight.data_ptr(), epsilon)
    stream = torch.cuda.current_stream().cuda_stream
    launch.queue(num_rows, norm, x.data_ptr(), hidden.data_ptr(), stream)
    wide = x.double()
    wide = wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    wide = wide * (weight.double() + (kind == "rms_plus_one"))
    # Up to three roundings: of the norm before its weight, of it behind, and of the sum.
    unit = torch.finfo(DTYPES[dtype]).eps / 2
    room = 1.1 * unit * (2 * wide.abs() + (before.double() + wide).abs() + unit)
    assert ((hidden.double() - before.double() - wide).abs() <= room).all()


@pytest.mark.parametrize("columns", [5, 1000, 128_256])
def test_the_first_of_the_largest_logits_wins(columns):
    from cupy_kernels.argmax_rows import argmax_rows, workspace_bytes

    values = torch.randn(3, columns, device="cuda").bfloat16()
    values[1] = values[1].max()
    values[2, columns // 2] = torch.nan
    out = torch.empty(3, dtype=torch.int64, device="cuda")
    workspace = torch.zeros(workspace_bytes(3), dtype=torch.uint8, device="cuda")
    launch = argmax_rows(
        values.data_ptr(),
        "BF16",
        3,
        columns,
        workspace=workspace.data_ptr(),
        out=out.data_ptr(),
    )
    for _ in range(3):
        out.fill_(-1)
        launch(torch.cuda.current_stream().cuda_stream)
        expected = values[0].float().argmax().item()
        first = (values[0] == values[0, expected]).nonzero()[0].item()
        assert out.tolist() == [first, 0, columns // 2]


@pytest.mark.parametrize("position", [1, 15, 63, 64, 65, 500, 1023])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim", "window"),
    [
        (32, 8, 128, 128, 0),
        (8, 8, 64, 32, 0),
        (16, 2, 96, 96, 0),
        (4, 1, 256, 256, 100),
        (7, 1, 80, 80, 17),
    ],
)
def test_attention_is_that_of_a_plain_softmax(
    heads, kv_heads, head_dim, rotary_dim, window, position
):
    from cupy_kernels.decode_attention import (
        AttentionShape,
        AttentionTensors,
        decode_attention,
        workspace_bytes,
    )

    batch, capacity = 2, 1024
    shape = AttentionShape(
        heads, kv_heads, head_dim, rotary_dim, "none", False, batch, capacity, "BF16"
    )

    def draw(*sizes):
        return torch.randn(*sizes, device="cuda").bfloat16()

    qkv = draw(batch, (heads + 2 * kv_heads) * head_dim)
    keys, values = (draw(batch, kv_heads, capacity, head_dim) for _ in range(2))
    angles = torch.rand(capacity, rotary_dim // 2, device="cuda") * 6
    cosines, sines = angles.cos().contiguous(), angles.sin().contiguous()
    at = torch.tensor([position], device="cuda")
    out = torch.full((batch, heads * head_dim), torch.nan, dtype=torch.bfloat16, device="cuda")
    workspace = torch.zeros(workspace_bytes(shape), dtype=torch.uint8, device="cuda")
    old_keys, old_values = keys.clone(), values.clone()
    launch = decode_attention(
        shape,
        AttentionTensors(
            *(t.data_ptr() for t in (qkv,)),
            qkv.stride(0),
            *(t.data_ptr() for t in (cosines, sines, at, keys, values, out)),
            out.stride(0),
            workspace.data_ptr(),
        ),
        scale=head_dim**-0.5,
        window=window,
    )
    for _ in range(2):
        out.fill_(torch.nan)
        launch(torch.cuda.current_stream().cuda_stream)

    def turned(x):
        half = rotary_dim // 2
        a, b = x[..., :half], x[..., half:rotary_dim]
        c, s = cosines[position], sines[position]
        return (
            torch.cat([a * c - b * s, b * c + a * s, x[..., rotary_dim:]], dim=-1)
            .bfloat16()
            .float()
        )

    q, k, v = qkv.float().split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=1)
    q, k = (turned(t.view(batch, -1, head_dim)) for t in (q, k))
    old_keys, old_values = old_keys.float(), old_values.float()
    old_keys[:, :, position], old_values[:, :, position] = k, v.view(batch, kv_heads, head_dim)
    first = max(0, position - window + 1) if window else 0
    group = heads // kv_heads
    seen_keys = old_keys[:, :, first : position + 1].repeat_interleave(group, 1)
    seen_values = old_values[:, :, first : position + 1].repeat_interleave(group, 1)
    weights = (torch.einsum("bhd,bhtd->bht", q, seen_keys) * head_dim**-0.5).softmax(-1)
    expected = torch.einsum("bht,bhtd->bhd", weights, seen_values).reshape(batch, -1)
    error = (out.float() - expected).norm() / expected.norm()
    assert error < 1e-2
    assert (keys[:, :, position].float() - k).abs().max() <= 0.02 * k.abs().max()
    assert torch.equal(values[:, :, position].float(), v.view(batch, kv_heads, head_dim))
    untouched = torch.arange(capacity, device="cuda") != position
    assert torch.equal(keys[:, :, untouched].float(), old_keys[:, :, untouched])
