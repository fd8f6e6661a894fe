"""The block influence that was published with TinyFusion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import golden_data
import tinyfusion_core as tiny
from criteria_tasks import TRAINER, Plain, given, scores
from golden_data import assert_close_rel, weights
from tinyfusion_core.selection.criteria.calibration import Calibration
from tinyfusion_core.selection.criteria.similarity import BlockInfluence, cosine
from tinyfusion_dit import GaussianDiffusion
from tinyfusion_dit.model import DiT as Network
from toys import Chain


class Fed(GaussianDiffusion):
    """The inputs of the golden data, as they are."""

    def prepare_clean(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        return {"x_t": batch["x"], "t": batch["t"], "y": batch["y"], "drop": torch.zeros(len(batch["x"]), dtype=bool)}


@pytest.mark.parametrize(
    ("prefix", "dtype", "tolerance"), [("", torch.float32, 5e-6), ("f64.", torch.float64, 1e-10)], ids=["f32", "f64"]
)
def test_published_block_influence(prefix: str, dtype: torch.dtype, tolerance: float, monkeypatch) -> None:
    monkeypatch.setattr("tinyfusion_dit.model.sinusoid", golden_data.sinusoid)
    tensors, config = golden_data.load("bi_dit_small")
    model = Network(**config["model"])
    model.load_state_dict(weights(golden_data.load(config["weights_from"])[0]))
    model.to(dtype)
    batches = [{"x": tensors["in.x"][b].to(dtype), "t": tensors["in.t"][b], "y": tensors["in.y"][b]} for b in range(3)]

    def task(some: Sequence[dict[str, Tensor]]) -> tiny.Task:
        return replace(given(model, {k: torch.cat([batch[k] for batch in some]) for k in some[0]}), loss=Fed())

    def similarities(some: Sequence[dict[str, Tensor]]) -> Tensor:
        values = Calibration(task(some), TRAINER, 12, 4).compare([(i, i) for i in range(4)], cosine, clean=True)
        return torch.tensor(values, dtype=torch.float64)

    per_batch = torch.stack([similarities([batch]) for batch in batches])
    assert_close_rel(per_batch, tensors[f"{prefix}bi.cos_per_batch"], tolerance)
    assert_close_rel(similarities(batches), tensors[f"{prefix}bi.scores"], tolerance)
    for num_removed in (1, 2):
        decision = BlockInfluence(keep=4 - num_removed, reference=True)(task(batches), TRAINER)
        assert scores(decision) == pytest.approx([1 - s for s in tensors["bi.scores"].tolist()], rel=1e-4)
        assert list(decision.kept) == tensors[f"bi.kept.{num_removed}"].tolist()
        assert sorted(decision.removed) == sorted(tensors[f"bi.removed.{num_removed}"].tolist())


def test_the_published_script_never_removes_the_last_block() -> None:
    model = Chain(8, (1, 1, 0))
    task = replace(given(model, {"x": torch.randn(8, 8)}), loss=CleanPlain())
    assert BlockInfluence(keep=2)(task, TRAINER).kept == (0, 1)
    assert 2 in BlockInfluence(keep=2, reference=True)(task, TRAINER).kept
    assert BlockInfluence(keep=2, reference=True).preview(task.blocks).kept == (0, 2)


class CleanPlain(Plain):
    def prepare_clean(self, batch: Mapping[str, Tensor], rng: tiny.Rng) -> dict[str, Tensor]:
        return dict(batch)


def test_diffusion_without_noise() -> None:
    batch = {"x": torch.randn(500, 1, 2, 2), "y": torch.arange(500) % 10}
    loss = GaussianDiffusion(label_drop=0.5)
    inputs = loss.prepare_clean(batch, tiny.Rng(0, "calibration", strata=500))
    assert torch.equal(inputs["x_t"], batch["x"]) and torch.equal(inputs["y"], batch["y"])
    assert torch.equal(inputs["t"].unique(), torch.arange(250))
    assert not inputs["drop"].any()
    batch["x_std"] = torch.full_like(batch["x"], 3.0)
    drawn = loss.prepare_clean(batch, tiny.Rng(0, "calibration"))["x_t"] - batch["x"]
    assert drawn.std() == pytest.approx(3.0, rel=0.1)
