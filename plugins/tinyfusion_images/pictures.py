"""Examples as images, and the ones that every run shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.dataloading.mixture import Mixture
from tinyfusion_core.errors import UserError
from tinyfusion_core.evaluation.generation import balanced_labels, sample_rows, training_conditions
from tinyfusion_core.evaluation.metrics import Measurement, Metric, Models
from tinyfusion_core.parsing.records import read_as
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.protocols.data import DataSource
from tinyfusion_core.protocols.loss import LossAdapter
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.reporting.measured import results
from tinyfusion_core.reporting.page import Figures, Picture
from tinyfusion_core.runtime.distributed import batches, local_share, map_sharded, on_main_process
from tinyfusion_core.runtime.files import save_tensors, write_json
from tinyfusion_core.runtime.run_folder import RunFolder
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_core.training.trainer import Trainer
from tinyfusion_images.grids.drawing import draw_grid

SAMPLES = "samples.safetensors"
"""File in the run folder with the images that the report shows."""
PROMPTS = "prompts.json"
"""File in the run folder with the prompts of these images."""
LARGEST_SIDE = 320
"""Pixels of an image in the report, which holds all of them."""
NUM_SHOWN = 40
"""Images of each network, in the file."""
NUM_IN_REPORT = 12
"""Images of each network in the report, of labels as different as there are."""
AT_ONCE = 4
"""Images that a pipeline makes at once, for people to look at."""


@runtime_checkable
class Shown(Protocol):
    """The method of a data source whose examples can be shown as images; it need not derive from this class.

    If that depends on its settings, it also has a property `has_pixels`: whether `pixels` returns images; known before
    any file is read.
    """

    def pixels(self, x: Tensor) -> Tensor | None:
        """Convert examples to images that can be shown.

        Args:
            x: (batch, ...) examples.

        Returns:
            (batch, channels, height, width) values in [0, 1]; None if examples cannot be shown.
        """
        ...


def shown_by(data: DataSource | None) -> Shown | None:
    """Return what shows examples as images, of a mixture its first part; None if it cannot. Reads no file."""
    while isinstance(data, Mixture):
        data = next(iter(data.parts.values()))
    return data if isinstance(data, Shown) and bool(getattr(data, "has_pixels", True)) else None


def has_pictures(task: Task) -> bool:
    """Return whether the task's examples can be shown as images."""
    x, data = task.backbone.example(1).get("x"), shown_by(task.data)
    return x is not None and data is not None and data.pixels(x) is not None


def pictures(task: Task, x: Tensor) -> Tensor:
    """Convert examples to images.

    Args:
        task: its data source decodes them.
        x: (n, ...) examples; latents are decoded on their device.

    Returns:
        (n, channels, height, width) uint8 on the CPU; black where a network has diverged.

    Raises:
        UserError: the data cannot be shown.
    """
    data = shown_by(task.data)
    pixels = None if data is None else data.pixels(x)
    if pixels is None:
        raise UserError(f"data: {type(task.data).__name__} cannot show its examples as pictures")
    return (255 * pixels.nan_to_num()).round().to(torch.uint8).cpu()


@runtime_checkable
class Published(Protocol):
    """A published pipeline that makes pictures, as an objective's `pipeline`; it need not derive from this class."""

    @property
    def texts(self) -> Sequence[str]:
        """The prompts; empty where it takes class labels."""
        ...

    def opened(self) -> Callable[[nn.Module, Sequence[int], Sequence[torch.Generator]], Tensor]:
        """Return what makes pictures.

        It takes a network, for every picture the number of its prompt or its class label, and the generator that its
        noise is drawn from. It returns (batch, 3, height, width) values in [0, 1].
        """
        ...


def published_by(loss: LossAdapter) -> Published | None:
    """Return the pipeline that makes pictures of an objective's networks; None if their samples are decoded, if any."""
    found = getattr(loss, "pipeline", None)
    return found if isinstance(found, Published) else None


def can_draw(task: Task) -> bool:
    """Return whether pictures can be made of the task's networks."""
    return published_by(task.loss) is not None or (task.loss.generates and has_pictures(task))


def asked_for(task: Task, model: nn.Module, rows: range) -> Tensor:
    """Return what pictures with these indices are made for: prompts in turn, by number, (n,), or balanced labels."""
    if (pipeline := published_by(task.loss)) is not None and pipeline.texts:
        return torch.tensor([i % len(pipeline.texts) for i in rows])
    return balanced_labels(task, model, rows)


Draw = Callable[[nn.Module, range, Tensor], tuple[Tensor, Tensor]]
"""Makes the pictures with these indices, of a network and (n, ...) conditions: (n, channels, height, width) uint8 on
the CPU, and (n,) whether what they show was finite."""


