"""Quality of generated images: FID, sFID, inception score, KID, precision and recall."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from tinyfusion_core.errors import MissingFileError, UserError, require
from tinyfusion_core.evaluation.metrics import Measurement, Metric, Models
from tinyfusion_core.parsing.weights import read_weights
from tinyfusion_core.protocols.task import Task
from tinyfusion_core.runtime.distributed import batches, complete_sharded, on_main_process
from tinyfusion_core.runtime.files import save_tensors
from tinyfusion_core.training.trainer import Trainer
from tinyfusion_images.image_sets import ImageSet, open_images, rgb
from tinyfusion_images.inception import INCEPTION, INCEPTION_FILE, FeatureNetwork, fetch_inception, inception_weights
from tinyfusion_images.pictures import artist, asked_for, can_draw, pictures, published_by, shown_by

MOST_IN_SUBSET = 1000
"""Images in a subset of the KID, if there are as many."""
NEIGHBOURS = 3
"""Precision and recall count images as alike if they are closer than an image's third neighbour."""
BETTER = {
    "FID": "lower",
    "sFID": "lower",
    "inception score": "higher",
    "KID": "lower",
    "precision": "higher",
    "recall": "higher",
}
KEY = "evaluate: Fidelity"


@dataclass(frozen=True)
class Fidelity(Metric):
    """FID, sFID, inception score, KID, precision and recall of generated images, by torch-fidelity.

    Samples have balanced labels and are those that `tinyfusion sample --to` writes with the run's seed. The report
    names the features and the reference: results are comparable only if both are the same.

    Args:
        num_samples: images to generate with each model, from the same noise and labels.
        batch_size: images per batch.
        reference: the real images: a folder of images, or an .npz of ADM's (if it has statistics of a larger set, the
            FID is the distance to those, and the sFID if they are there for it); default the training data, decoded.
        num_reference: of the training data, this many, evenly spaced.
        features: name of the network, as torch-fidelity knows it or a plugin has registered it.
        weights: its file, safetensors or a torch file of plain tensors; default for Inception the one in torch's hub
            folder, for others whatever they use by default.
        download: download torch-fidelity's Inception weights if they are missing, when they are first needed.
        pruned: also evaluate networks right after pruning.
    """

    num_samples: int = 50_000
    batch_size: int = 64
    reference: str | None = None
    num_reference: int = 50_000
    features: str = INCEPTION
    weights: str | None = None
    download: bool = False
    pruned: bool = False
    together = True

    def __post_init__(self) -> None:
        for name in ("num_samples", "num_reference"):
            require(getattr(self, name) >= 10, f"{KEY}.{name}", getattr(self, name), "at least 10")
        require(self.batch_size >= 1, f"{KEY}.batch_size", self.batch_size, "at least 1")

    @property
    @override
    def column(self) -> str:
        return self._named("FID")

    @override
    def check_task(self, task: Task) -> None:
        missing, drawn = [], published_by(task.loss) is not None
        if shown_by(task.data) is None and not (drawn and self.reference is not None):
            missing.append(
                f"{KEY} compares pictures, and data: {type(task.data).__name__} as configured does not decode any"
                + ("; name real pictures in reference" if drawn else "")
            )
        if self.reference is not None and not Path(self.reference).exists():
            missing.append(
                f"{KEY}.reference: '{self.reference}' does not exist. Put there a folder of real pictures or an .npz "
                "of ADM's (https://github.com/openai/guided-diffusion/tree/main/evaluations), or set it to null to "
                "compare with the training data"
            )
        path = self._weights
        if path is not None and not path.exists() and not (self.download and self.weights is None):
            missing.append(
                f"{KEY}.weights: '{path}' does not exist. Put there the weights of {self.features} (for Inception "
                f"{INCEPTION_FILE} of https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0), or leave weights "
                "out and set download: true"
            )
        if missing:
            raise MissingFileError("\n".join(missing))

    @override
    def __call__(self, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
        return resumed_aside(self, task, models, trainer)

    @override
    def resume(self, task: Task, models: Models, trainer: Trainer, folder: Path) -> list[Measurement]:
        if not can_draw(task):
            raise UserError(f"{KEY}: {type(task.loss).__name__} and these data give no pictures; leave it out")
        if self.download and self.weights is None and self.features == INCEPTION:
            fetch_inception()
        draw = artist(task, trainer)
        network = FeatureNetwork(self.features, self._weights, trainer.accelerator.device)
        known, real = self._known(task, trainer.accelerator.device), list[Path]()
        if (images := known.images) is not None:
            parts = batches(len(images), self.batch_size)
            name = "features of real pictures"
            real = kept_parts(folder / "real", parts, lambda rows: network(images.read(rows)), name, trainer.progress)
        statistics = (known.statistics or {}) if self.features == INCEPTION else {}

        def measure(number: int, name: str, model: nn.Module) -> dict[str, float]:
            """Nothing when the network was not to be sampled, or has diverged."""
            if name.endswith("pruned") and not self.pruned:
                return {}

            def work(rows: range) -> dict[str, Tensor]:
                images, finite = draw(model, rows, asked_for(task, model, rows))
                return {**network(rgb(images)), "finite": finite}

            parts = batches(self.num_samples, self.batch_size)
            made = kept_parts(folder / str(number), parts, work, f"samples of {name}", trainer.progress)
            return on_main_process(lambda: _figures(made, real, statistics, network))

        figures = {name: measure(i, name, model) for i, (name, model) in enumerate(models.items())}
        return self._rows(figures, known)

    def _rows(self, figures: Mapping[str, Mapping[str, float]], known: ImageSet) -> list[Measurement]:
        import torch_fidelity

        count = "" if known.images is None else f"{len(known.images):,} of "
        note = f"{self.num_samples:,} samples against {count}{self.reference or 'the training data'}"
        if known.statistics is not None and self.features == INCEPTION:
            note += f" ({', '.join(known.statistics)}: against its statistics)"
        note += f"; features: {self.features}, torch-fidelity {torch_fidelity.__version__}"
        if self.features != INCEPTION:
            note += "; no sFID, which Inception alone has"
        if idle := [name for name, found in figures.items() if not found]:
            note += f"; not sampled, or not finite: {', '.join(idle)}"
        return [
            Measurement(self._named(what), {name: f.get(what) for name, f in figures.items()}, better=better, note=note)
            for what, better in BETTER.items()
            if what != "sFID" or self.features == INCEPTION
        ]

    def _named(self, what: str) -> str:
        """The name of a measurement, with the features unless they are the usual ones."""
        return what if self.features == INCEPTION else f"{what} ({self.features})"

    def _known(self, task: Task, device: torch.device) -> ImageSet:
        """The real images."""
        if self.reference is not None:
            known = open_images(Path(self.reference), f"{KEY}.reference")
        else:
            known = ImageSet(_Training(task, min(self.num_reference, len(task.train)), device))
        if known.images is not None and len(known.images) < 10:
            raise UserError(f"{KEY}: {len(known.images)} real pictures are too few; expected at least 10")
        return known

    @property
    def _weights(self) -> Path | None:
        """The path of the weights; None if the network finds them itself."""
        if self.weights is not None:
            return Path(self.weights)
        return inception_weights() if self.features == INCEPTION else None


class _Training:
    """Training examples, evenly spaced, as images."""

    def __init__(self, task: Task, num: int, device: torch.device) -> None:
        self.task, self.num, self.device = task, num, device

    def __len__(self) -> int:
        return self.num

    def read(self, rows: range) -> Tensor:
        step = len(self.task.train) / self.num
        x = self.task.train.__getitems__([int(i * step) for i in rows])["x"]
        return rgb(pictures(self.task, x.to(self.device)))


def resumed_aside(metric: Metric, task: Task, models: Models, trainer: Trainer) -> list[Measurement]:
    """Call a metric's `resume` with a folder that goes afterwards. A collective call."""
    folder = on_main_process(lambda: Path(tempfile.mkdtemp(prefix="tinyfusion-")))
    try:
        return metric.resume(task, models, trainer, folder)
    finally:
        if trainer.accelerator.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def kept_parts(
    folder: Path, parts: Sequence[range], work: Callable[[range], dict[str, Tensor]], name: str, screen: bool
) -> list[Path]:
    """Compute the parts that are missing in a folder. A collective call; the processes share the work.

    Args:
        folder: where they are kept.
        parts: indices of the rows of each part.
        work: rows -> tensors by name, each (rows, ...).
        name: label of the progress bar.
        screen: whether to show it.

    Returns:
        All files, in order.
    """

    def path(rows: range) -> Path:
        return folder / f"{rows.start:08d}-{rows.stop:08d}.safetensors"

    def write(rows: range) -> None:
        save_tensors(path(rows), work(rows))

    complete_sharded(parts, lambda rows: path(rows).exists(), write, name, screen)
    return [path(rows) for rows in parts]


def _figures(
    made: Sequence[Path],
    real: Sequence[Path],
    statistics: Mapping[str, Any],
    network: FeatureNetwork,
) -> dict[str, float]:
    """All metrics that the features in files allow; empty if samples are not finite."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    ours, theirs, layers = _read(made), _read(real), network.layers
    if not ours["finite"].all():
        return {}
    found = {"inception score": isc_features_to_metric(ours[layers["isc"]])["inception_score_mean"]}
    for what in ("FID", "sFID"):
        layer = layers.get(what.lower())
        if layer is not None and (theirs or what in statistics):
            known = statistics.get(what) or fid_features_to_statistics(theirs[layer].double())
            generated = fid_features_to_statistics(ours[layer].double())
            found[what] = fid_statistics_to_metric(generated, known, verbose=False)["frechet_inception_distance"]
    if theirs:
        layer = layers["kid"]
        size = min(MOST_IN_SUBSET, len(ours[layer]), len(theirs[layer]))
        kid = kid_features_to_metric(ours[layer], theirs[layer], kid_subset_size=size, verbose=False)
        found["KID"] = kid["kernel_inception_distance_mean"]
        both = ours[layers["prc"]].to(network.device), theirs[layers["prc"]].to(network.device)
        how = {"prc_neighborhood": NEIGHBOURS, "prc_batch_size": 2500, "save_cpu_ram": True, "verbose": False}
        found.update({k: v for k, v in prc_features_to_metric(*both, **how).items() if k != "f_score"})
    return found


def _read(paths: Sequence[Path]) -> dict[str, Tensor]:
    parts = [read_weights(path) for path in paths]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in parts[0]} if parts else {}
