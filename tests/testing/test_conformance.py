"""Every built-in plugin passes the conformance kit, and every check of the kit catches a plugin that breaks it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from places import TESTS
from tinyfusion_core.cli import main
from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.registry import registry
from tinyfusion_core.testing import name_of, pairs_of, parametrize_with_checks, run_check
from tinyfusion_core.testing.checks import (
    CHECKS,
    Subject,
    check_light_import,
    check_loss_per_sample,
    check_sparse_is_dense,
)
from toys import Chain, Match, Planted

pytestmark = pytest.mark.numerics

WORKING = Planted(scales=(1, 1, 1, 1))
PLUGINS = [plugin.name for plugin in registry().plugins if {"backbone", "loss"} & {kind for kind, _ in plugin.brings}]


@parametrize_with_checks([pair for name in PLUGINS for pair in pairs_of(name, registry())])
def test_built_in_plugins(check) -> None:
    check()


@parametrize_with_checks([(WORKING, Match())])
def test_a_small_one_of_ones_own(check) -> None:
    check()


def test_every_built_in_backbone_and_loss_is_checked() -> None:
    checked = {part for name in PLUGINS for part in pairs_of(name, registry())}
    parts = {part for pair in checked for part in (pair if isinstance(pair, tuple) else (pair,))}
    classes = registry().classes
    assert parts == {*classes["backbone"].values(), *classes["loss"].values()}


# One plugin for every check, broken where that check looks.


@dataclass(frozen=True)
class Small(Planted):
    scales: tuple[float, ...] = (1, 1, 1, 1)


@dataclass(frozen=True)
class Unseeded(Small):
    def build(self) -> nn.Module:
        return Chain(self.width, self.scales).eval()


@dataclass(frozen=True)
class Backwards(Small):
    def blocks(self, model: nn.Module) -> Sequence[str]:
        return [f"blocks.{i}" for i in reversed(range(len(model.blocks)))]


class Widens(nn.Module):
    """Its output only looks like its input to `+`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Narrows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@dataclass(frozen=True)
class ChangesTheStream(Small):
    def build(self) -> nn.Module:
        model = super().build()
        model.blocks[1], model.blocks[2] = Widens(), Narrows()
        return model


class Counting(nn.Module):
    """Gives something else every time that it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.linear = 0, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls * torch.tanh(self.linear(x))


def with_block(block: nn.Module, backbone: Planted) -> nn.Module:
    model = Planted.build(backbone)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        for p in block.parameters():
            nn.init.normal_(p)
    model.blocks[1] = block
    return model.eval()


@dataclass(frozen=True)
class CountsCalls(Small):
    def build(self) -> nn.Module:
        return with_block(Counting(), self)


class Remembers(Chain):
    """Runs its blocks by a number in its config that pruning does not correct."""

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x) * (1 + i / self.depth)
        return x


@dataclass(frozen=True)
class ForgetsTheIndices(Small):
    """Its blocks are scaled by where they stand, and stand elsewhere after pruning."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = Remembers(self.width, self.scales)
        model.depth = len(self.scales)
        return model.eval()


class Recounts(nn.Module):
    """Has another buffer after every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + torch.tanh(self.linear(x))


@dataclass(frozen=True)
class HasABufferThatCounts(Small):
    def build(self) -> nn.Module:
        return with_block(Recounts(), self)


class Detached(nn.Module):
    """Its weights are trained when the batch is whole, and are not when it is one row."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x).detach() if len(x) == 1 else self.linear(x))


@dataclass(frozen=True)
class DetachesSmallBatches(Small):
    def build(self) -> nn.Module:
        return with_block(Detached(), self)