def artist(task: Task, trainer: Trainer) -> Draw:
    """Return what makes pictures, if `can_draw`. Picture i follows from the trainer's seed and i, for every network."""
    pipeline = published_by(task.loss)

    def decoded(model: nn.Module, rows: range, conditions: Tensor) -> tuple[Tensor, Tensor]:
        x = sample_rows(task, model, trainer, rows, conditions)
        return pictures(task, x), torch.isfinite(x).flatten(1).all(1).cpu()

    if pipeline is None:
        return decoded
    opened = pipeline.opened()

    def drawn(model: nn.Module, rows: range, conditions: Tensor) -> tuple[Tensor, Tensor]:
        streams = [generator(trainer.seed, "pictures", row) for row in rows]
        with torch.no_grad(), trainer.accelerator.autocast():
            pixels = opened(model, conditions.tolist(), streams).cpu()
        return (255 * pixels.nan_to_num()).round().to(torch.uint8), torch.isfinite(pixels).flatten(1).all(1)

    return drawn


def gallery(
    task: Task, model: nn.Module, trainer: Trainer, draw: Draw, num: int, batch_size: int, name: str
) -> tuple[Tensor, Tensor]:
    """Make some pictures to look at: for the first prompts, or the conditions of the first training samples.

    A collective call; the processes share the work.

    Args:
        task: objective and data.
        model: the network, in eval mode.
        trainer: device, precision and seed.
        draw: what `artist` returned.
        num: how many pictures, n.
        batch_size: pictures per batch; a pipeline makes a few at once.
        name: label of the progress bar.

    Returns:
        Pictures (n, channels, height, width) uint8, and what they were made for, (n, ...).
    """
    by_pipeline = published_by(task.loss) is not None
    told = asked_for(task, model, range(num)) if by_pipeline else training_conditions(task, range(num))
    parts = batches(num, min(batch_size, AT_ONCE) if by_pipeline else batch_size)
    with trainer.track(name, sum(map(len, local_share(parts)))) as progress:

        def work(rows: range) -> Tensor:
            images, _ = draw(model, rows, told[rows.start : rows.stop])
            progress.advance(len(rows))
            return images

        return torch.cat(map_sharded(parts, work)), told


def by_label(images: Tensor, labels: Tensor) -> Tensor:
    """Sort images, (n, ...), by their labels, (n,). Unchanged if the labels are not single numbers."""
    return images[labels.argsort(stable=True)] if labels.ndim == 1 else images


@dataclass(frozen=True)
class Pictures(Metric):
    """Measures nothing; shows in every run what the networks generate, if the data can be shown as images.

    `samples.safetensors` in the run folder contains images of each network from the same noise, (n, channels, height,
    width) uint8, and the conditions that they were generated for, `labels` (n, ...); `prompts.json` the prompts, if
    there are any, which the labels number.
    """

    together = True
    standing = True
    exhibits = (SAMPLES, PROMPTS)
    column = None

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        return []

    @override
    def resume(self, task: Task, models: Models, trainer: Trainer, folder: Path) -> list[Measurement]:
        if not can_draw(task):
            return []
        draw, made = artist(task, trainer), dict[str, Tensor]()
        num = NUM_SHOWN if published_by(task.loss) is None else NUM_IN_REPORT  # pipelines take seconds for each
        for name, model in models.items():
            made[name], labels = gallery(task, model, trainer, draw, num, num, f"pictures of {name}")

        def keep() -> None:
            save_tensors(folder / SAMPLES, {**made, "labels": labels})
            if (pipeline := published_by(task.loss)) is not None and pipeline.texts:
                write_json(folder / PROMPTS, list(pipeline.texts[: int(labels.max()) + 1]))

        on_main_process(keep)
        return []

    @override
    def show(self, folder: RunFolder) -> list[Figures]:
        if not (folder / SAMPLES).exists():
            return []
        images, grids = read_weights(folder / SAMPLES), []
        labels = images.pop("labels")
        chosen = _spread_over(labels, NUM_IN_REPORT)
        below = [str(label) for label in labels[chosen].tolist()] if labels.ndim == 1 else None
        for name in [n for n in results(folder)[0] if n in images]:
            path = folder / "figures" / f"samples_{name.replace(' ', '_')}.png"
            draw_grid(_shrunk(images[name][chosen]), path, columns=4, below=below)
            grids.append(Picture(path, name))
        caption = "The same noise and label at the same place in every grid."
        if (folder / PROMPTS).exists():
            told = [shorten(text, 120) for text in read_as(folder / PROMPTS, list[str], "delete it")]
            caption += " The prompts are " + "; ".join(f"{i}: {text}" for i, text in enumerate(told)) + "."
        elif below:
            caption += " The labels are below the images."
        return [Figures("Samples", caption, grids, command="tinyfusion sample {run} --num 64")]


def _shrunk(images: Tensor) -> Tensor:
    """Images (n, channels, height, width) uint8, made no larger than a page has room for."""
    factor = LARGEST_SIDE / max(images.shape[2:])
    size = [max(1, round(side * factor)) for side in images.shape[2:]]
    return images if factor >= 1 else nn.functional.interpolate(images.float(), size, mode="area").round().byte()


def _spread_over(labels: Tensor, num: int) -> Tensor:
    """Return the indices of at most `num` samples, of every label in turn; the first ones if labels are no numbers."""
    if labels.ndim != 1:
        return torch.arange(min(num, len(labels)))
    order = labels.argsort(stable=True)
    turn = torch.cat([torch.arange(count) for count in Counter(labels[order].tolist()).values()])
    first = order[turn.argsort(stable=True)][:num]  # the first of every label, then the second
    return first[labels[first].argsort(stable=True)]
