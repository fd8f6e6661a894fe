"""Checks of a loss: one number per sample, and everything random is drawn where teacher and student share it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from ...errors import UserError
from ..assertions import (
    expect,
    expect_close,
    expect_same,
    global_states,
    largest,
    removing,
    seed_everything,
    tensors_of,
)
from ..subject import NUM_ROWS, Subject, fixed_rng, precisely


def check_loss_per_sample(subject: Subject) -> None:
    """`loss` and `distance` are (batch,) finite numbers; each depends only on its own sample, in any order."""
    name = type(subject.loss).__name__
    for key, t in subject.inputs().items():
        expect(len(t) == NUM_ROWS, f"{name}.prepare: '{key}' has {len(t)} rows for a batch of {NUM_ROWS}")
    order = torch.tensor([3, 0, 4, 2, 1])
    whole, permuted, part = precisely(
        subject, lambda it: _loss_and_distance(it, [torch.arange(NUM_ROWS), order, order[:2]])
    )
    for method, found in whole.items():
        where = f"{name}.{method}"
        expect(
            found.shape == (NUM_ROWS,),
            f"{where} returns the shape {tuple(found.shape)} for {NUM_ROWS} samples; return one number for each: "
            f"({NUM_ROWS},), the mean over everything but the batch",
        )
        expect(bool(found.isfinite().all()), f"{where} is not finite: {found.tolist()}")
    size = max(map(largest, whole.values()))  # a distance is the difference of such numbers
    for method, found in whole.items():
        where = f"{name}.{method}"
        expect_close(permuted[method], found[order], 1e-4, f"{where} changes when the samples change places", size)
        expect_close(
            part[method], found[order[:2]], 1e-4, f"{where} of a sample depends on the others of its batch", size
        )


def check_kept_prediction(subject: Subject) -> None:
    """`distance` takes what `kept` makes of what `keep` keeps, row by row, as it takes the prediction itself."""
    teacher, student, inputs = subject.network(), subject.pruned(subject.every_other()), subject.inputs()
    loss, name = subject.loss, type(subject.loss).__name__
    with torch.no_grad():
        theirs, ours = loss.predict(teacher, inputs), loss.predict(student, inputs)
        try:
            expected, columns = loss.distance(ours, theirs, inputs), loss.keep(theirs, inputs)
        except UserError:  # an objective that cannot distil, or whose predictions cannot be kept, says so
            return
        for key, t in columns.items():
            expect(len(t) == NUM_ROWS, f"{name}.keep: '{key}' has {len(t)} rows for a batch of {NUM_ROWS}")
        found = loss.distance(ours, loss.kept(columns, ours), inputs)
    message = f"{name}.distance differs between a prediction and what `keep` and `kept` make of it"
    expect_close(found, expected, 1e-4, message, size=max(largest(expected), largest(loss.loss(ours, inputs))))


def check_prepare(subject: Subject) -> None:
    """`prepare` depends only on its arguments, row by row; it does not change global generators or the batch."""
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
    for key, expected in first.items():
        joined = torch.cat([part[key] for part in parts])
        message = f"{name} gives a row something else in another batch: '{key}'; draw by row, as `rng.normal` does"
        expect_close(joined, expected, 1e-5, message, size=largest(expected))


def check_same_inputs(subject: Subject) -> None:
    """Teacher and student run on the same inputs: `predict` draws nothing and changes none of its arguments."""
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
    """In eval mode `predict` repeats exactly, whatever the global generators, and changes no buffer."""
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


@torch.no_grad()
def _loss_and_distance(subject: Subject, batches: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """For each selection of the rows: the losses of the network and of a pruned one, and their distances."""
    teacher, student, inputs = subject.network(), subject.pruned(subject.every_other()), subject.inputs()
    found = []
    for rows in batches:
        some = {key: t[rows] for key, t in inputs.items()}
        theirs, ours = subject.loss.predict(teacher, some), subject.loss.predict(student, some)
        numbers = {"loss": subject.loss.loss(theirs, some), "loss of a pruned network": subject.loss.loss(ours, some)}
        with suppress(UserError):  # an objective that cannot distil says so
            numbers["distance"] = subject.loss.distance(ours, theirs, some)
        found.append(numbers)
    return found