class Mixes(nn.Module):
    """A sample's output depends on the others of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x - x.mean(0)))


@dataclass(frozen=True)
class MixesSamples(Small):
    def build(self) -> nn.Module:
        return with_block(Mixes(), self)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.dropout(self.linear(x), training=True)


@dataclass(frozen=True)
class AlwaysDrops(Small):
    def build(self) -> nn.Module:
        return with_block(Dropping(), self)


@dataclass(frozen=True)
class ForgetsItsConfig(Small):
    """Rebuilds other blocks than it has."""

    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        found = super().config(model)
        return found if model is None else {**found, "scales": [2.0] * len(model.blocks)}


@dataclass(frozen=True)
class NeedsValues(Small):
    """Reads a number of a tensor while it is being made, which the meta device has not."""

    @classmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        scales = [float(s) for s in torch.tensor(config["scales"])]
        return Chain(config["width"], scales)


class InPlace(Chain):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            x.mul_(0.5)
        return x


@dataclass(frozen=True)
class GoesOnInPlace(Small):
    def build(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            return InPlace(self.width, self.scales).eval()


class NotADataclass(LossAdapter):
    noise, explode_at = 0.1, ()
    prepare, predict, loss, distance = Match.prepare, Match.predict, Match.loss, Match.distance


class Means(Match):
    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return super().loss(prediction, inputs).mean()


class DrawsGlobally(Match):
    def prepare(self, batch: Mapping[str, Tensor], rng: Any) -> dict[str, Tensor]:
        return {name: x + 0.1 * torch.randn_like(x) for name, x in super().prepare(batch, rng).items()}


class DrawsWhilePredicting(Match):
    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return model(inputs["x"] + 0.1 * torch.randn_like(inputs["x"]))


BROKEN: dict[str, tuple[Backbone, LossAdapter, str]] = {
    "tiny": (Unseeded(), Match(), "gives other weights each time"),
    "blocks": (Backwards(), Match(), "in the order of execution"),
    "streams": (ChangesTheStream(), Match(), r"block 'blocks\.1'.*cannot be skipped"),
    "all_ones_is_plain": (CountsCalls(), Match(), "under a mask of ones"),
    "hard_gated_is_pruned": (ForgetsTheIndices(), Match(), "predicts otherwise than one that skips them"),
    "state_dict_untouched": (HasABufferThatCounts(), Match(), r"changes the state dict: \['blocks\.1\.calls'\]"),
    "nobody_keeps_a_block": (DetachesSmallBatches(), Match(), r"block 'blocks\.1', which nobody keeps"),
    "every_block_learns": (Planted(scales=(1, 0, 1, 1)), Match(), r"block 'blocks\.1'"),
    "sparse_is_dense": (MixesSamples(), Match(), "dense formula"),
    "loss_per_sample": (Small(), Means(), r"Means\.loss returns the shape \(\) for 5 samples"),
    "prepare": (Small(), DrawsGlobally(), r"DrawsGlobally\.prepare draws from a global generator"),
    "same_inputs": (Small(), DrawsWhilePredicting(), "gives teacher and student different inputs"),
    "predict_deterministic": (AlwaysDrops(), Match(), "something else the second time"),
    "save_and_load": (ForgetsItsConfig(), Match(), "what is loaded predicts otherwise"),
    "meta_device": (NeedsValues(), Match(), "meta tensors"),
    "taps": (GoesOnInPlace(), Match(), "changes the output of .* in place"),
    "copies": (Small(), NotADataclass(), "NotADataclass is no frozen dataclass"),
}


@pytest.mark.parametrize("name", [name_of(check) for check in CHECKS if name_of(check) != "light_import"])
def test_a_broken_plugin_is_caught(name: str) -> None:
    (check,) = (check for check in CHECKS if name_of(check) == name)
    backbone, loss, message = BROKEN[name]
    with pytest.raises((AssertionError, UserError, RuntimeError), match=message):
        run_check(check, (backbone, loss))


# Numbers that cancel: networks so much alike that rounding is a large share of what lies between them.


@dataclass(frozen=True)
class Divergence(Match):
    """Cross-entropy of the classes; KL(teacher | student)."""

    def loss(self, prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(prediction, inputs["target"].argmax(1), reduction="none")

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        ours, theirs = student.log_softmax(1), teacher.log_softmax(1)
        return nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


class InSinglePrecision(Divergence):
    """Cannot be run in float64."""

    def predict(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        return super().predict(model, inputs) @ torch.eye(8)


class SinglePrecisionInside(Divergence):
    """Can be, but subtracts in float32."""

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return super().distance(student.float(), teacher.float(), inputs)


class LeansOnItsBatch(Divergence):
    """A hundredth of what is already small comes from the other samples."""

    def distance(self, student: Tensor, teacher: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        found = super().distance(student, teacher, inputs)
        return found + 0.01 * found.mean()


ALIKE = Small(scales=(1, 1e-3, 1, 1e-3))


@pytest.mark.parametrize(
    "loss", [Divergence(), InSinglePrecision(), SinglePrecisionInside()], ids=lambda x: type(x).__name__
)
def test_a_distance_that_cancels_passes(loss: Divergence) -> None:
    subject = Subject(ALIKE, loss)
    inputs = subject.inputs()
    with torch.no_grad():
        theirs, ours = (loss.predict(m, inputs) for m in (subject.network(), subject.pruned(subject.every_other())))
        assert loss.distance(ours, theirs, inputs).max() < 1e-6 * loss.loss(theirs, inputs).max()
    run_check(check_loss_per_sample, (ALIKE, loss))
    run_check(check_sparse_is_dense, (ALIKE, loss))


def test_a_distance_that_cancels_and_leans_on_its_batch_is_caught() -> None:
    with pytest.raises(AssertionError, match=r"LeansOnItsBatch\.distance of a sample depends on the others"):
        run_check(check_loss_per_sample, (ALIKE, LeansOnItsBatch()))


def test_a_heavy_import_is_caught(tmp_path: Path) -> None:
    path = tmp_path / "heavy_plugin.py"
    path.write_text("import matplotlib\nimport toys\n\nclass Heavy(toys.Planted):\n    pass\n")
    spec = importlib.util.spec_from_file_location("heavy_plugin", path)
    assert spec is not None and spec.loader is not None
    sys.modules["heavy_plugin"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        with pytest.raises(AssertionError, match="heavy_plugin, toys imports matplotlib"):
            run_check(check_light_import, (module.Heavy(), Match()))
    finally:
        del sys.modules["heavy_plugin"]


def test_expected_failures_must_fail(pytester: pytest.Pytester) -> None:
    pytester.makeini(f"[pytest]\npythonpath = {TESTS}\n")
    pytester.makepyfile(
        """
        from tinyfusion_core.testing import parametrize_with_checks
        from toys import Match, Planted

        class Idle(Planted):
            def blocks(self, model):
                return ["blocks.*"]

        why = {"every_block_learns": "half of the blocks do nothing", "tiny": "does not fail"}

        @parametrize_with_checks([(Idle, Match)], expected_failures=why)
        def test_conformance(check):
            check()
        """
    )
    done = pytester.runpytest_inprocess("-k", "every_block or tiny", "-p", "no:cacheprovider", "-rx")
    done.assert_outcomes(xfailed=1, failed=1)
    done.stdout.fnmatch_lines(["*XPASS(strict)*does not fail*", "*Idle-Match-every_block_learns*half of the blocks*"])


def test_expected_failures_name_checks() -> None:
    with pytest.raises(UserError, match="no check 'blokcs'; did you mean 'blocks'"):
        parametrize_with_checks([(Small, Match)], expected_failures={"blokcs": ""})


def test_every_check_says_what_it_looks_at() -> None:
    for check in CHECKS:
        assert (check.__doc__ or "").strip().endswith("."), check


def test_the_command_line_gives_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-plugin", "sit"]) == 0
    out = capsys.readouterr().out
    assert "SiT + FlowMatching" in out
    assert out.count("ok ") == len(CHECKS)
    assert f"all {len(CHECKS)} checks hold" in out


def test_the_command_line_names_what_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyfusion_core.testing.pairs_of", lambda name, found: [(Backwards(), Match())])
    assert main(["check-plugin", "sit"]) == 2
    out, err = capsys.readouterr()
    assert "FAIL  blocks" in out
    assert "Backwards.blocks gives" in out
    assert "of 18 checks failed" in err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ditt", "no plugin 'ditt' is installed; did you mean 'dit'?"),
        ("images", "brings neither a backbone nor a loss"),
    ],
)
def test_plugins_that_cannot_be_checked(name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-plugin", name]) == 2
    assert message in capsys.readouterr().err
