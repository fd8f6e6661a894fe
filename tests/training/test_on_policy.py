"""A student learns from samples of its own: where it goes itself, exactly, and as the steps say."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distributed_program as program
import interrupted
import tinyfusion_core as tiny
import walks
from forks import start, wait
from small_run import digits_task
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_core.training.distilling.distilled import Distilled
from tinyfusion_core.training.distilling.own_samples import on_policy
from walks import Walk, decision, task

pytestmark = pytest.mark.numerics

TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, checkpoint_every=4, log_every=1)
OWN = tiny.OutputKD(on_policy=1.0)


def recovered(
    kd: tiny.OutputKD,
    run: Path | None = None,
    work: tiny.Task | None = None,
    trainer: tiny.Trainer = TRAINER,
    **how: Any,
) -> torch.nn.Module:
    work = work or task()
    recover = tiny.Recover(**{"steps": 20, "lr": 1e-2, "ema": 0.0, "kd": kd, **how})
    student = tiny.prune(work, decision(work))
    return recover(work, student, decision(work), trainer, tiny.RunFolder(run) if run else None)


def apart(model: torch.nn.Module, work: tiny.Task) -> float:
    """KL(student || teacher) on walks of the student's own."""
    own = {"x": torch.zeros(400, walks.LENGTH, dtype=torch.long)}
    with torch.no_grad():
        inputs = work.loss.generated(model.eval(), own, "", Rng(0, "judged"))
        both = (work.loss.predict(network, inputs) for network in (model, work.teacher))
        return float(work.loss.distance(*both, inputs).mean())


def test_a_student_is_mended_where_it_goes_itself_and_the_data_do_not() -> None:
    work = task(states=2)
    before = apart(tiny.prune(work, decision(work)), work)
    off, on = (tiny.OutputKD(alpha_gt=0.0, on_policy=share) for share in (0.0, 1.0))
    assert apart(recovered(off, work=work, steps=100), work) > 0.5 * before  # it has learned what two states need
    assert apart(recovered(on, work=work, steps=100), work) < 0.05 * before


def test_samples_are_the_students_from_streams_of_their_own() -> None:
    work = task()
    student, rng = tiny.prune(work, decision(work)).train(), Rng(0, "recover", 3, first=8)
    batch = work.train.__getitems__([5, 6, 7])
    student.blocks[0].linear.weight.grad = torch.ones(8, 8)
    found = on_policy(OWN, work, student, TRAINER, work.loss.prepare)(batch, rng)["x"]
    assert student.training
    assert student.blocks[0].linear.weight.grad is not None
    with torch.no_grad():
        expected = work.loss.generated(student.eval(), batch, "", Rng(0, "recover, own samples", 3, first=8))["x"]
    assert torch.equal(found, expected)
    assert torch.equal(found[:, 0], batch["x"][:, 0])
    assert not torch.equal(found, batch["x"])


def test_the_share_of_the_steps_is_the_one_that_is_asked_for() -> None:
    def made(share: float, first: int = 0) -> list[bool]:
        return [tiny.OutputKD(on_policy=share).samples_itself(Rng(0, "recover", step, first)) for step in range(1000)]

    assert abs(sum(made(0.3)) - 300) < 60
    assert made(0.3) == made(0.3, first=8)  # all processes and passes alike
    assert all(made(1.0))
    assert not any(made(0.0))
    work = task()
    student = tiny.prune(work, decision(work))
    prepare = on_policy(tiny.OutputKD(on_policy=0.3), work, student, TRAINER, work.loss.prepare)
    batch = work.train.__getitems__([0, 1])
    plain = [torch.equal(prepare(batch, Rng(0, "recover", step))["x"], batch["x"]) for step in range(20)]
    assert plain == [not own for own in made(0.3)[:20]]


def test_own_samples_have_no_training_loss() -> None:
    work = task()
    student = tiny.prune(work, decision(work))
    inputs = work.train.__getitems__([0, 1, 2])
    steps = [Rng(0, "recover", step) for step in range(40)]
    kd = tiny.MaskedKD(alpha_kd=0.7, alpha_gt=0.2, beta=(0.5, 0.5), on_policy=0.5)
    objective = Distilled(student, work, decision(work), kd)
    own, data = (next(rng for rng in steps if kd.samples_itself(rng) == made) for made in (True, False))
    _, losses = objective(inputs, data)
    terms = objective.terms
    assert torch.allclose(losses, 0.7 * terms["kd"] + 0.2 * terms["gt"] + 0.5 * terms["feature"])
    _, losses = objective(inputs, own)
    assert torch.allclose(losses, 0.7 * terms["kd"] + 0.5 * terms["feature"])
    assert "gt" not in objective.terms


