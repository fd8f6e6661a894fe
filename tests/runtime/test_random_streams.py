"""The random streams are those of every earlier release: the same key draws the same numbers, from the same places."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tinyfusion_core as tiny
import toys
from places import TESTS
from small_run import RECIPE
from tinyfusion_core.cli import main
from tinyfusion_core.dataloading.order import Order, ShardedOrder
from tinyfusion_core.registry.registry import registry
from tinyfusion_core.runtime import seeding
from tinyfusion_core.runtime.seeding import Rng, generator, seed_of

BEFORE = TESTS / "before_rooms"
KEYS: list[tuple[Any, ...]] = [
    (0,),
    (3, "search", 5, "mask", 2),
    (3, "search", "update"),
    (3, "search", 5, "forward", 8),
    (3, "recover", "order", 1),
    (3, "recover", "order", 1, "shards"),
    (3, "train", "initial weights"),
    (3, "comparison", "random subsets"),
    ("in the place of", 7, 0),
    ("digits", "held out"),
]
ROWS = {
    "search": Rng(3, "search", 5, first=2),
    "recover": Rng(3, "recover", 5, first=2),
    "finals 1": Rng(3, "finals 1", 1),
    "held out": Rng(0, "held out", 1, 4, strata=16),
    "calibration": Rng(3, "calibration", strata=16),
    "generate": Rng(3, "generate", first=6),
}


DECIDE_NOTHING = ("flops", "plan", "probe")
"""Stages whose inputs are only counted."""


def streams() -> dict[str, Any]:
    """Numbers of all kinds for some keys, as JSON has them."""
    return {
        "seeds": [seed_of(*key) for key in KEYS],
        "permutation": torch.randperm(20, generator=generator("digits", "held out")).tolist(),
        "batch": {name: torch.rand(3, generator=rng.batch("mask rate")).tolist() for name, rng in ROWS.items()},
        "uniform": {name: rng.uniform("time", 3).tolist() for name, rng in ROWS.items()},
        "uniform of a shape": {name: rng.uniform("dropped values", 2, 3).tolist() for name, rng in ROWS.items()},
        "integers": {name: rng.integers("time", 1000, 4).tolist() for name, rng in ROWS.items()},
        # Rows of 16 numbers and more are drawn in another way.
        "normal": {name: rng.normal("noise", torch.empty(2, 3)).tolist() for name, rng in ROWS.items()},
        "normal of long rows": {
            name: rng.normal("latent", torch.empty(1, 2, 9)).tolist() for name, rng in ROWS.items()
        },
        "gumbel": {name: rng.gumbel("mask", 2, 3).tolist() for name, rng in ROWS.items()},
        "order": list(Order(3, "search", 7, 4).steps(1, 5, 1, 2)),
        "order of shards": list(ShardedOrder(3, "recover", [3, 5, 4], 4, 2).steps(0, 7, 0, 4)),
    }


def spied(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Fills with the keys of all seeds that are asked for, numbers as `#`."""
    seen: set[str] = set()
    original = seeding.seed_of

    def watched(*key: object) -> int:
        seen.add(" / ".join("#" if isinstance(part, int) else str(part) for part in key))
        return original(*key)

    for module in list(sys.modules.values()):  # those that have imported its name, too
        if vars(module).get("seed_of") is original:
            monkeypatch.setattr(module, "seed_of", watched)
    return seen


