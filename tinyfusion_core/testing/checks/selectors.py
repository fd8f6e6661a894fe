"""Checks of a selector: it obeys its budget, depends only on the seed, and does not change the network.

A selector is used through its two methods; the meaning of its options `keep`, `pattern` and `protect` is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

from ...protocols.task import Task
from ...pruning.decision import Decision
from ...training.trainer import Trainer
from ..assertions import expect, expect_same, global_states, seed_everything
from ..small_network import LISTS, NUM_KEPT, changes, modes_of, small_task, small_trainer, values_of
from ..subject import made


class Selector(Protocol):
    """The part of a selector that the checks use."""

    def __call__(self, task: Task, trainer: Trainer) -> Decision:
        """Return a decision about the task's network."""
        ...

    def preview(self, blocks: Sequence[str]) -> Decision:
        """Return a possible decision about these blocks."""
        ...

    def keeps(self, blocks: Sequence[str]) -> object:
        """Return what is kept of these blocks; None if that is not known beforehand."""
        ...


Obeyed = Callable[[frozenset[int]], bool]

BUDGETS: tuple[tuple[Mapping[str, Any], Obeyed], ...] = (
    ({"keep": 5}, lambda kept: len(kept) == 5),
    ({"keep": {"first": 3, "second": 2}}, lambda kept: (_within(kept, 0, 4), _within(kept, 4, 8)) == (3, 2)),
    ({"pattern": [1, 2]}, lambda kept: all(_within(kept, i, i + 2) == 1 for i in range(0, 8, 2))),
    ({"keep": 5, "protect": [0, 1, 2, 3, 4]}, lambda kept: kept == {0, 1, 2, 3, 4}),
    ({"keep": 5, "protect": [3, 4, 5, 6, 7]}, lambda kept: kept == {3, 4, 5, 6, 7}),
)
"""Options of a selector, and whether a decision about the network's eight blocks obeys them."""


def _within(kept: frozenset[int], first: int, end: int) -> int:
    return len(kept & set(range(first, end)))


@dataclass(frozen=True)
class SelectorSubject:
    """A selector to check.

    Args:
        selector: an instance.
        num_kept: how many blocks it should keep; None if unknown.
    """

    selector: Selector
    num_kept: int | None

    @classmethod
    def of(cls, thing: Any) -> SelectorSubject:
        """Return the subject; of a class, `tiny()`, or an instance that keeps five blocks of eight."""
        selector, told = made(thing, keep=NUM_KEPT)
        return cls(selector, NUM_KEPT if told else None)

    @property
    def name(self) -> str:
        """Name of its class, for messages."""
        return type(self.selector).__name__

    def decide(self) -> Decision:
        """Return its decision about a new network."""
        return self.selector(small_task(), small_trainer())

    def with_budgets(self) -> Iterator[tuple[Selector, Mapping[str, Any], Obeyed]]:
        """Yield the selector under all budgets that it accepts."""
        known: set[str] = {f.name for f in fields(self.selector)} if is_dataclass(self.selector) else set()
        for options, obeyed in BUDGETS:
            if options.keys() <= known:
                cleared: dict[str, Any] = {name: None for name in ("keep", "pattern") if name in known}
                with suppress(Exception):  # it refuses what it cannot do; of what type an option is, recipes check
                    selector: Selector = replace(self.selector, **{**cleared, **options})  # type: ignore[type-var]
                    selector.preview(small_task().blocks)
                    yield selector, options, obeyed


def check_budget(subject: SelectorSubject) -> None:
    """As many blocks are kept as `keep` or `pattern` say, in total, per list or group; `protect` is obeyed."""
    kept, wanted = subject.decide().kept, subject.num_kept
    expect(wanted in (None, len(kept)), f"{subject.name}(keep={wanted}) keeps {len(kept)} blocks: {list(kept)}")
    for selector, options, obeyed in subject.with_budgets():
        told = ", ".join(f"{name}={value}" for name, value in options.items())
        found = selector(small_task(), small_trainer()).kept
        expect(obeyed(frozenset(found)), f"{subject.name}({told}) keeps the blocks {list(found)} of {LISTS}")


def check_preview(subject: SelectorSubject) -> None:
    """Decision and preview are about the network's blocks, keep equally many and have the same groups."""
    blocks = small_task().blocks
    decision, preview = subject.decide(), subject.selector.preview(blocks)
    for method, found in (("", decision), (".preview", preview)):
        expect(
            list(found.blocks) == blocks,
            f"{subject.name}{method} decides about {list(found.blocks)[:3]}..., the network has {blocks[:3]}...",
        )
    name = f"{subject.name}.preview"
    kept, promised = len(decision.kept), len(preview.kept)  # where nothing is promised, a preview keeps the most
    expect(
        kept <= promised if subject.selector.keeps(blocks) is None else kept == promised,
        f"{name} keeps {len(preview.kept)} blocks, the decision {len(decision.kept)}",
    )
    groups = [(found.pattern, found.choices) for found in (preview, decision)]
    expect(groups[0] == groups[1], f"{name} has the pattern and choices {groups[0]}, the decision {groups[1]}")


def check_same_choice(subject: SelectorSubject) -> None:
    """The same seed gives the same decision, whatever the global generators, which are not changed."""
    found = []
    for seed in (1, 2):
        seed_everything(seed)
        states = global_states()
        found.append(subject.decide())
        expect(
            states == global_states(), f"{subject.name} draws from a global generator; draw from `generator` or `Rng`"
        )
    first, second = ((d.kept, d.marginals, d.confidences) for d in found)
    kept = " and ".join(str(list(d.kept)) for d in found)
    expect(first == second, f"{subject.name} decides otherwise the second time, with the same seed: it keeps {kept}")


def check_network_values(subject: SelectorSubject) -> None:
    """Parameters and buffers of the network are unchanged, bit for bit."""
    task = small_task()
    before = values_of(task.teacher)
    subject.selector(task, small_trainer())
    expect_same(before, values_of(task.teacher), f"{subject.name} changes the network")


def check_network_modes(subject: SelectorSubject) -> None:
    """Modules, training flags, hooks, `forward`, `requires_grad` and gradients are unchanged."""
    task = small_task()
    before = modes_of(task.teacher)
    subject.selector(task, small_trainer())
    changed = changes(before, modes_of(task.teacher))
    expect(not changed, f"{subject.name} changes the network: {', '.join(changed[:3])}")


SELECTOR_CHECKS = (check_budget, check_preview, check_same_choice, check_network_values, check_network_modes)
