"""Imports of transformers without what a process that only runs a model never uses.

    with lean_imports():
        from qtool.runtime.loading import load_model

Left out are PyTorch's compiler, its tensors spread over processes, torchvision, torchaudio,
scikit-learn, SciPy, and a look through all packages that are installed; and the files of all models
are read once where transformers reads them twice. On two cores of an EPYC the first token of a
small model comes after 2.4 s instead of 6.4.

For our own commands only: a program that imports qtool may compile and spread what it loads. What
asks for more than is expected here gets the real thing, later than usual.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Final

MARKS: Final = ("allow_in_graph", "assume_constant_result", "disable")
# What several distributions may bring, so that transformers looks for the names of all.
OF_SEVERAL: Final = ("flash_attn", "flash_attn_interface")
# Packages that transformers imports where they are installed: torchvision for images, which brings
# PyTorch's compiler along and fails where it was built for another PyTorch; scikit-learn for
# assisted decoding (5.17 does, 5.23 does not), which brings pandas; SciPy for losses; torchaudio.
UNUSED_PACKAGES: Final = ("torchvision", "torchaudio", "sklearn", "scipy")
INDEXING: Final = "torch._dynamo._trace_wrapped_higher_order_op"
SPREAD_TENSORS: Final = "torch.distributed.tensor"
MODEL_PARTS: Final = "transformers.modeling_layers"
MODEL_LISTS: Final = "transformers.utils.import_utils"


@contextmanager
def lean_imports() -> Iterator[None]:
    """transformers, if it is not there yet, is imported without what running a model never uses."""
    if "transformers" in sys.modules:
        yield
        return
    with ExitStack() as left_out:
        left_out.enter_context(_collecting_nothing())
        left_out.enter_context(without_packages(UNUSED_PACKAGES))
        left_out.enter_context(_asking_for_distributions())
        left_out.enter_context(_reading_models_once())
        left_out.enter_context(_without_compiler())
        _say_not_distributed()
        _import_distributed_parts_when_asked()
        if importlib.util.find_spec(MODEL_PARTS) is not None:
            importlib.import_module(MODEL_PARTS)  # else models import it later, with all it wants
        yield


@contextmanager
def lean_adapters() -> Iterator[None]:
    """PEFT, if it is not there yet and imported meanwhile, finds no bitsandbytes, now or later.

    Its layers are not ours, and importing it brings PyTorch's compiler along: five seconds.
    """
    if "peft" in sys.modules:
        yield
        return
    with without_packages(("bitsandbytes",)):
        yield
        ask = getattr(sys.modules.get("peft.import_utils"), "is_bnb_available", None)
        if ask is not None:
            ask()  # it keeps the answer


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Modules are many objects and no garbage: they are not looked through, now or later."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def without_packages(names: Iterable[str]) -> Iterator[None]:
    """Modules that are imported meanwhile do not find these packages, unless they are there."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # how Python marks what is not there
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _say_not_distributed() -> None:
    """Let transformers believe that PyTorch was built for one process.

    It asks once and keeps the answer. Releases that ask otherwise import what they like.
    """
    import torch

    asks: Any = getattr(
        importlib.import_module(MODEL_LISTS), "is_torch_distributed_available", None
    )
    if not hasattr(asks, "cache_info"):
        return
    is_available = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        asks()
    finally:
        torch.distributed.is_available = is_available


def _import_distributed_parts_when_asked() -> None:
    """`torch.distributed.tensor` and the like are there for who only names them.

    As PEFT does, which counts on transformers having imported them, to ask whether a weight is
    spread: as long as nothing made it so, none is.
    """
    import torch

    parts: Any = torch.distributed
    if "__getattr__" in vars(parts):
        return

    def import_part(name: str) -> Any:
        full_name = f"{parts.__name__}.{name}"
        if full_name == SPREAD_TENSORS and full_name not in sys.modules:
            return _SpreadTensors(full_name)
        if name.startswith("_") or importlib.util.find_spec(full_name) is None:
            raise AttributeError(f"module {parts.__name__!r} has no attribute {name!r}")
        return importlib.import_module(full_name)

    parts.__getattr__ = import_part