def purposes(monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, list[str]]:
    """What a run, a comparison and every objective draw for; run in an empty folder."""
    found: dict[str, list[str]] = {}
    seen = spied(monkeypatch)

    def taken(name: str) -> None:
        found[name] = sorted(key for key in seen if key.split(" / ")[1] not in DECIDE_NOTHING)
        seen.clear()

    def go(command: str, name: str, **sections: Any) -> None:
        recipe = folder / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({**RECIPE, "search": None, "recover": None, **sections}))
        assert main([command, str(recipe), "--run-dir", str(folder / name)]) == 0
        taken(name)

    def a(name: str, **arguments: Any) -> dict[str, Any]:
        return {"class_path": name, "init_args": arguments}

    sizes = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 8, "depth": 4, "num_heads": 1}
    search = {"pattern": [1, 2], "steps": 2, "dropped_values": 0.5}
    finals = a("Finals", search={"keep": 2, "steps": 2}, masks=2, steps=1, samples=8)
    backbone = a("DiT", **sizes, num_classes=10, learn_sigma=False)
    metrics = [a("HeldOutLoss", draws=1), a("Frechet", num_samples=12)]
    go("run", "run", backbone=backbone, train={"steps": 2}, search=finals, recover={"steps": 2}, evaluate=metrics)
    go("run", "pattern", search=search, recover={"steps": 2})
    candidates = {
        "random": a("Random", keep=4, draws=2, samples=8),
        "top": a("Search", sampler=a("GumbelTopK", keep=4), steps=2),
    }
    go("compare", "compare", recover={"steps": 1}, compare={"seeds": 1, "random": 2, "candidates": candidates})
    for loss, network in (
        ("GaussianDiffusion", "DiT"),
        ("FlowMatching", "SiT"),
        ("MaskedTokenDiffusion", "MAR"),
        ("ScheduledDiffusion", "DiT"),
        ("RectifiedFlow", "DiT"),
    ):
        classes = registry().classes
        batch = classes["backbone"][network].tiny().example(2)
        seen.clear()
        classes["loss"][loss]().prepare(batch, Rng(0, "any"))
        taken(loss)
    return found


def close(now: Any, then: Any) -> None:
    """Equal but for rounding: the logarithms in normal and Gumbel numbers differ in the last place from CPU to CPU."""
    assert torch.allclose(torch.tensor(now), torch.tensor(then), rtol=1e-5, atol=1e-6)


def test_the_same_key_draws_the_same_numbers() -> None:
    now, then = streams(), json.loads((BEFORE / "streams.json").read_text())
    if not torch.backends.mkl.is_available():  # torch draws exponential numbers with it where it is there
        del now["gumbel"], then["gumbel"]
    assert now.keys() == then.keys()
    for kind, value in now.items():
        if kind.startswith(("normal", "gumbel")):
            assert value.keys() == then[kind].keys()
            for name in value:
                close(value[name], then[kind][name])
        else:
            assert value == then[kind], kind


@pytest.mark.slow
def test_random_numbers_are_drawn_for_the_same_purposes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # What is tried before anything is spent, or after saving, came later, and draws apart from all else.
    later = ("removal", "read back")
    found = purposes(monkeypatch, tmp_path)
    now = {kind: [p for p in drawn if not any(name in p for name in later)] for kind, drawn in found.items()}
    assert now == json.loads((BEFORE / "purposes.json").read_text())


@dataclass(frozen=True)
class Noised(toys.Match):
    """Draws noise and a time for every sample, and remembers what the network was given with them."""

    seen: list[torch.Tensor] = field(default_factory=list)

    def prepare(self, batch: Mapping[str, torch.Tensor], rng: Rng) -> dict[str, torch.Tensor]:
        return {**super().prepare(batch, rng), "t": rng.uniform("time", len(batch["x"])).float()}

    def predict(self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        given = torch.cat([inputs["x"] + inputs["t"][:, None], inputs["t"][:, None]], 1)
        self.seen.append(given)
        return model(given[:, :-1])


def test_every_mask_of_a_sample_sees_the_same_draws() -> None:
    data, loss, trainer = toys.planted_data(), Noised(), tiny.Trainer(batch_size=6, precision="fp32", seed=3)

    def sampler(lists: Mapping[str, int]) -> tiny.BlockSampler:
        return tiny.ScoreFunction(lists, tiny.Rules(keep=4), masks=5)

    task = tiny.Task(backbone=toys.Planted(), loss=loss, train=data, held_out=data)
    tiny.Search(sampler=sampler, steps=3)(task, trainer)
    steps = [given.view(6, 5, -1) for given in loss.seen if len(given) == 6 * 5]
    assert len(steps) == 3
    for given in steps:
        assert torch.equal(given, given[:, :1].expand_as(given))
        assert len(given[:, 0].unique(dim=0)) == len(given[:, 0, -1].unique()) == 6  # other samples see others
    assert not torch.equal(steps[0], steps[1])
