"""What one decoder layer keeps for its backward pass, and what it takes on the way.

A layer is a sequence of steps. Each says what it `keeps` until its backward pass, and what is alive
beside everything kept while it runs `forward` and `backward`. So a layer's peak is the largest of
running sums, wherever in it that lies. Sizes are bytes for all tokens of a pass.

What is kept follows from the code that runs, under bf16 autocast:

- norm (LlamaRMSNorm): its input in float32 and one number; what is scaled, if the scale is trained;
- trained linear: its input in bf16; layers that read the same input share it unless it is float32,
  which autocast casts for each;
- frozen linear: nothing (F.linear keeps a frozen weight's input no more than MatMul4Bit does);
- frozen linear of bitsandbytes' LLM.int8(): its input as it is, and the columns of outliers once
  more. MatMul8bitLt holds them itself, so checkpoints do not let go of them either;
- LoRA (peft/tuners/lora/layer.py, bnb.py): dropout's mask (1 byte) and, in bf16, what lora_A and
  lora_B read. Each adapter has dropout of its own, so nothing is shared;
- LoRA over qtool's packed layers (qtool.finetune.lora_function): the layer's input in bf16, shared
  by the layers that read it, dropout's mask and, in bf16, what lora_B reads;
- attention (fused): queries, keys, values and output in bf16, one float32 per query and head;
  otherwise the matrix, see `AttentionMatrix`;
- gated MLP: the activation's input and output and the other branch; plain MLP: its input.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final, NamedTuple

from qtool.architecture import Architecture, AttentionCache, ModelTensor
from qtool.planner.llm_int8 import CODE_BYTES, LAST_MLP_LAYERS, LOOKING_BYTES, OUTPUT_BYTES
from qtool.planner.lora import features, num_adapter_parameters
from qtool.planner.mlp_activations import mlp_activation
from qtool.planner.units import FLOAT32_BYTES, HALF_BYTES

BF16: Final = HALF_BYTES
FP32: Final = FLOAT32_BYTES
MASK: Final = 1

# The layer that a tensor belongs to: everything up to the first number in its name.
_LAYER: Final = re.compile(r"(?P<layer>.*?\.\d+)\.(?P<rest>.+)")
# Parts of multimodal models that text does not pass.
_TOWERS: Final = re.compile(r"vision|visual|audio")
_QUERIES: Final = frozenset(
    {"q_proj", "q_a_proj", "q_b_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv"}
)
_OUTPUTS: Final = frozenset(
    {"o_proj", "out_proj", "dense", "c_proj", "down_proj", "fc2", "dense_4h_to_h", "w2", "fc_out"}
)
_MLP_OUTPUTS: Final = frozenset({"down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2"})
_RECURRENT: Final = frozenset({"linear_attn"})  # has queries too, but no attention
# Their attention and activation do more in Python than these steps say.
UNCHECKED: Final = frozenset({"bloom"})

# Kept of each output of a recurrent mixer's linear layers: the convolution's input, its
# activation's input and what the scan reads. Nobody counted a kernel's own buffers.
RECURRENT_COPIES: Final = 3
# RMS norms that multiply by their scale before they round, and so keep float32 where it is trained.
FLOAT32_SCALES: Final = frozenset({"olmo2", "olmo3", "gemma", "gemma2", "gemma3", "gemma3_text"})
# float32 tensors of its width that an RMS norm's backward pass has at once.
NORM_BACKWARD_COPIES: Final = 5


class AttentionMatrix(NamedTuple):
    """Bytes per head and pair of tokens of attention that is not fused: kept, and in work."""

    kept: int
    work: int


# The float32 softmax and its bf16 copy; Gemma 2 also keeps the tanh of its soft cap.
ATTENTION_MATRIX: Final = {"bloom": AttentionMatrix(6, 6), "gemma2": AttentionMatrix(8, 6)}
# An additive bf16 mask per layer where a window makes fused attention take a mask.
MASK_PAIR_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class Precision:
    """The dtypes of a training run, in bytes per element, and what is trained.

    `stream` is the residual stream's. `is_bitsandbytes`: packed layers are bitsandbytes' and PEFT's
    classes for them, which answer in their input's dtype. `is_own`: they are qtool's, each with its
    adapter one step of autograd. `buffer_bytes(elements)` is what a packed weight takes in floating
    point while it is multiplied by. `int8_outliers`: the share of the columns of an MLP's last
    layer that hold one, where LLM.int8() multiplies; else None.
    """

    stream: int
    is_full: bool
    is_bitsandbytes: bool
    is_own: bool
    trained: int
    dropout: bool
    lora_r: int
    packed: frozenset[str]
    adapted: frozenset[str]
    buffer_bytes: Callable[[int], int]
    int8_outliers: float | None = None


@dataclass(frozen=True, slots=True)
class Alive:
    """What is alive at some moment, in bytes."""

    activations: int = 0
    buffer: int = 0
    weight_copies: int = 0
    gradients: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.buffer + self.weight_copies + self.gradients + self.logits

    def __add__(self, other: Alive) -> Alive:
        return Alive(
            self.activations + other.activations,
            self.buffer + other.buffer,
            self.weight_copies + other.weight_copies,
            self.gradients + other.gradients,
            self.logits + other.logits,
        )

    def __mul__(self, count: int) -> Alive:
        return Alive(
            self.activations * count,
            self.buffer * count,
            self.weight_copies * count,
            self.gradients * count,
            self.logits * count,
        )


def largest(moments: Iterable[Alive]) -> Alive:
    """The moment at which most is alive."""
    return max(moments, key=lambda alive: alive.total, default=Alive())


@dataclass(frozen=True, slots=True)
class Step:
    """Part of a layer. `gradients` are those of its weights, which its backward pass makes.

    `holds` are bytes that its functions keep by themselves, which no checkpoint lets go of;
    `holds_kept` such that another step keeps as well.
    """

    keeps: Alive
    forward: Alive = Alive()
    backward: Alive = Alive()
    gradients: int = 0
    holds: int = 0
    holds_kept: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer in training.

    `keeps` is all that is kept when its forward pass has ended, `peak` the most at once in its
    forward and its backward pass, its own gradients included. Under gradient checkpointing that is
    `checkpoint`, its input and what functions hold by themselves, and beside it `recomputed_peak`.
    `cached_copies` are the bf16 copies of trained float32 weights, which autocast holds until the
    loss is computed.
    """

    keeps: Alive
    peak: Alive
    recomputed_peak: Alive
    gradients: int
    checkpoint: int
    cached_copies: int
    is_known: bool


