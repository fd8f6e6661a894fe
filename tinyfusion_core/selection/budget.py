"""Cost budgets of the whole network as in recipes: `0.5x`, `{parameters: 400M}`, `{latency_ms: 20}`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

from ..errors import UserError, nearest, require
from ..parsing.records import read_as
from ..parsing.settings import LARGEST
from ..protocols.task import Task
from ..runtime.files import digest, write_json
from ..samplers.constraints import Rules
from ..training.trainer import Trainer
from .costs import BATCH_SIZE, CostKind, NetworkCosts, network_costs

FILE = "costs.json"
"""File in a run folder with the measured costs, because a time cannot be measured twice."""
_WAYS = "0.5x, {parameters: 400M}, {flops: 0.5x} or {latency_ms: 20}"
_SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_RESOLUTION = 100
"""Cost of the most expensive block where costs are rounded."""
_MOST_SUMS = 20_000
"""Limit of exact sums of costs; with more different sums, costs are rounded to keep the automaton small."""


@dataclass(frozen=True)
class _Unit:
    """A unit of costs in recipes.

    Attributes:
        kind: what is measured.
        name: name of the unit in sentences.
        scale: measured units per unit.
    """

    kind: CostKind
    name: str
    scale: float = 1.0


_UNITS = {
    "parameters": _Unit("parameters", "parameters"),
    "flops": _Unit("flops", "FLOPs of a sample"),
    "latency_ms": _Unit("latency_ns", "ms", 1e6),
}


@dataclass(frozen=True)
class CostBudget:
    """The largest cost of the pruned network, including everything outside the blocks.

    Attributes:
        said: the unit: parameters, flops or latency_ms.
        amount: the cost in that unit, or as a fraction of the cost of the unpruned network.
        relative: whether it is a fraction.
        batch_size: samples per timed pass; only for latency.
    """

    said: str
    amount: float
    relative: bool
    batch_size: int = BATCH_SIZE

    @property
    def name(self) -> str:
        """Name of the costs to measure; budgets of the same name need the same costs."""
        return f"{self.said}, batch {self.batch_size}" if self.said == "latency_ms" else self.said

    def __str__(self) -> str:
        """Format the budget as in a recipe."""
        amount = f"{self.amount:g}x" if self.relative else _amount(self.amount)
        size = f", batch_size: {self.batch_size}" if self.batch_size != BATCH_SIZE else ""
        return f"{{{self.said}: {amount}{size}}}"

    def rules(self, costs: NetworkCosts, given: Rules, owner: str) -> Rules:
        """Return the rules with costs and budget in whole numbers; every mask that obeys them meets the budget.

        Args:
            costs: costs of the network.
            given: the other rules.
            owner: name of the section with the budget, for messages.

        Raises:
            UserError: the budget pays for no block, or for the whole network; names the key and what to give.
        """
        key, target, unit = f"{owner}.budget", self._target(costs), _UNITS[self.said].name
        if not any(costs.blocks):
            raise UserError(f"{key}: {unit} of the blocks cannot be counted; give {_WAYS}")
        needed = sum(costs.blocks[i] for i in given.protect if 0 <= i < len(costs.blocks))
        least = costs.outside + (needed or min(cost for cost in costs.blocks if cost))
        numbers, budget = _whole(costs.blocks, math.floor(target - costs.outside))
        if target < least or budget < min(number for number in numbers if number):
            enough = self._rounded_up(least, costs)
            raise UserError(
                f"{key}: {self._text(target)} {unit} are too few: {self._text(costs.outside)} lie outside of the "
                f"blocks, and with those that must stay it is {self._text(least)}; give {enough}"
            )
        if target >= costs.total:
            raise UserError(
                f"{key}: {self._text(target)} {unit} pay for the whole network, which has {self._text(costs.total)}; "
                "give less, as 0.5x"
            )
        return replace(given, costs=numbers, budget=budget)

    def describe(self, costs: NetworkCosts) -> str:
        """Describe the budget of a network with these costs, in a sentence."""
        unit, target = _UNITS[self.said].name, self._target(costs)
        left = f"{self._text(target - costs.outside)} are left for them"
        return (
            f"at most {self._text(target)} of {self._text(costs.total)} {unit} ({target / costs.total:.3g}x); "
            f"{self._text(costs.outside)} lie outside of the blocks, {left}"
        )

    def _target(self, costs: NetworkCosts) -> float:
        return self.amount * costs.total if self.relative else self.amount * _UNITS[self.said].scale

    def _text(self, cost: float) -> str:
        return _amount(cost / _UNITS[self.said].scale)

    def _rounded_up(self, least: float, costs: NetworkCosts) -> CostBudget:
        """The smallest budget in few digits that pays for this cost."""
        value = least / (costs.total if self.relative else _UNITS[self.said].scale)
        step = 1e-3 if self.relative else 10.0 ** (math.floor(math.log10(value)) - 3)
        return replace(self, amount=math.ceil(value / step) * step)


def parse_budget(value: Any, owner: str) -> CostBudget:
    """Parse and check a budget as in YAML.

    Args:
        value: `0.5x`, or a mapping from one unit to a fraction or a number; `{latency_ms: 20, batch_size: 8}`.
        owner: name of the section with the budget, for messages.

    Raises:
        UserError: it is not a budget.
    """
    key = f"{owner}.budget"
    given = {"parameters": value} if isinstance(value, str) else value
    if not isinstance(given, Mapping):
        raise UserError(f"{key} is {value!r}; give {_WAYS}")
    for name in given:
        if name not in (*_UNITS, "batch_size"):
            raise UserError(f"{key}.{name}: unknown key{nearest(str(name), (*_UNITS, 'batch_size'))}")
    said = [name for name in given if name in _UNITS]
    if len(said) != 1 or ("batch_size" in given and said != ["latency_ms"]):
        raise UserError(f"{key} is {dict(given)}; give one of {_WAYS}; batch_size goes with latency_ms")
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*([KMGBTx]?)\s*", str(given[said[0]]))
    amount = float(found[1]) * _SUFFIXES.get(found[2], 1.0) if found else 0.0
    relative = found is not None and found[2] == "x"
    expected = f"a number above 0, with K, M, G or T if it is large, or a share below 1x: {_WAYS}"
    require(amount > 0 and not (relative and amount >= 1), f"{key}.{said[0]}", given[said[0]], expected)
    size = given.get("batch_size", BATCH_SIZE)
    whole = str(size).removesuffix(".0").isdigit() and 1 <= float(size) <= LARGEST
    require(whole, f"{key}.batch_size", size, f"a whole number from 1 to {LARGEST:,}")
    return CostBudget(said[0], amount, relative, int(float(size)))


def check_bound(budget: object, owner: str) -> None:
    """Check that a selector has no cost budget left, before it is used for what needs the costs of a network.

    Raises:
        UserError: it has one.
    """
    if budget is not None:
        raise UserError(
            f"{owner}.budget: depends on what the network costs; measure that and use selector.bound(costs)"
        )


class _Stored(TypedDict):
    network: str
    costs: dict[str, NetworkCosts]


def measure(
    budgets: Iterable[CostBudget], task: Task, trainer: Trainer, folder: Path | None = None
) -> dict[str, NetworkCosts]:
    """Return the costs of a network that these budgets need, by name of the budget.

    Args:
        budgets: budgets for this network.
        task: the network, which may be on the meta device, and its objective.
        trainer: device and precision.
        folder: where `save_costs` may have kept earlier costs, which are used again.
    """
    path = None if folder is None else folder / FILE
    known = None if path is None or not path.exists() else read_as(path, _Stored, "delete it to measure again")
    stored = known["costs"] if known is not None and known["network"] == _identity(task, trainer) else {}
    found: dict[str, NetworkCosts] = {}
    for budget in budgets:
        if budget.name in stored:
            found[budget.name] = stored[budget.name]
        elif budget.name not in found:
            found[budget.name] = network_costs(_UNITS[budget.said].kind, task, trainer, budget.batch_size)
    return found


def save_costs(costs: Mapping[str, NetworkCosts], task: Task, trainer: Trainer, folder: Path) -> None:
    """Write costs, by name of the budget, to a folder; `latency_ms` in nanoseconds."""
    if costs:
        made = {name: asdict(found) for name, found in costs.items()}
        write_json(folder / FILE, {"format_version": 1, "network": _identity(task, trainer), "costs": made})


def _identity(task: Task, trainer: Trainer) -> str:
    """A hash of what distinguishes networks and ways to run them."""
    accelerator = trainer.accelerator
    parameters = [(name, list(p.shape)) for name, p in task.teacher.named_parameters()]
    inputs = {name: list(t.shape) for name, t in task.backbone.example(1).items()}
    return digest([parameters, inputs, accelerator.device.type, accelerator.mixed_precision])


def _whole(costs: tuple[int, ...], room: int) -> tuple[tuple[int, ...], int]:
    """Costs and budget as smaller numbers if there are too many different sums: costs rounded up, the budget down."""
    if math.prod(1 + number for number in Counter(costs).values()) <= _MOST_SUMS:
        return costs, room
    most = max(costs)
    return tuple(-(-cost * _RESOLUTION // most) for cost in costs), room * _RESOLUTION // most


def _amount(amount: float) -> str:
    """Four digits of a number, with K, M, G or T if it is large."""
    for suffix in ("T", "G", "M", "K"):
        if abs(amount) >= _SUFFIXES[suffix]:
            return f"{amount / _SUFFIXES[suffix]:.4g}{suffix}"
    return f"{amount:.4g}"
