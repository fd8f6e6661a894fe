"""Checks of a loss: one number for each sample, and everything random drawn where teacher and student share it."""

from __future__ import annotations

import copy
from contextlib import suppress

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..assertions import expect, expect_close, expect_same, global_states, removing, seed_everything, tensors_of
from ..subject import NUM_ROWS, Subject, fixed_rng


def check_loss_per_sample(subject: Subject) -> None:
    """`loss` and `distance` are (B,) finite numbers, each of its own sample alone, whatever the order of the batch."""
    model, inputs = subject.backbone.build(), subject.inputs()
    name = type(subject.loss).__name__
    for key, t in inputs.items():
        expect(len(t) == NUM_ROWS, f"{name}.prepare: '{key}' has {len(t)} rows for a batch of {NUM_ROWS}")
    order = torch.tensor([3, 0, 4, 2, 1])

    def numbers(rows: Tensor) -> list[tuple[str, Tensor]]:
        some = {key: t[rows] for key, t in inputs.items()}
        with torch.no_grad():
            prediction = subject.loss.predict(model, some)
            found = [("loss", subject.loss.loss(prediction, some))]
            other = subject.loss.predict(subject.pruned(subject.every_other()), some)
            with suppress(UserError):  # an objective that cannot distil says so
                found.append(("distance", subject.loss.distance(other, prediction, some)))
        return found

    for (method, whole), (_, permuted), (_, part) in zip(
        numbers(torch.arange(NUM_ROWS)), numbers(order), numbers(order[:2]), strict=True
    ):
        where = f"{name}.{method}"
        expect(
            whole.shape == (NUM_ROWS,),
            f"{where} returns the shape {tuple(whole.shape)} for {NUM_ROWS} samples; return one number for each: "
            f"({NUM_ROWS},), the mean over everything but the batch",
        )
        expect(bool(whole.isfinite().all()), f"{where} is not finite: {whole.tolist()}")
        expect_close(permuted, whole[order], 1e-4, f"{where} changes when the samples change places")
        expect_close(part, whole[order[:2]], 1e-4, f"{where} of a sample depends on the others of its batch")


def check_prepare(subject: Subject) -> None:
    """`prepare` is a function of its arguments, row by row: it leaves global generators and the batch alone."""
    batch, name = subject.batch(), f"{type(subject.loss).__name__}.prepare"
    before = copy.deepcopy(batch)
    seed_everything(1)
    states = global_states()
    first = subject.loss.prepare(batch, fixed_rng())
    expect(states == global_states(), f"{name} draws from a global generator; draw from `rng`")
    expect_same(before, batch, f"{name} changes the batch it was given")
    seed_everything(2)
    expect_same(
        first, subject.loss.prepare(batch, fixed_rng()), f"{name} gives something else the second time; draw from `rng`"
    )
    parts = [
        subject.loss.prepare({key: t[rows] for key, t in batch.items()}, fixed_rng(first=rows.start))
        for rows in (slice(0, 2), slice(2, NUM_ROWS))
    ]
    joined = {key: torch.cat([part[key] for part in parts]) for key in first}
    expect_same(first, joined, f"{name} gives a row something else in another batch; draw by row, as `rng.normal` does")


def check_same_inputs(subject: Subject) -> None:
    """Teacher and student are run on the same inputs: `predict` draws nothing and changes nothing that it is given."""
    teacher, student = subject.backbone.build(), subject.pruned(subject.every_other())
    inputs, name = subject.inputs(), f"{type(subject.loss).__name__}.predict"
    before = copy.deepcopy(inputs)
    path = subject.backbone.block_paths(teacher)[0]  # which both have, with nothing removed before it

    def entering(model: nn.Module, seed: int) -> list[Tensor]:
        seed_everything(seed)
        seen: list[Tensor] = []
        hook = model.get_submodule(path).register_forward_pre_hook(
            lambda _m, args, kwargs: seen.extend(t.clone() for t in tensors_of((args, kwargs))), with_kwargs=True
        )
        with removing([hook]), torch.no_grad():
            prediction = subject.loss.predict(model, inputs)
            subject.loss.loss(prediction, inputs)
        return seen

    pairs = zip(entering(teacher, 1), entering(student, 2), strict=True)
    expect_same(before, inputs, f"{name} or loss changes its inputs in place")
    expect(
        all(torch.equal(t, s) for t, s in pairs),
        f"{name} gives teacher and student different inputs; draw everything random in prepare",
    )


def check_predict_deterministic(subject: Subject) -> None:
    """In eval mode `predict` gives the same twice, whatever the global generators, and changes no buffer."""
    model, inputs = subject.backbone.build(), subject.inputs()
    before = copy.deepcopy(model.state_dict())
    predictions = []
    for seed in (1, 2):
        seed_everything(seed)
        with torch.no_grad():
            predictions.append(tensors_of(subject.loss.predict(model, inputs)))
    expect(
        all(torch.equal(a, b) for a, b in zip(*predictions, strict=True)),
        "the network in eval mode predicts something else the second time; is a dropout always on?",
    )
    expect_same(before, model.state_dict(), "predicting changes the network's state")
