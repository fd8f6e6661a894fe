"""Every check of a backbone and a loss catches a plugin that breaks it."""

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

from tinyfusion_core.cli import main
from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.backbone import Backbone
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.testing import name_of, run_check
from tinyfusion_core.testing.checks import CHECKS
from tinyfusion_core.testing.checks.structure import check_light_import
from toys import Chain, Match, Planted

pytestmark = pytest.mark.numerics

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


class KeepsTooLittle(Match):
    def keep(self, teacher: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"0": teacher.round()}


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
    "kept_prediction": (Small(), KeepsTooLittle(), r"KeepsTooLittle\.distance differs between a prediction and"),
    "prepare": (Small(), DrawsGlobally(), r"DrawsGlobally\.prepare draws from a global generator"),
    "same_inputs": (Small(), DrawsWhilePredicting(), "gives teacher and student different inputs"),
    "predict_deterministic": (AlwaysDrops(), Match(), "something else the second time"),
    "save_and_load": (ForgetsItsConfig(), Match(), "has the same weights and predicts otherwise"),
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


@pytest.mark.slow
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


def test_the_command_line_names_what_does_not_hold(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyfusion_core.testing.pairs_of", lambda name, found: [(Backwards(), Match())])
    assert main(["check-plugin", "sit"]) == 2
    out, err = capsys.readouterr()
    assert "FAIL  blocks" in out
    assert "Backwards.blocks gives" in out
    assert "of 19 checks failed" in err
