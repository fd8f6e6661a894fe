"""Every check of a selector, sampler, weight update or distillation loss catches one that breaks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tinyfusion_core as tiny
from broken_recoveries import (
    BeginsElsewhere,
    BeyondTheEnd,
    Divided,
    DrawsWeights,
    ForgetsAfterAnException,
    ForgetsBuffers,
    ForgetsInTheEnd,
    Freezes,
    LeavesModules,
    StandsStillAfterwards,
    YieldsAPart,
)
from places import ROOT
from tinyfusion_core.errors import UserError
from tinyfusion_core.registry.registry import Plugin, Registry
from tinyfusion_core.samplers.constraints import Rules
from tinyfusion_core.samplers.grouped import Draw
from tinyfusion_core.testing import check_plugin, checked_of, name_of, parametrize_with_checks, run_check
from tinyfusion_core.testing.checks import KINDS


@dataclass(frozen=True, kw_only=True)
class First(tiny.Selector):
    """Keeps the first blocks: correct, and as small as a criterion gets."""

    keep: int

    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        return self.preview(task.blocks)

    def preview(self, blocks: Sequence[str]) -> tiny.Decision:
        return tiny.Decision(blocks=tuple(blocks), kept=tuple(range(self.keep)), method="First")


@dataclass(frozen=True)
class Chosen(First):
    """Has no number to be told; brings a small one of its own."""

    keep: int = 7

    @classmethod
    def tiny(cls) -> Chosen:
        return cls(keep=2)


@parametrize_with_checks([First, First(keep=3), Chosen])
def test_a_small_criterion(check) -> None:
    check()


class KeepsOneMore(First):
    def preview(self, blocks: Sequence[str]) -> tiny.Decision:
        return replace(super().preview(blocks), kept=tuple(range(self.keep + 1)))


class ForgetsProtected(tiny.FirstN):
    def compiled(self, blocks: Sequence[str]) -> Any:
        return replace(self, protect=()).compiled(blocks) if self.protect else super().compiled(blocks)


class AddsLists(tiny.FirstN):
    """Counts over all lists what it is told of each."""

    def compiled(self, blocks: Sequence[str]) -> Any:
        alike = isinstance(self.keep, dict)
        return replace(self, keep=sum(self.keep.values())).compiled(blocks) if alike else super().compiled(blocks)


class PreviewsMore(First):
    def preview(self, blocks: Sequence[str]) -> tiny.Decision:
        return replace(super().preview(blocks), kept=tuple(range(len(blocks))))

    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        return super().preview(task.blocks)


class AboutOtherBlocks(First):
    def preview(self, blocks: Sequence[str]) -> tiny.Decision:
        return super().preview([f"module.{path}" for path in blocks])


class TossesACoin(First):
    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        return replace(self.preview(task.blocks), kept=tuple(sorted(torch.randperm(8)[: self.keep].tolist())))


class Impatient(First):
    """Decides by something else than the seed, and draws from no generator."""

    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        seen.append(len(seen) % 2)
        return replace(self.preview(task.blocks), kept=tuple(range(seen[-1], self.keep + seen[-1])))


seen: list[int] = []


class Trains(First):
    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        with torch.no_grad():
            task.teacher.get_parameter("first.1.linear.weight").add_(1e-6)
        return self.preview(task.blocks)


class RunsInTrainingMode(First):
    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        task.teacher.train()
        task.loss.losses(task.teacher, task.train.__getitems__([0, 1]))
        return self.preview(task.blocks)


class Thaws(First):
    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        task.teacher.requires_grad_(True)
        return self.preview(task.blocks)


class LeavesAHook(First):
    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        task.teacher.get_submodule("second.0").register_forward_hook(lambda *_: None)
        return self.preview(task.blocks)


class ReplacesForward(First):
    def __call__(self, task: Any, trainer: Any, run: Any = None) -> tiny.Decision:
        task.teacher.forward = lambda x: x
        return self.preview(task.blocks)


class Altered(tiny.ExactK):
    """Draws as `change` says."""

    def change(self, draw: Draw, rng: Any) -> Draw:
        return draw

    def sample(self, num_rows: int, rng: Any) -> Draw:
        return self.change(super().sample(num_rows, rng), rng)


class Soft(Altered):
    def change(self, draw: Draw, rng: Any) -> Draw:
        return replace(draw, mask=draw.mask * 0.5)


class KeepsTheFirstToo(Altered):
    def change(self, draw: Draw, rng: Any) -> Draw:
        return replace(draw, mask=torch.cat([torch.ones_like(draw.mask[:, :1]), draw.mask[:, 1:]], 1))


class AllowsAnything(tiny.ExactK):
    def allows(self, kept: Sequence[int]) -> bool:
        return True


class IgnoresKeep(tiny.ExactK):
    def __init__(self, lists: Mapping[str, int], keep: int) -> None:
        super().__init__(lists, Rules(keep=keep - 1))


class DrawsForTheBatch(Altered):
    def change(self, draw: Draw, rng: Any) -> Draw:
        return replace(draw, mask=draw.mask[torch.randperm(len(draw.mask), generator=rng.batch("shuffled"))])


class DrawsGlobally(Altered):
    def change(self, draw: Draw, rng: Any) -> Draw:
        return replace(draw, mask=draw.mask[torch.randperm(len(draw.mask))])


class SaysMoreOfTheFirst(tiny.ExactK):
    def marginals(self) -> Tensor:
        return super().marginals() + torch.tensor([0.1, -0.05, -0.05, 0, 0, 0, 0, 0])


class SaysHalf(tiny.ExactK):
    def marginals(self) -> Tensor:
        return super().marginals() / 2


class LeastProbable(tiny.ExactK):
    def mode(self) -> list[int]:
        return list(super().best(1000)[-1])


class BestTwice(tiny.ExactK):
    def best(self, count: int) -> list[tuple[int, ...]]:
        return (super().best(1) + super().best(count))[:count]


class TooSure(Altered):
    def change(self, draw: Draw, rng: Any) -> Draw:
        return replace(draw, log_prob=draw.log_prob / 2)


class Bits(tiny.ExactK):
    def entropy(self) -> float:
        return super().entropy() / 0.6931


class Negative(tiny.ExactK):
    def entropy(self) -> float:
        return -super().entropy()


class Odds(tiny.ExactK):
    def confidence(self) -> list[float]:
        return [1 + p for p in super().confidence()]


class ForgetsABlock(tiny.ExactK):
    def choices(self) -> list[list[int]]:
        return [[0, 1, 2, 4, 5, 6, 7]]


class Detached(Altered):
    def change(self, draw: Draw, rng: Any) -> Draw:
        return Draw(draw.mask.detach(), draw.log_prob.detach())


class Explodes(tiny.ExactK):
    def surrogate(self, draw: Draw, loss: Tensor) -> Tensor:
        return (loss.mean() - loss.mean().detach()).sqrt()


class Sharpens(tiny.ExactK):
    """Each call of `anneal` goes on from the one before."""

    def anneal(self, progress: float) -> dict[str, float]:
        with torch.no_grad():
            self.logits.mul_(1 + progress)
        return super().anneal(progress)


class Infinite(tiny.ExactK):
    def anneal(self, progress: float) -> dict[str, float]:
        return {"temperature": float("inf") if progress == 1 else 1.0}


BROKEN: list[tuple[str, type, str]] = [
    ("budget", KeepsOneMore, r"KeepsOneMore\(keep=5\) keeps 6 blocks"),
    ("budget", ForgetsProtected, r"ForgetsProtected\(keep=5, protect=\[3, 4, 5, 6, 7\]\) keeps the blocks \[0, 1"),
    ("budget", AddsLists, r"AddsLists\(keep=\{'first': 3, 'second': 2\}\) keeps the blocks \[0, 1, 2, 3, 4\]"),
    ("preview", PreviewsMore, r"PreviewsMore\.preview keeps 8 blocks, the decision 5"),
    ("preview", AboutOtherBlocks, r"AboutOtherBlocks decides about \['module\.first\.0'"),
    ("same_choice", TossesACoin, "TossesACoin draws from a global generator"),
    ("same_choice", Impatient, "Impatient decides otherwise the second time"),
    ("network_values", Trains, r"Trains changes the network: \['first\.1\.linear\.weight'\]"),
    ("network_values", RunsInTrainingMode, r"changes the network: \['first\.0\.centre\.mean'"),
    ("network_modes", RunsInTrainingMode, "changes the network: training flag of "),
    ("network_modes", Thaws, r"requires_grad of last\.bias"),
    ("network_modes", LeavesAHook, r"hooks of second\.0"),
    ("network_modes", ReplacesForward, "forward of "),
    ("masks", Soft, "other numbers than 0 and 1"),
    ("masks", KeepsTheFirstToo, "KeepsTheFirstToo draws the mask .* breaks its budget"),
    ("masks", IgnoresKeep, "IgnoresKeep draws the mask .* breaks its budget"),
    ("masks", AllowsAnything, r"num_masks is 56, allows allows 256"),
    ("rows", DrawsForTheBatch, "draws a row otherwise in another batch"),
    ("rows", DrawsGlobally, "draws from a global generator"),
    ("marginals", SaysMoreOfTheFirst, r"says 0\.\d+ of block 0, which 0\.\d+ of the draws keep"),
    ("marginals", SaysHalf, r"sums to 2\.5, 5 blocks are kept"),
    ("mode", LeastProbable, r"LeastProbable\.mode keeps .*, best\(1\)"),
    ("mode", BestTwice, "best gives 56 different masks of 56 in 57"),
    ("log_prob", TooSure, "makes the probabilities of .* masks sum to"),
    ("entropy", Bits, r"Bits\.entropy is 5\."),
    ("entropy", Negative, r"Negative\.entropy is -4\."),
    ("confidence", Odds, r"Odds\.confidence is no probability"),
    ("confidence", ForgetsABlock, r"choices are about the blocks \[0, 1, 2, 4, 5, 6, 7\]"),
    ("gradient", Detached, "no gradient to the logits"),
    ("gradient", Explodes, "gradient that is not finite"),
    ("anneal", Sharpens, r"anneal\(0\) does not undo anneal\(1\)"),
    ("anneal", Infinite, r"anneal gives \{.*inf"),
    ("undone", ForgetsBuffers, r"changes the network, after training: \['first\.0\.centre\.mean'"),
    ("undone", ForgetsAfterAnException, r"changes the network, after an exception"),
    ("undone", LeavesModules, r"after training: hooks of first\.0"),
    ("stays", ForgetsInTheEnd, "ForgetsInTheEnd does not keep what it has learned"),
    ("stays", StandsStillAfterwards, r"changed, after merging: requires_grad of first\.0"),
    ("updated_weights", YieldsAPart, "yields other weights than those that require a gradient"),
    ("updated_weights", BeginsElsewhere, "before it has learned anything"),
    ("matched_blocks", BeyondTheEnd, "matches 7 of 4 blocks with 7 of 8"),
    ("student_learns", Divided, "the objective is not finite"),
    ("values_alone", Freezes, r"changes more of the student than values: requires_grad of first\.0"),
    ("start_repeats", DrawsWeights, "draws from the global generators"),
]
CHECKS = {name_of(check): check for kind in KINDS.values() for check in kind.checks}


@pytest.mark.parametrize(("name", "thing", "message"), BROKEN, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_defect_is_caught(name: str, thing: type, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run_check(CHECKS[name], thing)


def test_every_check_has_a_defect_and_says_what_it_looks_at() -> None:
    assert {name for name, _, _ in BROKEN} == set(CHECKS)
    assert len(CHECKS) == sum(len(kind.checks) for kind in KINDS.values())
    page = (ROOT / "docs" / "writing-a-plugin.md").read_text()
    for name, check in CHECKS.items():
        meaning = " ".join((check.__doc__ or "").split())
        assert meaning.endswith(".")
        assert f"| `{name}` | {meaning} |" in page


class NeedsMore(First):
    def __init__(self, decision: str) -> None:
        raise AssertionError("not reached")


def test_what_cannot_be_made_or_checked() -> None:
    with pytest.raises(UserError, match="NeedsMore cannot be made .*'decision'; give it a classmethod `tiny`"):
        run_check(CHECKS["budget"], NeedsMore)
    with pytest.raises(UserError, match="over 16 blocks; check one over 12"):
        run_check(CHECKS["mode"], tiny.ExactK({"blocks": 16}, Rules(keep=4)))
    with pytest.raises(UserError, match=r"Path cannot be checked: .* give a backbone with its loss"):
        parametrize_with_checks([Path])


def test_a_plugin_of_a_criterion_and_a_sampler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    classes: dict[str, dict[str, type[Any]]] = {
        **{kind: {} for kind in ("backbone", "loss")},
        "selector": {"First": First, "Trains": Trains},
        "sampler": {"IgnoresKeep": IgnoresKeep},
    }
    brings = (("sampler", "IgnoresKeep"), ("selector", "First"))
    found = Registry((Plugin("mine", "mine", "mine", "1.0", brings),), classes)
    assert checked_of("mine", found) == [First, IgnoresKeep]
    monkeypatch.setattr("tinyfusion_core.testing.registry", lambda: found)
    results = list(check_plugin("mine"))
    assert [result.check for result in results if result.subject == "First"] == list(CHECKS)[:5]
    failed = {(result.subject, result.check): result.error for result in results if result.error}
    assert failed[("IgnoresKeep", "masks")].startswith("IgnoresKeep draws the mask")
    assert {subject for subject, _ in failed} == {"IgnoresKeep"}
