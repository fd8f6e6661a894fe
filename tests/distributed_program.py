"""What the processes of a distributed test run; a test runs the same in its own process to compare with.

`torchrun distributed_program.py FOLDER PROCESSES WHAT...`
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import tinyfusion_core as tiny
import walks
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.registry.registry import registry
from tinyfusion_core.runtime.distributed import shutdown
from tinyfusion_core.samplers.base import Draw
from tinyfusion_core.samplers.grouped import GroupedSampler
from tinyfusion_core.samplers.subset import ExactK, GumbelTopK, ScoreFunction
from tinyfusion_core.testing import pair_name, pairs_of
from tinyfusion_core.testing.subject import Subject
from toys import Match, Planted, planted_data

DATA = planted_data()


class OneSided(GroupedSampler):
    """All samples of the first half of the batch keep the even blocks, all of the second half the odd ones."""

    def sample(self, num_rows, rng) -> Draw:
        draw = super().sample(num_rows, rng)
        rows = torch.arange(rng.first, rng.first + num_rows)
        kept = (torch.arange(self.num_blocks)[None] + (rows >= 4)[:, None]) % 2 == 0
        return Draw(kept.float() + draw.mask - draw.mask.detach(), draw.log_prob)


def one_sided(lists) -> OneSided:
    return OneSided(lists, (1, 2))


# A large clip shows a wrong factor on the gradients, which AdamW would hide; a small one shows a wrong norm.
SEARCHES = {
    "grouped, full": tiny.Search(pattern=(1, 2), steps=4, lr_gates=1e-2, lr=1e-2, update=tiny.Full(), clip=1e3),
    "grouped, lora": tiny.Search(pattern=(2, 4), steps=4, lr_gates=1e-2, lr=1e-2, update=tiny.LoRA(rank=2), clip=0.1),
    "score, frozen": tiny.Search(keep=4, steps=4, update=tiny.Frozen(), clip=1e3),
    "score, control": tiny.Search(
        sampler=partial(ScoreFunction, rules=tiny.Rules(keep=4), control=True), steps=4, update=tiny.Frozen(), clip=1e3
    ),
    "exact, costs": tiny.Search(
        sampler=partial(ExactK, rules=tiny.Rules(costs=[2, 1, 2, 1, 2, 1, 2, 1], budget=6, protect=[1])),
        steps=4,
        lr=1e-2,
        update=tiny.Full(),
        dropped_values=0.5,
        clip=1e3,
    ),
    "score, start": tiny.Search(
        keep=4,
        steps=4,
        lr=1e-2,
        start=tiny.Taylor(keep=4, samples=16),
        prior=(1.0, 0.0),
        update=tiny.LoRA(rank=2),
        clip=0.1,
    ),
    "top-k": tiny.Search(sampler=partial(GumbelTopK, keep=4), steps=4, update=tiny.Frozen(), clip=1e3),
    "confident": tiny.Search(pattern=(1, 2), steps=12, warmup=0.2, lr_gates=0.1, confident=0.6, update=tiny.Full()),
    "one-sided": tiny.Search(sampler=one_sided, steps=3, warmup=0.0, update=tiny.Full(), clip=1e3),
}
RECOVERIES = {
    "masked": tiny.Recover(steps=4, lr=1e-2, ema=0.5, clip=0.05, kd=tiny.MaskedKD(beta=(0.1, 0.0))),
    "plain": tiny.Recover(steps=4, lr=1e-2, ema=0.0, clip=1e3),
}
BOTH = ("grouped, full", "masked")
KEEP = [1, 3, 4, 6]
LONG = tiny.Recover(steps=16, lr=1e-2, ema=0.5)
LONG_SEARCH = tiny.Search(pattern=(1, 2), steps=16, lr_gates=1e-2, update=tiny.Full())


def task(loss: Match | None = None) -> tiny.Task:
    backbone = Planted(scales=(0.2, 1, 0.3, 1, 1, 0.2, 0.1, 1))
    return tiny.Task(backbone=backbone, loss=loss or Match(), train=DATA, held_out=DATA)


def trainer_of(**options: Any) -> tiny.Trainer:
    return tiny.Trainer(**{"batch_size": 8, "precision": "fp32", "log_every": 1, "timeout": 60, **options})


@contextmanager
def gradients_noted() -> Iterator[tuple[list[list[float]], set[bool]]]:
    """The norms of all gradients at every optimizer step, and whether the parameters were sharded."""
    norms: list[list[float]] = []
    kinds: set[bool] = set()

    def note(optimizer, args, kwargs) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kinds.update(isinstance(p, DTensor) for p in parameters)
        # The last group's are weights; gates have none while they wait.
        assert all(p.grad is not None for p in optimizer.param_groups[-1]["params"])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        assert all(p.dtype == g.dtype == torch.float32 for p, g in zip(parameters, gradients, strict=True))
        norms.append([float((g.full_tensor() if isinstance(g, DTensor) else g).norm()) for g in gradients])

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield norms, kinds
    finally:
        handle.remove()


def numbers(folder: Path, trainer: tiny.Trainer, only: Collection[str] = ()) -> dict[str, Any]:
    """Search and recover in every way, or some; all that is to be the same on any number of processes."""
    found: dict[str, Any] = {}
    sharded = trainer.sharding == "fsdp" and trainer.accelerator.num_processes > 1
    for name, search in SEARCHES.items():
        if only and name not in only:
            continue
        work, run = task(), tiny.RunFolder(folder / name)
        weights = {k: v.clone() for k, v in work.teacher.state_dict().items()}
        before = [(id(p), type(m)) for m in work.teacher.modules() for p in m.parameters()]
        with gradients_noted() as (norms, kinds):
            decision = search(work, trainer, run)
        trains_weights = not isinstance(search.update, tiny.Frozen)
        assert kinds == {False} | ({True} if sharded and trains_weights else set()), (name, kinds)
        assert [(id(p), type(m)) for m in work.teacher.modules() for p in m.parameters()] == before
        assert all(torch.equal(weights[k], v) for k, v in work.teacher.state_dict().items()), name
        found[name] = {"kept": decision.kept, "marginals": torch.tensor(decision.marginals), "norms": norms}
        found[name]["losses"] = [e["loss"] for e in run.metrics()]
    keep = tiny.Keep(KEEP)(task(), trainer)
    for name, recover in RECOVERIES.items():
        if only and name not in only:
            continue
        work, run = task(), tiny.RunFolder(folder / name)
        student = tiny.prune(work, keep)
        with gradients_noted() as (norms, kinds):
            recover(work, student, keep, trainer, run)
        assert kinds == {sharded}, (name, kinds)
        found[name] = {**student.state_dict(), "norms": norms}
        found[name]["log"] = [
            [v for k, v in e.items() if isinstance(v, float) and k != "seconds"] for e in run.metrics()
        ]
    if not only:
        others = [tiny.Uniform(pattern=(2, 4)), tiny.LeaveOneOut(pattern=(2, 4), samples=8)]
        finals = tiny.Finals(search=SEARCHES["grouped, lora"], masks=2, others=others, steps=2, samples=8)
        found["finals"] = {"kept": finals(task(), trainer).kept}
        race = tiny.Race(pattern=(2, 4), proposers=others, steps=24, samples=8)
        decision = race(task(), trainer)
        entries = [entry for entered in decision.provenance["race"] for entry in entered]
        cotrained = tiny.CoTrained(keep=4, steps=4, lr=1e-2, samples=16)(task(), trainer)
        found["co-trained"] = {"kept": cotrained.kept, "losses": cotrained.provenance["losses"]}
        found["race"] = {"kept": decision.kept, "losses": [entry["loss"] for entry in entries]}
    return found


class StopAt(Match):
    """Asks this process to stop in the middle of step 12."""

    def prepare(self, batch, rng):
        if rng.stage in ("search", "recover") and rng.step == 11 and rng.first % 4 == 0:  # in its first pass
            os.kill(os.getpid(), signal.SIGTERM)
        return super().prepare(batch, rng)


def long(folder: Path, trainer: tiny.Trainer, stop: bool = False) -> dict[str, Any]:
    """A search and a recovery that are stopped by a signal, or go on from there to their end."""
    work, run = task(StopAt() if stop else None), tiny.RunFolder(folder)
    keep = tiny.Keep(KEEP)(task(), trainer)
    if stop:
        for stage in (
            lambda: LONG_SEARCH(work, trainer, run),
            lambda: LONG(work, tiny.prune(work, keep), keep, trainer, run),
        ):
            with pytest.raises(KeyboardInterrupt, match="stopped at step 12 of 16"):
                stage()
        assert not torch.stack([p.isnan().any() for p in work.teacher.parameters()]).any()
        return {}
    started = min((e["step"] for e in run.metrics("recover")), default=1)
    decision = LONG_SEARCH(work, trainer, run)
    student = LONG(work, tiny.prune(work, keep), keep, trainer, run)
    assert started == 1
    return {**student.state_dict(), "marginals": torch.tensor(decision.marginals)}


def drift(trainer: tiny.Trainer) -> None:
    """On the second process the gates move by themselves after the third step: all processes say so and stop."""
    steps = []

    def nudge(optimizer, args, kwargs) -> None:
        steps.append(1)
        if len(steps) == 3 and trainer.accelerator.process_index == 1:
            with torch.no_grad():
                optimizer.param_groups[0]["params"][0].add_(1e-6)

    handle = register_optimizer_step_post_hook(nudge)
    with pytest.raises(
        tiny.UserError, match="search: the gates at step 4 of process 1 of 2 are not those of process 0"
    ):
        replace(SEARCHES["grouped, full"], steps=6)(task(), trainer)
    handle.remove()
    work = task()
    if trainer.accelerator.process_index == 1:
        with torch.no_grad():
            work.teacher.blocks[2].linear.bias[3].add_(1e-6)
    with pytest.raises(tiny.UserError, match="the weights to begin with of process 1 of 2"):
        SEARCHES["grouped, full"](work, trainer)


def families(trainer: tiny.Trainer) -> dict[str, Any]:
    """Search and distil the tiny network of every built-in family."""
    found: dict[str, Any] = {}
    for pair in [pair for plugin in ("dit", "sit", "mar", "llm", "diffusers") for pair in pairs_of(plugin, registry())]:
        subject = Subject.of(pair)
        data = Tensors(subject.batch())
        work = tiny.Task(backbone=subject.backbone, loss=subject.loss, train=data, held_out=data)
        pattern = {name: (max(1, length // 2), length) for name, length in work.lists.items()}
        with gradients_noted() as (norms, kinds):
            decision = tiny.Search(pattern=pattern, steps=2, lr=1e-3, lr_gates=1e-2, update=tiny.Full())(work, trainer)
            # After two steps of AdamW two masks can be equally probable, and rounding would decide: not the search's.
            keep = tiny.Uniform(pattern=pattern)(work, trainer)
            student = tiny.prune(work, keep)
            kd = tiny.OutputKD() if type(subject.loss).distance is not LossAdapter.distance else None
            tiny.Recover(steps=2, lr=1e-3, kd=kd, ema=0.5)(work, student, keep, trainer)
        assert kinds == {False, trainer.shards()}
        found[pair_name(pair)] = {"marginals": torch.tensor(decision.marginals), "norms": norms}
    return found


def inside(trainer: tiny.Trainer) -> dict[str, Any]:
    """Search and distil in branches, and at several depths where processes hold copies."""
    subject = Subject.of(next(pair for pair in pairs_of("dit", registry())))
    data = Tensors(subject.batch())
    backbone = replace(subject.backbone, units=("attention", "mlp"))
    work = tiny.Task(backbone=backbone, loss=subject.loss, train=data, held_out=data)
    search = tiny.Search(pattern=(1, 2), steps=2, lr=1e-3, lr_gates=1e-2, update=tiny.Full())
    depths = () if trainer.sharding == "fsdp" else (2, 3, 4)
    with gradients_noted() as (norms, _):
        decision = search(work, trainer)
        keep = replace(decision, kept=(0, 1, 3, 4, 6), marginals=(0.9, 0.8, 0.1, 0.7, 0.6, 0.2, 0.5, 0.3))
        student = tiny.prune(work, keep)
        tiny.Recover(steps=4, lr=1e-3, kd=tiny.MaskedKD(), ema=0.5, depths=depths)(work, student, keep, trainer)
    # Not the weights: of a key's bias the gradient is rounding, which AdamW makes steps of.
    return {"marginals": torch.tensor(decision.marginals), "norms": norms}


def on_policy(trainer: tiny.Trainer) -> dict[str, Any]:
    """Distil on samples that the student makes itself in some steps."""
    work = walks.task()
    kept = walks.decision(work)
    kd = tiny.OutputKD(on_policy=0.7)
    recover = tiny.Recover(steps=8, lr=1e-2, ema=0.5, kd=kd)
    return dict(recover(work, tiny.prune(work, kept), kept, trainer).state_dict())


class Broken(Match):
    """The second process fails, or falls asleep, in its third step."""

    def prepare(self, batch, rng):
        if rng.stage == "recover" and rng.step == 2 and rng.first >= 4:  # its half of the batch
            if self.noise < 0:
                time.sleep(1000)
            raise tiny.UserError("this process cannot go on")
        return super().prepare(batch, rng)


def main(folder: Path, processes: int, *what: str) -> None:
    torch.set_num_threads(1)
    precision = "bf16" if what[0].startswith("half") else "fp32"  # there is one for each process
    timeout = 5 if what[0].startswith("sleep") else 60  # likewise
    trainers = {
        "ddp": trainer_of(precision=precision, timeout=timeout, micro_batch_size=2),
        "fsdp": trainer_of(precision=precision, timeout=timeout, sharding="fsdp"),
    }
    accelerator = trainers["ddp"].accelerator
    assert accelerator.num_processes == processes
    found: dict[str, Any] = {}
    for name in what:
        action, _, sharding = name.partition(":")
        trainer = trainers[sharding or "ddp"]
        if action == "numbers":
            found[name] = numbers(folder / sharding, trainer)
        elif action == "remembered":
            recomputing = replace(trainer, activation_checkpointing=True, micro_batch_size=2)
            found[name] = numbers(folder / f"{sharding} again", recomputing)
        elif action == "stop":
            long(folder / f"stopped {sharding}", trainer, stop=True)
        elif action == "resume":
            found[name] = long(folder / "stopped alone", trainer)
        elif action == "families":
            found[name] = families(replace(trainer, batch_size=4))
        elif action == "inside":
            found[name] = inside(replace(trainer, batch_size=4))
        elif action == "on policy":
            found[name] = on_policy(trainer)
        elif action == "half":  # which notes that the optimizer sees float32
            found[name] = numbers(folder / f"{sharding} half", replace(trainer, micro_batch_size=2), BOTH)
        elif action == "compiled":
            found[name] = numbers(folder / f"{sharding} compiled", replace(trainer, compile=True), BOTH)
        elif action == "drift":
            drift(trainer)
        else:
            keep = tiny.Keep(KEEP)(task(), trainer)
            loss = Broken(noise=-0.1 if action == "sleep" else 0.1)
            LONG(task(loss), tiny.prune(task(), keep), keep, trainer)
    if accelerator.is_main_process:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
    shutdown()