def test_a_gradient_is_that_of_the_formula() -> None:
    work = task()
    student = tiny.prune(work, decision(work)).train()
    rng = Rng(0, "recover", 2)
    inputs = on_policy(OWN, work, student, TRAINER, work.loss.prepare)(work.train.__getitems__([0, 1, 2]), rng)
    total, _ = Distilled(student, work, decision(work), replace(OWN, alpha_kd=1.0))(inputs, rng)
    total.backward()
    found = [p.grad.clone() for p in student.parameters()]
    # d KL(q || p) / d logits = q (log(q / p) - KL), by hand; the samples themselves have no gradient.
    student.zero_grad()
    logits = walks.logits(student, inputs["x"])
    q, p = logits.detach().log_softmax(-1), walks.logits(work.teacher, inputs["x"]).detach().log_softmax(-1)
    kl = (q.exp() * (q - p)).sum(-1, keepdim=True)
    logits.backward(q.exp() * (q - p - kl) / (3 * walks.LENGTH))
    for ours, theirs in zip(found, student.parameters(), strict=True):
        assert theirs.grad is not None
        assert torch.allclose(ours, theirs.grad, atol=1e-7, rtol=1e-4)
    assert all(p.grad is None for p in work.teacher.parameters())


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_it_goes_on_bit_for_bit(share: float, tmp_path: Path) -> None:
    kd = tiny.OutputKD(on_policy=share)
    whole = recovered(kd).state_dict()
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        recovered(kd, tmp_path, trainer=replace(TRAINER, callbacks=(interrupted.Stopping(),)))
    interrupted.assert_equal(recovered(kd, tmp_path).state_dict(), whole)


def test_passes_and_recomputed_blocks_change_rounding_alone() -> None:
    whole = recovered(OWN, steps=5).state_dict()
    for changes in ({"micro_batch_size": 4}, {"activation_checkpointing": True}):
        parts = recovered(OWN, steps=5, trainer=replace(TRAINER, **changes)).state_dict()
        assert all(torch.allclose(value, whole[name], atol=1e-5) for name, value in parts.items())


@pytest.mark.slow  # passes of a batch in one process are in the quick ones
def test_two_processes_are_one(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    done = wait(start(partial(program.main, tmp_path, 2, "on policy"), log, processes=2), 400)
    assert done == [0, 0], log.read_text()[-4000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)["on policy"]
    alone = program.on_policy(program.trainer_of())
    assert all(torch.allclose(value, alone[name], atol=2e-6, rtol=1e-5) for name, value in found.items())


def test_shallower_students_learn_on_the_samples_of_the_whole_one() -> None:
    class Seen(Walk):
        depths: list[int] = []

        def generated(self, model: Any, batch: Any, conditions: str, rng: Rng) -> dict[str, Tensor]:
            ran: list[int] = []
            hooks = [b.linear.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.blocks)]
            made = super().generated(model, batch, conditions, rng)
            for hook in hooks:
                hook.remove()
            self.depths.append(len(set(ran)))
            return made

    work = replace(task(), loss=Seen())
    ranked = replace(decision(work), marginals=(0, 0.9, 0, 0, 0.8, 0, 0, 0))
    recover = tiny.Recover(steps=3, kd=OWN, depths=[1], ema=0.0)
    recover(work, tiny.prune(work, ranked), ranked, replace(TRAINER, micro_batch_size=8))
    assert Seen.depths == [2] * 6


def test_shares_of_the_gradient_are_those_of_own_samples_if_all_are(tmp_path: Path) -> None:
    def names(share: float) -> set[str]:
        folder = tmp_path / str(share)
        recovered(tiny.MaskedKD(beta=(0.1, 0.1), on_policy=share), folder, steps=2)
        return {name for entry in tiny.RunFolder(folder).metrics() for name in entry if name.startswith("share_")}

    assert names(1.0) == {"share_kd", "share_feature"}
    assert names(0.5) == {"share_kd", "share_gt", "share_feature"}


def test_a_diffusion_students_own_images_are_noised_anew() -> None:
    work = digits_task()
    work = replace(work, loss=replace(work.loss, sampling_steps=2))
    kept = tiny.Decision(blocks=tuple(work.blocks), kept=(0, 1, 3, 6), method="Keep")
    student, batch = tiny.prune(work, kept), work.train.__getitems__([0, 1, 2])
    inputs = on_policy(OWN, work, student, TRAINER, work.loss.prepare)(batch, Rng(0, "recover"))
    assert not torch.equal(inputs["x_start"], batch["x"])
    assert torch.equal(inputs["noise"], work.loss.prepare(batch, Rng(0, "recover"))["noise"])
    recovery = tiny.Recover(steps=2, lr=1e-3, kd=OWN)
    recovered = recovery(work, student, kept, replace(TRAINER, batch_size=4))
    assert all(p.isfinite().all() for p in recovered.parameters())


def test_networks_in_parts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.Trainer, "shards", lambda self, accelerator=None: self.sharding == "fsdp")
    sharding = replace(TRAINER, sharding="fsdp")
    with pytest.raises(tiny.UserError, match=r"on_policy: does not go with .*sharding: fsdp; take ddp"):
        tiny.Recover(steps=1, kd=OWN).check_trainer(sharding)
    tiny.Recover(steps=1, kd=tiny.OutputKD()).check_trainer(sharding)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(tiny.UserError, match=r"on_policy is 1\.5; expected a share of the steps, 0 to 1"):
        tiny.OutputKD(on_policy=1.5)
    with pytest.raises(tiny.UserError, match=r"on_policy: no cache holds predictions on samples that are made in"):
        tiny.OutputKD(on_policy=0.5, cache=tiny.TeacherCache(folder="x"))
    with pytest.raises(tiny.UserError, match=r"on_policy: a network with Match makes no samples; leave it out"):
        interrupted_task = interrupted.task()
        student = tiny.prune(interrupted_task, decision(interrupted_task))
        tiny.Recover(steps=1, kd=OWN)(interrupted_task, student, decision(interrupted_task), TRAINER)
