"""Which masks a transformers config can express, found out before a search: rules for its constraints."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from tinyfusion_core.errors import UserError, first_line
from tinyfusion_llm.layers.building import construct_as
from tinyfusion_llm.layers.finding import num_fed, text_config
from tinyfusion_llm.layers.inputs import short_inputs
from tinyfusion_llm.layers.shortening import corrected, described
from tinyfusion_llm.layers.stacks import Stack, find_stacks
from tinyfusion_llm.pretrained.reading import as_json


def limits(model: nn.Module) -> Mapping[str, Sequence[Any]]:
    """Return the rules that a mask must obey for the config to express the remaining layers, as constraints name them.

    The layers of most families are alike, or a list in the config tells them apart; then there are none. Where layers
    follow from their positions, those that stay must repeat the `period`; or some must stay (`protect`), such as a last
    layer that has something of its own. Found by shortening the network on the meta device, not by names.

    Args:
        model: the whole network; only its class and its config are looked at.

    Raises:
        UserError: it cannot express any choice but the whole network.
    """
    kind: Any = type(model)
    return _limits(kind, json.dumps(as_json(model.config), sort_keys=True))


@lru_cache(maxsize=8)
def _limits(kind: Any, config: str) -> Mapping[str, Sequence[Any]]:
    model = construct_as(kind, json.loads(config))
    stacks = find_stacks(model)
    if len(stacks) == 1:
        return _rules(model, stacks[0])
    found: list[int] = []
    first, problem = 0, None
    for stack in stacks:
        depth = stack.depth(model)
        try:
            rules = _rules(model, stack)
        except UserError as e:
            rules, problem = {"protect": range(depth)}, e
        # A period is one of the whole network, so of two lists one that has some stays as it is.
        found += [first + i for i in (range(depth) if "period" in rules else rules.get("protect", ()))]
        first += depth
    if len(found) < first:
        return {"protect": found} if found else {}
    raise problem or UserError(
        f"backbone: no layer of a '{model.config.model_type}' can go: what the layers of encoder and decoder are "
        "follows from their positions, in periods, which are known to masks of one list alone"
    )


def _rules(model: nn.Module, stack: Stack) -> Mapping[str, Sequence[Any]]:
    """The rules for the layers of one list. Raises UserError if none of them can go."""
    problem = partial(_problem, model, stack)
    kinds = _kinds(model.get_submodule(stack.path).children())
    alone, together = _without(kinds)
    if len(set(kinds)) == 1 and not problem(alone[0]):
        return {}
    fixed = sorted({*range(num_fed(model)), *(i for i, kept in alone.items() if problem(kept))})
    if not fixed and not any(map(problem, together)):
        return {}
    depth, (period, repeated) = len(kinds), _repeated(kinds)
    # Layers may stay for the sake of later ones that read from them, of which then the last stays too.
    staying = [fixed, *([[*fixed, depth - 1]] if fixed[-1] < depth - 1 else [])] if fixed else []
    tried: list[tuple[Mapping[str, Sequence[Any]], list[list[int]]]]
    tried = [({"protect": some}, _beside(some, depth)) for some in staying]
    # Where no two layers are alike, the first ones may be a network, which says more than that all but the last stay.
    unlike = len(set(kinds)) == depth and len(find_stacks(model)) == 1  # of two lists, one with a period stays whole
    tried.insert(0 if unlike else len(tried), ({"period": period}, repeated))
    for rules, masks in tried:
        if not (found := next(filter(None, map(problem, masks)), "")):
            return rules
    raise UserError(
        f"backbone: no layer of a '{text_config(model).model_type}' can go, since its config could not express the "
        f"others: {found}"
    )


def _without(kinds: Sequence[str]) -> tuple[dict[int, list[int]], list[list[int]]]:
    """Masks to try: without one layer, by its index, the first and last of each kind; and without many."""
    depth, some = len(kinds), sorted(set(kinds))[:_KINDS]
    ends = {i for kind in some for i in (kinds.index(kind), depth - 1 - kinds[::-1].index(kind))}
    alone = {i: [j for j in range(depth) if j != i] for i in sorted({0, depth - 1} | ends)}
    apart = [[i for i in range(depth) if kinds[i] != kind] for kind in some]
    parts = (range(0, depth, 2), range(1, depth, 2), range(depth // 3, depth), range(depth - depth // 3))
    return alone, [*map(list, parts), *filter(None, apart)]


def _beside(fixed: Sequence[int], depth: int) -> list[list[int]]:
    """Masks to try that keep some layers, and of the others one, half or nearly all."""
    free = [i for i in range(depth) if i not in fixed]
    parts = (free[:1], free[-1:], free[::2], free[1::2], free[:-1], free[1:])
    return [sorted({*fixed, *part}) for part in parts if part]


def _repeated(kinds: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """The shortest period of the kinds, which may be all of them, and masks that repeat it, to try."""
    depth = len(kinds)
    period = next(n for n in range(1, depth + 1) if kinds[n:] == kinds[:-n] or n == depth)
    masks = (range(depth - 1), range(max(1, depth - 2)), range(period, depth))
    return list(kinds[:period]), [list(mask) for mask in masks if mask]


_KINDS = 8
"""Kinds of layers that are looked at one by one; more are rare, and every look takes a second of a large network."""


def _problem(model: nn.Module, stack: Stack, kept: Sequence[int]) -> str:
    """Why the layers that are kept are no network of the config; empty if they are."""
    shorter = copy.deepcopy(model)
    layers: Any = shorter.get_submodule(stack.path)
    for i in reversed([i for i in range(len(layers)) if i not in set(kept)]):
        del layers[i]
    if problem := corrected(shorter, {stack: kept}):
        return problem
    failure = _failure(shorter)
    return "" if not failure or _failure(model) else f"it does not run ({failure})"


def _failure(model: nn.Module) -> str:
    """Why a network on the meta device does not run; also empty if that device lacks one of its operations."""
    try:
        with torch.random.fork_rng(), torch.no_grad():
            model.eval()(**short_inputs(model), use_cache=False)
    except (LookupError, TypeError, ValueError) as e:
        return f"{type(e).__name__}: {first_line(e)}"
    except (NotImplementedError, RuntimeError, AssertionError):
        pass
    return ""


def _kinds(layers: Any) -> list[str]:
    """A name for what each layer is, the same for those that are alike: k0, k1 and so on as they appear."""
    found = [(described(layer), [(name, tuple(t.shape)) for name, t in layer.state_dict().items()]) for layer in layers]
    kinds: list[Any] = []
    for entry in found:
        if entry not in kinds:
            kinds.append(entry)
    return [f"k{kinds.index(entry)}" for entry in found]
