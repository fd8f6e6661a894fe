"""What part of the gradient each term of a distillation is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import interrupted
import tinyfusion_core as tiny
from tinyfusion_core.pruning.removal import remove_blocks
from tinyfusion_core.training.distilling.distilled import Distilled
from tinyfusion_core.training.distilling.shares import Shares
from toys import Planted

pytestmark = pytest.mark.numerics

KEPT = (1, 3, 4)
DECISION = tiny.Decision(blocks=tuple(f"blocks.{i}" for i in range(8)), kept=KEPT, method="Keep", choices=())


def recovered(folder: Path | None, kd: tiny.OutputKD, log_every: int = 2) -> dict[str, torch.Tensor]:
    task, model = interrupted.task(), Planted().build()
    remove_blocks(Planted(), model, [f"blocks.{i}" for i in range(8) if i not in KEPT])
    trainer = replace(interrupted.TRAINER, log_every=log_every)
    recover = tiny.Recover(steps=6, lr=1e-2, kd=kd)
    run = tiny.RunFolder(folder) if folder else None
    return dict(recover(task, model, DECISION, trainer, run).state_dict())


def shares(folder: Path, kd: tiny.OutputKD) -> list[dict[str, float]]:
    recovered(folder, kd)
    logged = [entry for entry in tiny.RunFolder(folder).metrics() if entry["stage"] == "recover"]
    return [{k[6:]: v for k, v in entry.items() if k.startswith("share_")} for entry in logged]


def test_terms_that_are_alike_have_the_shares_of_their_weights(tmp_path: Path) -> None:
    # What the data say is what the teacher says, so that both terms have the same gradient.
    found = shares(tmp_path, tiny.OutputKD(alpha_kd=0.9, alpha_gt=0.3))
    assert len(found) == 3
    for share in found:
        assert share == pytest.approx({"kd": 0.75, "gt": 0.25}, abs=1e-5)


def test_they_are_the_norms_of_the_gradients() -> None:
    kd = tiny.MaskedKD(alpha_kd=0.7, alpha_gt=0.2, beta=(1.0, 1.0))
    task, student = interrupted.task(), Planted().build()
    remove_blocks(Planted(), student, [f"blocks.{i}" for i in range(8) if i not in KEPT])
    student.register_buffer("scale", torch.tensor(1.0))  # which the gradient needs
    student.register_forward_hook(lambda module, _, output: output * module.scale)
    objective = Distilled(student.train(), task, DECISION, kd)
    compared = Shares.on(interrupted.TRAINER, task.train, task.loss.prepare)
    norms = {}
    for name, weight in {"kd": 0.7, "gt": 0.2, "feature": 1.0}.items():
        student.zero_grad()
        _, terms = objective.compared(compared.inputs)
        (weight * terms[name].mean()).backward()
        norms[name] = float(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm())
    student.zero_grad()
    found = compared.of(student, objective.weights, objective.compared)
    assert found == pytest.approx({name: norm / sum(norms.values()) for name, norm in norms.items()}, rel=1e-5)
    assert min(norms.values()) > 0
    assert student.training
    assert all(p.grad is None for p in student.parameters())


def test_nothing_is_compared_with_one_term(tmp_path: Path) -> None:
    assert shares(tmp_path, tiny.OutputKD(alpha_kd=1.0, alpha_gt=0.0)) == [{}, {}, {}]


def test_a_term_that_hardly_counts_is_told_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"recover\.kd: alpha_gt makes the term 'gt' 0\.50% of the gradient") as told:
        shares(tmp_path, tiny.OutputKD(alpha_kd=0.995, alpha_gt=0.005))
    assert len(told) == 1


def test_comparing_changes_no_number(tmp_path: Path) -> None:
    kd = tiny.MaskedKD(beta=(1.0, 1.0))
    interrupted.assert_equal(recovered(tmp_path, kd, log_every=1), recovered(None, kd, log_every=1000))
