"""The lists of layers of a network, and where its config says how many each has."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

from torch import nn

from tinyfusion_core.errors import UserError
from tinyfusion_llm.layers.building import Settings, construct_as
from tinyfusion_llm.layers.edits import edits
from tinyfusion_llm.layers.finding import find_layers, path_of, text_config
from tinyfusion_llm.pretrained.reading import as_json


@dataclass(frozen=True)
class Stack:
    """A list of layers, and what a config says of its depth.

    Attributes:
        path: path of the `ModuleList`.
        part: names of attributes that lead from the config to that part of it which says the depth.
        key: the setting there that says it.
        listed: whether what that part lists by layer is about these layers.
    """

    path: str
    part: Sequence[str] = ()
    key: str = "num_hidden_layers"
    listed: bool = True

    def config(self, model: Any) -> Any:
        """Return the part of a model's config that says the depth."""
        return reduce(getattr, self.part, model.config)

    def depth(self, model: nn.Module) -> int:
        """Return the depth that a model's config says."""
        return int(getattr(self.config(model), self.key))


def find_stacks(model: nn.Module) -> Sequence[Stack]:
    """Return the lists of layers of a network, in execution order: that of a decoder, or of an encoder and a decoder.

    Args:
        model: the network; only its class and its config are looked at, so that its lists may be short already.

    Raises:
        UserError: it has no such lists, or the config does not say how long each is.
    """
    kind: Any = type(model)
    return _find_stacks(kind, json.dumps(as_json(model.config), sort_keys=True))


@lru_cache(maxsize=8)
def _find_stacks(kind: Any, config: str) -> Sequence[Stack]:
    whole = construct_as(kind, json.loads(config))
    if not whole.config.is_encoder_decoder:
        decoder = text_config(whole)
        return (Stack(find_layers(whole), next(part for part, found in _parts(whole.config) if found is decoder)),)
    found = []
    for name in ("encoder", "decoder"):
        inside = getattr(whole, f"get_{name}")()
        stack = next(_said(whole, path_of(whole, inside), json.loads(config)), None)
        if stack is None:
            raise UserError(
                f"backbone: no list of layers in the {name} of {kind.__name__} whose length its config says, and whose "
                "length alone; depth pruning needs one in each of encoder and decoder"
            )
        found.append(stack)
    return found


def _said(whole: nn.Module, inside: str, config: Settings) -> Iterator[Stack]:
    """Lists of a part of a network, and the settings of which they have one layer more when these say one more."""
    lengths = _lengths(whole)
    for part, settings in _parts(whole.config):
        for key, value in settings.to_dict().items():
            if isinstance(value, bool) or not any(
                path.startswith(f"{inside}.") and length == value for path, length in lengths.items()
            ):
                continue
            kept = [*range(value), value - 1]
            longer_lists = edits(settings.to_dict(), value, kept)
            for listed in (True, False) if longer_lists else (True,):  # they may be about the other list of layers
                grown = _lengths(_built(whole, config, part, {**(longer_lists if listed else {}), key: value + 1}))
                longer = [path for path in lengths if grown.get(path) == lengths[path] + 1]
                if len(longer) == 1 and longer[0].startswith(f"{inside}."):
                    yield Stack(longer[0], part, key, listed)
                    break


def _built(whole: nn.Module, config: Settings, part: Sequence[str], changed: Mapping[str, Any]) -> nn.Module:
    """The network of a config in a part of which some settings are changed; without any layers if there is none."""
    settings = copy.deepcopy(dict(config))
    reduce(lambda found, name: found[name], part, settings).update(changed)
    try:
        return construct_as(type(whole), settings)  # type: ignore[no-any-return]
    except Exception:  # of any family's constructor
        return nn.Module()


def _lengths(model: nn.Module) -> dict[str, int]:
    """The lengths of all lists that lie in no other, by path."""
    found = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    return {path: n for path, n in found.items() if not any(path.startswith(f"{other}.") for other in found)}


def _parts(config: Any, path: Sequence[str] = ()) -> Iterator[tuple[Sequence[str], Any]]:
    """A config and those inside of it, and the names that lead to each."""
    yield path, config
    for name, value in vars(config).items():
        if hasattr(value, "model_type"):
            yield from _parts(value, (*path, name))
