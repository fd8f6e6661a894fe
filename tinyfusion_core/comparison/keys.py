"""What decides a cached result: a description, as JSON, of settings, networks and data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..protocols.data import FeatureSpace, Samples
from ..registry.registry import record_of
from ..runtime.files import digest, without_later
from ..selection.base import Decisive, Selector
from ..training.recover import Recover
from ..training.trainer import NUMERICALLY_NEUTRAL
from .legacy_keys import Name


def described(value: Any, *but: str) -> Any:
    """Settings as JSON, without the given names. A value that cannot be described is never the same twice."""
    if isinstance(value, FeatureSpace):
        return features_key(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _settings(value, but)
    if isinstance(value, functools.partial):
        return _made(value)
    if (name := _definition(value)) is not None:
        return name
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(v) for v in value]
    if isinstance(value, (float, Path, Enum, torch.dtype, torch.device)):
        return repr(value)  # JSON has no infinity
    return value if value is None or isinstance(value, (bool, int, str)) else uuid.uuid4().hex


def _made(factory: functools.partial[Any]) -> list[Any]:
    """What makes a sampler, say: a class, its arguments, and perhaps who calls it."""
    cls = next((part for part in (factory.func, *factory.args) if isinstance(part, type)), type(None))
    return [described(part) for part in (factory.func, factory.args, without_later(cls, factory.keywords))]


def _settings(value: Any, but: Sequence[str]) -> dict[str, Any]:
    """The class and the fields of a dataclass, without the given names.

    Every field is included, also at its default: otherwise a default could change and the key would not. A field that
    is added later says in its metadata which value is `NEUTRAL`, and is left out while it has that value, so that
    earlier results stay valid. That value is fixed for good; the default may change.
    """
    own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in but}
    told = {name: described(v) for name, v in without_later(type(value), own).items()}
    return {"class": described(type(value)), **told}


def _definition(value: Any) -> Name | list[Any] | None:
    """A class or function by its name, with what distinguishes it from others of that name; None if nothing does."""
    if isinstance(value, type) and "<locals>" not in value.__qualname__:
        plugin = record_of(value)
        return [Name.of(value), plugin["sha256"]] if "file" in plugin else Name.of(value)
    if inspect.isfunction(value) and value.__qualname__.isidentifier() and value.__closure__ is None:
        with suppress(OSError):
            return [Name.of(value), digest(inspect.getsource(value))]
    return None


def stage_key(stage: Selector | Recover, decisive: Decisive) -> dict[str, Any]:
    """A stage and its trainer, without what changes no result; of two batch sizes the one that is used."""
    how = described(decisive.trainer, *NUMERICALLY_NEUTRAL, *decisive.but_of_trainer)
    how["precision"] = decisive.trainer.accelerator.mixed_precision
    return {"stage": described(stage, *decisive.but), "trainer": how}


def features_key(space: FeatureSpace) -> Any:
    """What distinguishes a feature space from others, as far as is visible from outside."""
    weights = weights_key(space) if isinstance(space, nn.Module) else None
    own = {k: v for k, v in vars(space).items() if k != "training" and isinstance(v, (int, float, str))}
    return [described(type(space)), space.name, weights, described(own)]


def weights_key(model: nn.Module) -> str:
    """Return a hash of a network's weights and buffers."""
    return _hash(sorted(model.state_dict().items()))


def data_key(data: Samples, most: int) -> list[Any]:
    """What distinguishes a data set from others: its length, and some evenly spaced samples or all of them."""
    size = len(data)
    num = min(size, most)
    some = [i * (size - 1) // max(1, num - 1) for i in range(num)]
    parts = [some[first : first + 256] for first in range(0, num, 256)]
    return [size, digest([_hash(sorted(data.__getitems__(part).items())) for part in parts])]


def _hash(tensors: Sequence[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, t in tensors:
        found.update(f"{name} {list(t.shape)} {t.dtype}".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