def _peak(steps: Sequence[Step], *, is_recomputed: bool) -> Alive:
    """The largest of the running sums.

    Once a layer has been recomputed, its functions are those of the first pass: what the second
    ones held is gone.
    """
    moments = []
    kept, held, gradients = Alive(), 0, sum(step.gradients for step in steps)
    for step in steps:
        kept += step.keeps
        held += step.holds
        back = kept + step.backward + Alive(0 if is_recomputed else held, gradients=gradients)
        moments += [kept + step.forward + Alive(held), back]
        gradients -= step.gradients
    return largest(moments)


Tensors = tuple[tuple[str, ModelTensor], ...]  # of one layer, by their names within it


class LayerKinds(NamedTuple):
    """The text decoder's layers: one of each kind, and the kind of each layer, first to last."""

    kinds: tuple[Tensors, ...]
    order: tuple[int, ...]


class LayerRun(NamedTuple):
    """`num_layers` layers in a row that are alike."""

    layer: Layer
    num_layers: int


def layer_kinds(architecture: Architecture, adapted: frozenset[str]) -> LayerKinds:
    """The kinds of layers; `adapted` are the names of the weights with adapters."""
    grouped: dict[str, list[tuple[str, ModelTensor]]] = {}
    for tensor in architecture.tensors.values():
        match = _LAYER.match(tensor.name)
        if match and not _TOWERS.search(match["layer"]):
            grouped.setdefault(match["layer"], []).append((match["rest"], tensor))
    kinds: dict[tuple[object, ...], int] = {}
    first: list[Tensors] = []
    order = []
    for tensors in grouped.values():
        key = tuple((rest, tensor.shape, tensor.name in adapted) for rest, tensor in tensors)
        if key not in kinds:
            kinds[key] = len(kinds)
            first.append(tuple(tensors))
        order.append(kinds[key])
    return LayerKinds(tuple(first), tuple(order))


def training_layers(
    architecture: Architecture,
    layers: LayerKinds,
    precision: Precision,
    *,
    batch: int,
    context: int,
) -> tuple[LayerRun, ...]:
    """The text decoder's layers, first to last, those in a row that are alike as one run."""
    caches = architecture.cache_layers
    masked = [isinstance(c, AttentionCache) and (c.window or context) < context for c in caches]
    if len(masked) != len(layers.order):
        masked = [any(masked)] * len(layers.order)
    built: dict[tuple[int, bool], Layer] = {}
    runs = []
    for (kind, is_masked), alike in groupby(zip(layers.order, masked, strict=True)):
        if (kind, is_masked) not in built:
            builder = _Builder(architecture, precision, batch * context, context, is_masked)
            built[kind, is_masked] = builder.layer(layers.kinds[kind])
        runs.append(LayerRun(built[kind, is_masked], len(list(alike))))
    return tuple(runs)


