"""Kimi K2.5: DeepSeek-V3's decoder behind a vision tower of its own."""

from __future__ import annotations

from dataclasses import replace

from qtool.architecture.config import MAX_WIDTH, Config
from qtool.architecture.decoder import Body, norms, plain_mlp, stack
from qtool.architecture.families.deepseek import deepseek_v3
from qtool.architecture.families.vision import Tower, with_vision
from qtool.architecture.parts import Tensors, convolution, linear, norm, parameter
from qtool.architecture.stored_names import PER_EXPERT, StoredNames
from qtool.errors import QtoolError


def kimi_k25(config: Config) -> Body:
    """kimi_k25."""
    text_config = config.section("text_config")
    kind = text_config.text("model_type")
    if kind not in (None, "kimi_k2", "deepseek_v3"):
        raise QtoolError(
            f"config.json: text_config.model_type {kind[:80]!r} is not supported; known: "
            "deepseek_v3, kimi_k2",
            kind="unsupported",
            hint="use a checkpoint with one of these decoders",
        )
    text = deepseek_v3(text_config, root="model.language_model")
    vision_config = config.section("vision_config")
    tower = _tower(vision_config, "model.vision_tower")
    merged, own = tower.width * _merged_patches(vision_config), "model.mm_projector"
    projector = (
        *norm(f"{own}.pre_norm", config.count("projection_hidden_size", 1152), bias=True),
        *linear(f"{own}.in_proj", merged, merged, bias=True),
        *linear(f"{own}.out_proj", text.sizes.hidden, merged, bias=True),
    )
    text = replace(text, tensors=(*text.tensors, *projector))
    names = _names(text.stored_names)
    return with_vision(config, text, tower.tensors, tied=True, stored_names=names)


def _merged_patches(config: Config) -> int:
    """How many patches become one token: the product of two sides."""
    sides = config.items("merge_kernel_size")
    if sides is None:
        return 4
    if len(sides) != 2 or not all(type(side) is int and 1 <= side <= MAX_WIDTH for side in sides):
        config.reject("merge_kernel_size", sides, f"two whole numbers from 1 to {MAX_WIDTH:,}")
    return int(sides[0] * sides[1])


def _tower(config: Config, root: str) -> Tower:
    """kimi_k25_vision, keys as transformers reads them (the published ones begin with vt_, and
    leave transformers' defaults in place)."""
    width, mlp = config.count("hidden_size", 1152), config.count("intermediate_size", 4304)
    patch, patches = config.count("patch_size", 14), f"{root}.patch_embed"
    grid = (config.count("pos_emb_height", 64), config.count("pos_emb_width", 64))

    def layer(name: str) -> Tensors:
        projections = ("proj", "q_proj", "k_proj", "v_proj")
        return (
            *norms(name, width, "norm1", "norm2", bias=True),
            *(
                tensor
                for projection in projections
                for tensor in linear(f"{name}.attn.{projection}", width, width, bias=True)
            ),
            *plain_mlp(f"{name}.mlp.fc1", f"{name}.mlp.fc2", width, mlp),
        )

    layers = [layer] * config.num_layers("num_hidden_layers", 27)
    tensors = (
        *convolution(f"{patches}.proj", width, 3, patch, patch),
        *parameter(f"{patches}.pos_emb.position_embeddings", *grid, width),
        *stack(f"{root}.layers", layers),
        *norm(f"{root}.final_layernorm", width, bias=True),
    )
    return Tower(tensors, width)


def _names(text: StoredNames) -> StoredNames:
    """Published checkpoints put the language model outermost and name the tower's layers blocks."""
    tower = r"^vision_tower\.encoder\.blocks\.(\d+)\."
    return StoredNames(
        "model",
        renames=(
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (rf"{tower}norm1\.", r"vision_tower.encoder.blocks.\1.norm2."),
            (rf"{tower}norm0\.", r"vision_tower.encoder.blocks.\1.norm1."),
            (rf"{tower}mlp\.fc1\.", r"vision_tower.encoder.blocks.\1.mlp.fc2."),
            (rf"{tower}mlp\.fc0\.", r"vision_tower.encoder.blocks.\1.mlp.fc1."),
            (rf"{tower}wo\.", r"vision_tower.encoder.blocks.\1.attn.proj."),
            (r"^vision_tower\.encoder\.blocks\.", "model.vision_tower.layers."),
            (r"^vision_tower\.encoder\.", "model.vision_tower."),
            (r"\.blocks\.", ".layers."),  # transformers writes the decoder's layers as blocks too
            (
                r"^vision_tower\.patch_embed\.pos_emb\.weight$",
                "model.vision_tower.patch_embed.pos_emb.position_embeddings",
            ),
            (r"^mm_projector\.proj\.0\.", "model.mm_projector.in_proj."),
            (r"^mm_projector\.proj\.2\.", "model.mm_projector.out_proj."),
            *PER_EXPERT,
        ),
        ignored=(
            (r"\.wqkv\.", "query, key and value in one, which transformers takes apart"),
            *text.ignored,
        ),
    )
