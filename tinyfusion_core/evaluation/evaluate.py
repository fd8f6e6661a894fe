"""Evaluate teacher and students with metrics, and make sure that the teacher knows its objective."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..parsing.records import read_as
from ..protocols.task import Task
from ..protocols.undisturbed import evaluating
from ..registry.registry import registry
from ..runtime.distributed import batches, map_sharded, on_main_process
from ..runtime.files import write_json
from ..training.trainer import Trainer
from .metrics import Measurement, Metric, Models, Size, held_out_inputs

AGAIN = "delete it to measure that again"


def check_teacher(task: Task, trainer: Trainer) -> None:
    """Check that the teacher performs its objective, on up to 256 held-out samples, and that it knows their labels.

    Raises:
        UserError: its loss is not below 0.9 of the loss of an untrained network, see `LossAdapter.trivial`, or is lower
            with the labels of other samples.
    """
    num = min(256, len(task.held_out))
    model = task.teacher.to(trainer.accelerator.device)

    def work(rows: range) -> Tensor:
        inputs = held_out_inputs(task, trainer, rows, num)
        with torch.no_grad(), trainer.accelerator.autocast():
            prediction = task.loss.predict(model, inputs)
            learned = task.loss.loss(prediction, inputs)
            nothing = task.loss.trivial(prediction, inputs)
            trivial = torch.full_like(learned, torch.nan) if nothing is None else task.loss.loss(nothing, inputs)
            shuffled = _shuffled(inputs, task.conditions)
            others = learned if shuffled is None else task.loss.losses(model, shuffled)
            return torch.stack([learned, trivial, others]).double().cpu()

    with evaluating(model):
        learned, trivial, others = torch.cat(map_sharded(batches(num, 32), work), dim=1)
    known = not trivial.isnan().any()
    if known and not learned.mean() < 0.9 * trivial.mean():
        raise UserError(
            f"the teacher's loss on {num} held-out samples is {learned.mean():.4g}, "
            f"that of a network that has learned nothing {trivial.mean():.4g}: "
            "is it the right checkpoint for this backbone, this loss (its settings: noise or velocity, time steps, "
            "pooling) and this data (its tokenizer, its scale, the order of its classes)?"
        )
    _check_labels(learned, others)


def _shuffled(inputs: Mapping[str, Tensor], conditions: str) -> dict[str, Tensor] | None:
    """The inputs with the labels of the next samples, (batch, ...) each; None if there are no labels."""
    labels = inputs.get(conditions)
    if labels is None or labels.ndim != 1 or labels.is_floating_point():
        return None
    return {**inputs, conditions: labels.roll(1)}


def _check_labels(given: Tensor, others: Tensor) -> None:
    """Raise UserError, or warn, if the losses of samples, (samples,), are no lower than with the labels of others."""
    differ = others != given  # not where labels agree or are dropped
    given, others = given[differ], others[differ]
    if len(given) < 32:
        return  # too few, or a network without labels
    worse = others - given
    sure = float(worse.mean() / (worse.std() / len(worse) ** 0.5))
    if sure > 2:
        return
    text = (
        f"the teacher's loss on {len(given)} held-out samples is {given.mean():.4g} with their labels, and "
        f"{others.mean():.4g} with those of others: are the classes of the data in the order of the checkpoint?"
    )
    if sure < 0:
        raise UserError(text)
    warnings.warn(text, stacklevel=2)


def with_standing(metrics: Sequence[Metric]) -> list[Metric]:
    """Return these metrics, and the standing ones that are not among them."""
    given = {type(metric) for metric in metrics}
    return [*metrics, *(cls() for cls in _known() if cls.standing and cls not in given)]


def known_exhibits() -> set[str]:
    """Return the names of the files that any metric leaves in a run folder."""
    return {name for cls in _known() for name in cls.exhibits}


def _known() -> Iterable[type[Metric]]:
    return registry().classes["metric"].values()


def evaluate(
    task: Task, models: Models, metrics: Sequence[Metric], trainer: Trainer, folder: Path | None = None
) -> list[Measurement]:
    """Measure sizes, then every metric in turn. A collective call; all processes get the results.

    Args:
        task: objective and data.
        models: the networks.
        metrics: what to measure besides sizes.
        trainer: device, precision and seed.
        folder: keeps finished metrics, and finished parts of long ones, for the same call to resume; on a disk that all
            processes see.
    """
    device = trainer.accelerator.device
    ready = {name: model.to(device) for name, model in models.items()}
    with evaluating(*ready.values()):
        return [
            measurement
            for i, metric in enumerate([Size(), *metrics])
            for measurement in measure(metric, task, ready, trainer, None if folder is None else folder / str(i))
        ]


def measure(
    metric: Metric, task: Task, models: Models, trainer: Trainer, folder: Path | None = None
) -> list[Measurement]:
    """Return the results of a metric; computed unless an earlier call has stored them. A collective call.

    Args:
        metric: what to measure.
        task: objective and data.
        models: the networks, in eval mode on the trainer's device.
        trainer: device, precision and seed.
        folder: for parts that an interrupted measurement leaves; the results are stored beside it.
    """
    record = None if folder is None else folder.with_name(f"{folder.name}.json")
    before = on_main_process(
        lambda: None if record is None or not record.exists() else read_as(record, list[Measurement], AGAIN)
    )
    if before is not None:
        return before

    def work() -> list[Measurement]:
        return metric(task, models, trainer) if folder is None else metric.resume(task, models, trainer, folder)

    made = [_finite(m) for m in (work() if metric.together else on_main_process(work))]
    if record is not None:
        on_main_process(lambda: write_json(record, [asdict(m) for m in made]))
    return made


def _finite(measurement: Measurement) -> Measurement:
    """Replace values that are not finite by None, and say so in the note."""
    bad = [name for name, v in measurement.values.items() if v is not None and not math.isfinite(v)]
    if not bad:
        return measurement
    values = {name: None if name in bad else v for name, v in measurement.values.items()}
    return replace(measurement, values=values, note=f"{measurement.note}; not finite: {', '.join(bad)}".lstrip("; "))
