"""Ten thousand broken configs: each is an architecture or one clear error that names a key, at
once, and never anything else."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from qtool.architecture import KNOWN_MODEL_TYPES, Architecture, build_architecture
from qtool.errors import QtoolError
from tests.architecture.families import TINY

NUM_MUTATIONS = 10_000
MAX_MESSAGE = 2_000

# What a key may hold instead of its value.
STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    10**30,
    2**31 - 1,
    2**31,
    -(2**63),
    0.5,
    4096.0,
    float("nan"),
    float("inf"),
    "",
    "auto",
    "4096",
    "x" * 100_000,
    "M" * 100_000,
    [],
    [None],
    [0, -1],
    [[[]]],
    ["full_attention"] * 3,
    ["full_attention"] * 10_001,
    [{}] * 64,
    {},
    {"hidden_size": 10**30},
    {"0": None},
)


class Recorded(dict[str, Any]):
    """A config that notes which of its keys are read, at any level."""

    def __init__(self, values: dict[str, Any], read: set[str]) -> None:
        super().__init__(
            (key, Recorded(value, read) if isinstance(value, dict) else value)
            for key, value in values.items()
        )
        self._read = read

    def get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return super().get(key, default)


def fresh(value: Any) -> Any:
    """A copy that shares nothing with `value`."""
    return json.loads(json.dumps(value))


def objects(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config and the objects nested in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from objects(value)


def mutate(config: dict[str, Any], rng: random.Random, keys: Sequence[str]) -> None:
    """One change, in place, to a key that some architecture reads; `keys` are all of them."""
    target = rng.choice(list(objects(config)))
    present = [key for key in keys if key in target]
    key = rng.choice(present if present and rng.random() < 0.7 else keys)
    kind = rng.randrange(8)
    if kind == 0:
        target.pop(key, None)
    elif kind == 1:
        config["model_type"] = rng.choice([*KNOWN_MODEL_TYPES, rng.choice(STRANGE)])
    elif kind == 2:
        target[key] = fresh(target[rng.choice(list(target))]) if target else None
    elif kind == 3 and isinstance(target.get(key), int):
        target[key] = target[key] * rng.choice([-1, 2, 3, 50]) + rng.choice([-1, 0, 1])
    elif kind == 4:
        nested = {"text_config": fresh(config)}
        config |= nested if rng.random() < 0.3 else {key: [target.get(key)]}
    elif kind == 5 and isinstance(target.get(key), list) and target[key]:
        target[key] = [*target[key][:-1], fresh(rng.choice(STRANGE))]
    else:
        target[key] = fresh(rng.choice(STRANGE))


@pytest.fixture(scope="module")
def configs(test_data) -> list[dict[str, Any]]:
    """Published configs, and a tiny one of every known type."""
    files = sorted(Path(test_data, "configs").glob("*/config.json"))
    assert len(files) > 40
    published = [json.loads(file.read_text()) for file in files]
    return published + [{"model_type": kind, **config} for kind, config in sorted(TINY.items())]


@pytest.fixture(scope="module")
def keys(configs) -> list[str]:
    """Every key that is read from one of them."""
    read: set[str] = set()
    for config in configs:
        with suppress(QtoolError):
            build_architecture(Recorded(config, read))
    assert {"num_hidden_layers", "deepstack_visual_indexes", "indexer_types"} <= read
    return sorted(read)


@pytest.mark.parametrize("seed", range(10))
def test_a_mutated_config_is_an_architecture_or_one_error_that_names_a_key(configs, keys, seed):
    rng = random.Random(seed)
    answers, errors = 0, 0
    for _ in range(NUM_MUTATIONS // 10):
        config = fresh(rng.choice(configs))
        config.pop("architectures", None) if rng.random() < 0.5 else None
        for _ in range(rng.choice([1, 1, 2, 5])):
            mutate(config, rng, keys)
        try:
            built = build_architecture(config)
        except QtoolError as error:
            errors += 1
            assert error.message.startswith("config.json: ") and error.hint, error.message
            assert len(error.message) < MAX_MESSAGE
            key = error.message.removeprefix("config.json: ").split(": ")[0].split(" ")[0]
            assert key == "model" or key.rpartition(".")[2].isidentifier(), error.message
        else:
            answers += 1
            assert_consistent(built)
    assert answers > 100 and errors > 100


def assert_consistent(built: Architecture) -> None:
    """What every answer promises, however odd the config was."""
    assert built.num_layers > 0 and built.hidden_size > 0 and built.vocab_size > 0
    assert built.num_parameters >= built.num_active_parameters > 0
    for tensor in built.tensors.values():
        assert min(tensor.shape) > 0 and type(sum(tensor.shape)) is int, tensor