class _Linear(NamedTuple):
    """One linear layer: bytes per token that it keeps beside its input, whether it keeps that too,
    and what passes through."""

    keeps: int
    shares: bool
    forward: Alive
    backward: Alive


@dataclass(frozen=True, slots=True)
class _Builder:
    """Writes down the steps of one kind of layer."""

    architecture: Architecture
    precision: Precision
    tokens: int
    context: int
    is_masked: bool

    def layer(self, tensors: Sequence[tuple[str, ModelTensor]]) -> Layer:
        precision, hidden = self.precision, self.architecture.hidden_size
        norms = [
            (rest, tensor)
            for rest, tensor in tensors
            if tensor.kind == "norm" and rest.count(".") == 1 and tensor.shape == (hidden,)
        ]
        biased = {rest.removesuffix(".bias") for rest, tensor in tensors if tensor.kind == "bias"}
        is_layer_norm = any(rest.removesuffix(".weight") in biased for rest, _ in norms)
        inputs = FP32 if is_layer_norm else precision.stream  # autocast runs layer_norm in float32
        norm_step = self._norm(hidden, precision.stream, is_layer_norm=is_layer_norm)
        sections: dict[str, list[ModelTensor]] = {}
        for rest, tensor in tensors:
            if tensor.is_linear:
                sections.setdefault(rest.rpartition(".")[0].rpartition(".")[0], []).append(tensor)
        mixers: list[Step] = []
        mlps: list[Step] = []
        is_known = bool(sections) and self.architecture.model_type not in UNCHECKED
        for name, linears in sections.items():
            names = _names(linears)
            is_attention = names & _QUERIES and names & _OUTPUTS
            if is_attention and name.rpartition(".")[2] not in _RECURRENT:
                mixers += self._attention(linears, tensors, inputs)
            elif names & _MLP_OUTPUTS:
                # A single norm: attention and MLP read what it puts out.
                kept_width = hidden if mixers and len(norms) == 1 else None
                mlps += self._mlp(linears, inputs, kept_width=kept_width)
            else:
                mixers += self._recurrent(linears, inputs)
                is_known = False
        if any(tensor.experts_per_token for _, tensor in tensors):
            mlps += self._experts(inputs)
            is_known = False
        half = len(norms) // 2 or len(norms)
        last = half // 2
        if norms and all(rest.startswith("post_") for rest, _ in norms):
            last = half  # none before attention and MLP, as in OLMo 2
        before, between = norms[: half - last], norms[half - last :]
        steps = (
            *(norm_step for _ in before),
            *mixers,
            *(norm_step for _ in between[: len(between) - last]),
            *mlps,
            *(norm_step for _ in between[len(between) - last :]),
        )
        unread = [t for _, t in tensors if not t.is_linear]
        rest_of_weights = Step(
            Alive(weight_copies=sum(self._copied(tensor) for tensor in unread)),
            gradients=sum(self._gradients(tensor) for tensor in unread),
        )
        steps = (rest_of_weights, *(self._beside_the_stream(step) for step in steps))
        return Layer(
            keeps=sum((step.keeps + Alive(step.holds) for step in steps), Alive()),
            peak=_peak(steps, is_recomputed=False),
            recomputed_peak=_peak(steps, is_recomputed=True),
            gradients=sum(step.gradients for step in steps),
            checkpoint=self.tokens * precision.stream * hidden
            + sum(step.holds + step.holds_kept for step in steps),
            cached_copies=sum(self._cached(tensor) for _, tensor in tensors),
            is_known=is_known,
        )

    # -- weights ----------------------------------------------------------------------------------

    def _gradients(self, tensor: ModelTensor) -> int:
        """Of a trained weight, or of a linear layer's adapter."""
        precision = self.precision
        if precision.is_full:
            return precision.trained * math.prod(tensor.shape)
        if tensor.name in precision.adapted:
            return precision.trained * num_adapter_parameters(tensor, precision.lora_r)
        return 0

    def _copied(self, tensor: ModelTensor) -> int:
        """bf16 copies of float32 weights that a product under autocast reads."""
        return self._copied_adapter(tensor) + self._copied_weight(tensor)

    def _copied_adapter(self, tensor: ModelTensor) -> int:
        precision = self.precision
        is_cast = precision.trained == FP32 or self._is_own(tensor)
        if tensor.name not in precision.adapted or not is_cast:
            return 0
        return BF16 * num_adapter_parameters(tensor, precision.lora_r)

    def _copied_weight(self, tensor: ModelTensor) -> int:
        precision = self.precision
        is_cast = precision.stream == FP32 and tensor.name not in precision.packed
        return BF16 * math.prod(tensor.shape) if is_cast and tensor.is_linear else 0

    def _cached(self, tensor: ModelTensor) -> int:
        """Those of them that autocast holds on to: of weights that are trained."""
        if self._is_own(tensor):
            return 0
        trained_weight = self._copied_weight(tensor) if self.precision.is_full else 0
        return self._copied_adapter(tensor) + trained_weight

    # -- steps ------------------------------------------------------------------------------------

    def _alive(self, bytes_per_token: int) -> Alive:
        return Alive(self.tokens * bytes_per_token)

    def _step(self, keeps: int, forward: int = 0, backward: int = 0) -> Step:
        """A step without weights, in bytes per token."""
        return Step(self._alive(keeps), self._alive(forward), self._alive(backward))

    def _beside_the_stream(self, step: Step) -> Step:
        """With the residual stream, or its gradient; one in bf16 is kept by nothing else."""
        stream = self.precision.stream * self.architecture.hidden_size
        held = 3 * stream if self.precision.stream == BF16 else stream
        return replace(
            step,
            forward=step.forward + self._alive(held),
            backward=step.backward + self._alive(stream),
        )

    def _norm(self, width: int, element_bytes: int, *, is_layer_norm: bool = False) -> Step:
        float32 = FP32 * width
        if is_layer_norm:
            return self._step(float32 + 2 * FP32, float32, 2 * float32)
        scaled = FP32 if self.architecture.model_type in FLOAT32_SCALES else element_bytes
        trained = scaled * width if self.precision.is_full else 0
        return self._step(float32 + FP32 + trained, float32, NORM_BACKWARD_COPIES * float32)

    def _linears(
        self,
        linears: Sequence[ModelTensor],
        element_bytes: int,
        *,
        is_kept: bool = False,
        kept_width: int | None = None,
    ) -> list[Step]:
        """Linear layers that read one input, one after another; `is_kept` by another step anyway,
        or of `kept_width` by linear layers before them.

        What they put out, or its gradients, is beside them until the last of them is done.
        """
        steps = []
        outputs = 0
        keeping = {kept_width}  # widths of the inputs that are kept already
        holding = {kept_width}
        for index, tensor in enumerate(linears):
            width, output = features(tensor)
            outputs += self.output_bytes(tensor, element_bytes) * output
            one = self._linear(tensor, element_bytes)
            is_first = one.shares and not is_kept and width not in keeping
            if one.shares:
                keeping.add(width)
            # What is kept of a float32 input is a copy of it.
            is_there = is_kept or (width in keeping and element_bytes == BF16)
            read = 0 if is_there else element_bytes * width
            summed = element_bytes * width if index < len(linears) - 1 else 0
            kept = one.keeps + (BF16 * width if is_first else 0)
            held = 0
            if self._is_int8(tensor) and width not in holding:
                holding.add(width)
                held = element_bytes * width
            outliers = element_bytes * self._num_outliers(tensor)
            steps.append(
                Step(
                    keeps=Alive(self.tokens * kept, weight_copies=self._copied(tensor)),
                    forward=one.forward + self._alive(read + outputs),
                    backward=one.backward + self._alive(summed + outputs),
                    gradients=self._gradients(tensor),
                    holds=self.tokens * (outliers + (0 if is_kept else held)),
                    holds_kept=self.tokens * held if is_kept else 0,
                )
            )
        return steps

    def _linear(self, tensor: ModelTensor, element_bytes: int) -> _Linear:
        """One of them; see the module's text for what is kept."""
        precision = self.precision
        inputs, outputs = features(tensor)
        is_float32 = element_bytes == FP32
        cast = BF16 * inputs if is_float32 else 0  # what the product itself reads
        if precision.is_full:
            gradient = self._alive(element_bytes * inputs)
            return _Linear(cast, not is_float32, Alive(), gradient)
        reading, buffer = self._product(tensor, element_bytes)
        if tensor.name not in precision.adapted:
            back = Alive(self.tokens * cast, buffer)
            return _Linear(0, False, reading, back + self._alive(element_bytes * inputs))
        if self._is_own(tensor):
            return self._own_linear(inputs, outputs, element_bytes, buffer)
        keeps = BF16 * precision.lora_r + (MASK * inputs if precision.dropout else 0)
        is_cast = precision.trained == FP32 and not self._is_bitsandbytes(tensor)
        if is_cast or is_float32:  # dropout in float32, lora_A reads a bf16 copy
            own = 0 if is_float32 else FP32 * inputs
            dropped = FP32 * inputs if precision.dropout else 0
            keeps, shares = keeps + BF16 * inputs, False
            # lora_A's copy is gone when the gradient of its input becomes float32.
            adapter_back = FP32 * inputs + dropped - BF16 * inputs
        else:
            own = dropped = 0
            shares = not precision.dropout
            keeps += 0 if shares else BF16 * inputs
            adapter_back = BF16 * inputs
        # lora_B's scaled output and its sum with the base layer's.
        added = BF16 + self.output_bytes(tensor, element_bytes)
        # The base layer's backward pass comes last: what the adapter kept is gone, the gradient of
        # its input is there.
        product = (element_bytes + BF16) * inputs - keeps
        converted = product + (FP32 * inputs if is_float32 else 0)
        return _Linear(
            keeps,
            shares,
            largest(
                (
                    reading,
                    self._alive(own + dropped),
                    self._alive(own + added * outputs),
                )
            ),
            largest(
                (
                    Alive(self.tokens * product, buffer),
                    self._alive(converted),
                    self._alive(adapter_back + BF16 * outputs),
                )
            ),
        )

    def _product(self, tensor: ModelTensor, element_bytes: int) -> tuple[Alive, int]:
        """What multiplying by a frozen weight takes beside input and output; and the bytes that its
        backward pass makes of the weight."""
        num_elements = math.prod(tensor.shape)
        inputs, outputs = features(tensor)
        cast = BF16 * inputs if element_bytes == FP32 else 0  # to float16 for LLM.int8()
        if not self._is_int8(tensor):
            is_packed = tensor.name in self.precision.packed
            buffer = self.precision.buffer_bytes(num_elements) if is_packed else 0
            return Alive(self.tokens * cast, buffer), buffer
        rounding = self._alive(cast + (CODE_BYTES + LOOKING_BYTES) * inputs)
        multiplying = Alive(
            self.tokens * (CODE_BYTES * inputs + OUTPUT_BYTES * outputs),
            buffer=element_bytes * self._num_outliers(tensor) * outputs,
        )
        return largest((rounding, multiplying)), element_bytes * num_elements

    def _is_int8(self, tensor: ModelTensor) -> bool:
        """Whether it is LLM.int8()'s."""
        return self.precision.int8_outliers is not None and tensor.name in self.precision.packed

    def _num_outliers(self, tensor: ModelTensor) -> int:
        """Columns of its input that hold one."""
        if not self._is_int8(tensor) or _name(tensor) not in LAST_MLP_LAYERS:
            return 0
        return round((self.precision.int8_outliers or 0) * features(tensor)[0])

    def _own_linear(self, inputs: int, outputs: int, element_bytes: int, buffer: int) -> _Linear:
        """A packed layer and its adapter as one step, see `qtool.finetune.lora_function`."""
        has_dropout = self.precision.dropout
        # What dropout leaves, before there is an output.
        dropped = BF16 * (inputs - outputs) if has_dropout else 0
        to_input = BF16 * inputs
        # Its own gradient goes through the mask before the weight's part is added.
        masked = 2 * BF16 * inputs if has_dropout else 0
        widened = to_input + FP32 * inputs if element_bytes == FP32 else 0
        return _Linear(
            keeps=BF16 * self.precision.lora_r + (MASK * inputs if has_dropout else 0),
            shares=True,
            forward=largest((self._alive(dropped), Alive(buffer=buffer))),
            backward=largest(
                (
                    self._alive(masked),
                    Alive(self.tokens * to_input, buffer),
                    self._alive(widened),
                )
            ),
        )

    def output_bytes(self, tensor: ModelTensor, element_bytes: int) -> int:
        """Bytes per element of a linear layer's output: autocast's, or its input's."""
        return element_bytes if self._is_bitsandbytes(tensor) else BF16

    def _is_bitsandbytes(self, tensor: ModelTensor) -> bool:
        return self.precision.is_bitsandbytes and tensor.name in self.precision.packed

    def _is_own(self, tensor: ModelTensor) -> bool:
        """Whether it and its adapter are one step of qtool's."""
        is_adapted = tensor.name in self.precision.adapted
        return self.precision.is_own and is_adapted and tensor.name in self.precision.packed

    def _attention(
        self,
        linears: Sequence[ModelTensor],
        tensors: Sequence[tuple[str, ModelTensor]],
        element_bytes: int,
    ) -> list[Step]:
        architecture = self.architecture
        out = next(tensor for tensor in linears if _name(tensor) in _OUTPUTS)
        others = [tensor for tensor in linears if tensor is not out]
        heads, kv_heads = architecture.num_attention_heads, architecture.num_kv_heads
        queries, keys = heads * architecture.head_dim, kv_heads * architecture.head_dim
        output = features(out)[0]
        values = output // heads * kv_heads
        result = self.output_bytes(others[0], element_bytes)
        steps = self._linears(others, element_bytes)
        for rest, tensor in tensors:
            if tensor.kind == "norm" and "norm" in rest and rest.count(".") > 1:
                width = tensor.shape[-1]
                if rest.endswith(("q_norm.weight", "k_norm.weight", "layernorm.weight")):
                    is_query = ".q" in rest
                    whole = queries if is_query else keys
                    width = whole if width in (architecture.head_dim, whole) else width
                    steps.append(self._norm(width, result))
        steps.append(self._step(0, result * 3 * queries, result * 3 * queries))  # rotary embedding
        steps.append(self._scores(queries, keys, values, output, heads))
        steps += self._linears([out], BF16, is_kept=True)
        return steps

    def _scores(self, queries: int, keys: int, values: int, output: int, heads: int) -> Step:
        if self.is_masked or self.architecture.model_type in ATTENTION_MATRIX:
            keys, values = queries, output  # repeated for every query head
        kept = BF16 * (queries + keys + values + output) + FP32 * heads
        work = BF16 * (queries + keys + values + output)
        matrix = ATTENTION_MATRIX.get(self.architecture.model_type)
        if matrix is not None:
            pairs = self.context * heads
            return self._step(
                kept + matrix.kept * pairs, matrix.work * pairs, work + matrix.work * pairs
            )
        mask = MASK_PAIR_BYTES * self.context if self.is_masked else 0
        return self._step(kept + mask, work, work)

    def _mlp(
        self, linears: Sequence[ModelTensor], element_bytes: int, *, kept_width: int | None
    ) -> list[Step]:
        down = next(tensor for tensor in linears if _name(tensor) in _MLP_OUTPUTS)
        others = [tensor for tensor in linears if tensor is not down]
        width = features(down)[0]
        result = self.output_bytes(others[0], element_bytes)
        is_gated = sum(features(tensor)[1] for tensor in others) >= 2 * width
        activation = mlp_activation(self.architecture)
        made = activation.output_bytes(result)
        kept, backward = activation.kept_bytes(result), activation.backward
        if is_gated:  # the product goes first, and frees what it kept
            kept, backward = kept + made + result, max(backward, 3)
        return [
            *self._linears(others, element_bytes, kept_width=kept_width),
            self._step(kept * width, 2 * made * width, backward * made * width),
            *self._linears([down], made),
        ]

    def _experts(self, element_bytes: int) -> list[Step]:
        """Routed experts as one grouped product; frozen ones keep no input."""
        experts = self.architecture.experts
        if experts is None:
            return []
        hidden, width = self.architecture.hidden_size, experts.intermediate_size
        result = element_bytes
        kept = 3 * result * width + result * hidden
        if self.precision.is_full:
            kept += BF16 * (hidden + width)
        routed = experts.experts_per_token
        router = (BF16 + FP32) * experts.num_experts
        in_work = routed * result * (hidden + 2 * width)
        return [self._step(router + routed * kept, in_work, in_work)]

    def _recurrent(self, linears: Sequence[ModelTensor], element_bytes: int) -> list[Step]:
        """State space, linear attention, anything else: only its linear layers are known."""
        outputs = [features(t)[1] for t in linears if _name(t) not in _OUTPUTS]
        kept = RECURRENT_COPIES * element_bytes * sum(outputs)
        return [*self._linears(linears, element_bytes), self._step(kept, kept, kept)]


def _name(tensor: ModelTensor) -> str:
    return tensor.module_name.rpartition(".")[2]


def _names(tensors: Iterable[ModelTensor]) -> set[str]:
    return {_name(tensor) for tensor in tensors}