class _SpreadTensors(ModuleType):
    """Stands for PyTorch's module of tensors spread over processes until that is imported."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.DTensor = _DTensor

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


class _SpreadTensor(type):
    def __instancecheck__(cls, instance: object) -> bool:
        module = sys.modules.get(SPREAD_TENSORS)
        return module is not None and isinstance(instance, module.DTensor)

    def __getattr__(cls, name: str) -> Any:
        return getattr(importlib.import_module(SPREAD_TENSORS).DTensor, name)


class _DTensor(metaclass=_SpreadTensor):
    """Whether something is one is known without the module; all else the real one knows."""


# -- PyTorch's compiler ---------------------------------------------------------------------------


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Functions that are defined meanwhile are not marked for PyTorch's compiler.

    The marks are all that modules want of it while they are imported, and it is large.
    """
    import torch

    if "torch._dynamo" in sys.modules:
        yield
        return
    marking = {name: getattr(torch.compiler, name) for name in MARKS}
    vars(torch.compiler).update(dict.fromkeys(MARKS, _unmarked))
    torch._dynamo = marks = _Marks()  # type: ignore[assignment]
    sys.modules[INDEXING] = _Indexing(INDEXING)
    try:
        yield
    finally:
        vars(torch.compiler).update(marking)
        if vars(torch).get("_dynamo") is marks:
            del torch._dynamo  # PyTorch imports it when it is asked for
        _forget_indexing()


def _unmarked(function: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    """A decorator that changes nothing, with or without arguments."""
    return _unmarked if function is None else function


class _Marks:
    """Stands where `torch._dynamo` is looked up."""

    def __getattr__(self, name: str) -> Any:
        if name in MARKS:
            return _unmarked
        return getattr(importlib.import_module("torch._dynamo"), name)


class _Indexing(ModuleType):
    """Stands for the compiler's module of which masks are made with one class, some of them."""

    @staticmethod
    def TransformGetItemToIndex() -> Any:
        return _real_indexing().TransformGetItemToIndex()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module
            raise AttributeError(name)
        return getattr(_real_indexing(), name)


def _real_indexing() -> Any:
    _forget_indexing()
    return importlib.import_module(INDEXING)


def _forget_indexing() -> None:
    if isinstance(sys.modules.get(INDEXING), _Indexing):
        del sys.modules[INDEXING]


# -- what is installed ----------------------------------------------------------------------------


@contextmanager
def _asking_for_distributions() -> Iterator[None]:
    """Who asks meanwhile which distributions bring which packages gets answers one by one.

    transformers before 5.23 asks when it is imported, and Python reads the records of all.
    """
    read_all = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: _Distributions(read_all)
    try:
        yield
    finally:
        importlib.metadata.packages_distributions = read_all


class _Distributions(Mapping[str, list[str]]):
    """Names of distributions by package: the package's own, if there is one of that name."""

    def __init__(self, read_all: Callable[[], Mapping[str, list[str]]]) -> None:
        self._all = cache(read_all)

    def __getitem__(self, package: str) -> list[str]:
        if package not in OF_SEVERAL:
            with suppress(importlib.metadata.PackageNotFoundError, ValueError):
                importlib.metadata.distribution(package)
                return [package]
        return self._all()[package]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


# -- the files of models --------------------------------------------------------------------------


@contextmanager
def _reading_models_once() -> Iterator[None]:
    """What transformers finds in the files of its models is kept until the block ends.

    It lists what they define for `transformers` and again for `transformers.models`, 1,600 files,
    for its own memory tells a folder from a file in it.
    """
    finder = _MemoryFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.forget()


class _MemoryFinder(MetaPathFinder):
    """Finds transformers' module that lists models where it is, and gives it a memory."""

    def __init__(self) -> None:
        self._module: ModuleType | None = None
        self._list_folder: Callable[..., Any] | None = None

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == MODEL_LISTS else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module: ModuleType) -> None:
            execute(module)
            self._remember(module)

        spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec

    def _remember(self, module: ModuleType) -> None:
        listing = getattr(module, "create_import_structure_from_path", None)
        if listing is not None:
            self._module, self._list_folder = module, listing
            module.create_import_structure_from_path = _remembered(listing)  # type: ignore[attr-defined]

    def forget(self) -> None:
        """Let the module list folders as it did."""
        if self._module is not None:
            self._module.create_import_structure_from_path = self._list_folder  # type: ignore[attr-defined]


def _remembered(list_folder: Callable[..., Any]) -> Callable[..., Any]:
    """`list_folder` of a folder, or of a file in it, which calls itself by its public name."""
    lists: dict[Path, Any] = {}

    @wraps(list_folder)
    def listed(path: str | os.PathLike[str]) -> Any:
        place = Path(path)
        folder = place.parent if place.suffix and place.is_file() else place
        if folder not in lists:
            lists[folder] = list_folder(path)
        return lists[folder]

    return listed
