"""The parts of a comparison, each a small file that is named by a hash of all that decides it: computed once."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import math
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Diverged, UserError
from ..evaluation.frechet import Frechet
from ..evaluation.metrics import HeldOutLoss
from ..protocols.data import FeatureSpace, Samples
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import prune
from ..registry.registry import record_of
from ..runtime.distributed import on_main_process
from ..runtime.files import digest, read_json, write_json
from ..runtime.progress import Tracker
from ..runtime.run_folder import RunFolder
from ..selection.base import Decisive, Selector
from ..training.recover import Recover
from ..training.trainer import INDIFFERENT, Trainer
from .legacy_keys import Name, then
from .results import Trial


class Cells:
    """What has been computed, as files; and the way to compute the rest.

    Args:
        task: what to prune.
        recover: how to heal.
        trainer: how to train, whatever its seed.
        folder: holds `cells/`.
        progress: moves on with every cell that is asked for.
        metrics: what to measure.
    """

    def __init__(
        self,
        task: Task,
        recover: Recover,
        trainer: Trainer,
        folder: RunFolder,
        progress: Tracker,
        metrics: tuple[HeldOutLoss, Frechet | None],
    ) -> None:
        self.task, self.recover, self.folder, self.progress = task, recover, folder, progress
        self.trainer = replace(trainer, trackers=())  # hundreds of short trainings, whose logs go when they are done
        self.held_out, self.frechet = metrics
        self.accelerator = trainer.accelerator
        self.features = None if self.frechet is None else _features(self.frechet.space(task))
        loss = _described(task.loss)
        self.sampling = {name: loss.pop(name) for name in task.loss.sampling_options() if name in loss}
        config = task.backbone.config(task.teacher)
        network = [_described(task.backbone), _described(config), _weights(task.teacher)]
        self.training = {"network": network, "loss": loss, "data": _identity(task.train, 256)}
        self.measuring = {
            "network": network,
            "loss": loss,
            "data": _identity(task.held_out, len(task.held_out)),
            "metric": _described(self.held_out, "batch_size"),
            "precision": self.accelerator.mixed_precision,
        }

    def decide(self, name: str, selector: Selector, seed: int) -> Trial:
        """Let a candidate choose. The trial has no losses yet. Raises UserError, naming the candidate, if it cannot."""
        trainer = replace(self.trainer, seed=seed)

        def work(folder: RunFolder) -> dict[str, Any]:
            start = time.monotonic()
            try:
                decision = selector(self.task, trainer, folder)
            except UserError as e:
                raise type(e)(f"candidate '{name}', seed {seed}: {e}") from e  # another process's stays one
            seconds = folder.spent(time.monotonic() - start)
            cost = decision.provenance.get("evaluations", 0)
            scores = decision.provenance.get("scores")
            scores = None if scores is None else [_finite(s) for s in scores]
            return {"kept": list(decision.kept), "scores": scores, "seconds": seconds, "evaluations": cost}

        key = {**self.training, **_stage(selector, selector.decisive(trainer)), **selector.inputs()}
        made = self._cell("decision", key, f"{name}, seed {seed}: choosing", work)
        self.progress.advance()
        kept, scores = tuple(made.pop("kept")), made.pop("scores")
        return Trial(name, seed, kept, scores=None if scores is None else tuple(scores), **made)

    def calibrate(self, kept: Sequence[int]) -> float | None:
        """The held-out loss of the network with these blocks alone, without any recovery."""

        def work(folder: RunFolder) -> dict[str, Any]:
            return {"loss": self._loss(prune(self.task, self._decision(kept)))}

        key = {**self.measuring, "kept": list(kept)}
        loss: float | None = self._cell("calibration", key, "loss right after pruning", work)["loss"]
        return loss

    def heal(self, trial: Trial, full: bool = False) -> Trial:
        """Prune and recover as the trial says; with `full`, measure the Fréchet distance too. None if it diverges."""
        calibration = self.calibrate(trial.kept)
        trainer = replace(self.trainer, seed=trial.seed)
        extra = self.frechet if full else None
        # What a change of the sampling or of the features changes is the distance alone.
        measured = [_described(extra, "batch_size", "features"), self.sampling, self.features]
        name, old = ("loss", "loss") if extra is None else (digest(measured), digest(then(measured)))

        def work(folder: RunFolder) -> dict[str, Any]:
            decision = self._decision(trial.kept)
            try:
                student = self.recover(self.task, prune(self.task, decision), decision, trainer, folder)
            except Diverged:
                return {"loss": None, name: None}
            figures = {"loss": self._loss(student)}
            if extra is not None:
                distance = extra(self.task, {"recovered": student}, trainer)[0].values["recovered"]
                figures[name] = _finite(distance)
            return figures

        key = {
            **{f"training {k}": v for k, v in self.training.items()},
            **self.measuring,
            **_stage(self.recover, Decisive(trainer.with_batch_size(self.recover.batch_size), but=("batch_size",))),
            "patience": trainer.max_skipped,  # decides what has diverged
            "kept": list(trial.kept),
        }
        what = f"{trial.method or 'random subset'}, seed {trial.seed}: recovering"
        figures = self._cell("healing", key, what, work, needs=(name, old))
        self.progress.advance()
        frechet = None if extra is None else figures[name if name in figures else old]
        return replace(trial, calibration=calibration, healed=figures["loss"], frechet=frechet)

    def _cell(
        self,
        kind: str,
        key: Mapping[str, Any],
        what: str,
        work: Callable[[RunFolder], dict[str, Any]],
        needs: Sequence[str] = (),
    ) -> dict[str, Any]:
        """The content of a cell; computed in a folder of its own, where checkpoints outlive a kill, if it is missing.

        What was begun under the name of an old key, or finished, keeps that name.

        Args:
            kind: first part of the file's name.
            key: all that decides the content.
            what: to show while it is computed.
            work: computes it.
            needs: one of these entries must be there, or it has to be computed again.
        """
        folder = self.folder / "cells"

        def named() -> str:
            new, old = (f"{kind}-{digest(k)[:24]}" for k in (key, then(key)))
            there = (name for name in (new, old) if (folder / f"{name}.json").exists() or (folder / name).exists())
            return next(there, new)

        name = on_main_process(named)  # the others may describe it otherwise
        path, scratch = folder / f"{name}.json", RunFolder(folder / name)
        before = on_main_process(lambda: read_json(path) if path.exists() else {})
        made: dict[str, Any] = {}
        if not before or (needs and before.keys().isdisjoint(needs)):
            self.progress.tell(what)
            if self.accelerator.is_main_process:  # for those who watch
                now = {"cell": name, "what": what, "done": self.progress.done, "total": self.progress.total}
                write_json(folder / "now.json", now)
            made = work(scratch)

        def keep() -> dict[str, Any]:
            if made:
                write_json(path, {**before, **made, "of": dict(key)})
            shutil.rmtree(scratch.path, ignore_errors=True)
            content: dict[str, Any] = read_json(path)
            del content["of"]
            return content

        return on_main_process(keep)

    def _decision(self, kept: Sequence[int]) -> Decision:
        """Says nothing of groups, so that taps, and with them the recovery, follow from the kept blocks alone."""
        return Decision(blocks=tuple(self.task.blocks), kept=tuple(kept), method="comparison")

    def _loss(self, model: nn.Module) -> float | None:
        model.to(self.accelerator.device)
        return _finite(self.held_out(self.task, {"model": model}, self.trainer)[0].values["model"])


NEUTRAL = "neutral"
"""In the metadata of a field that was added later: the value that means what was done before there was the field."""


def _described(value: Any, *but: str) -> Any:
    """Settings as JSON, those of these names left out. What cannot be told is never described in the same way twice.

    Every field is there, also at its default: were it not, a default could change and the key would not. A field that
    is added later says in its metadata which value is `NEUTRAL`, and is left out while it has that one, so that what
    was computed before still counts. That value is written down once and for all; the default may move away from it.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {f: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in but}
        told = {f.name: _described(v) for f, v in own.items() if NEUTRAL not in f.metadata or v != f.metadata[NEUTRAL]}
        return {"class": _described(type(value)), **told}
    if isinstance(value, functools.partial):
        return [_described(v) for v in (value.func, value.args, value.keywords)]
    if isinstance(value, type) and "<locals>" not in value.__qualname__:
        plugin = record_of(value)
        return [Name.of(value), plugin["sha256"]] if "file" in plugin else Name.of(value)
    if inspect.isfunction(value) and value.__qualname__.isidentifier() and value.__closure__ is None:
        with suppress(OSError):
            return [Name.of(value), digest(inspect.getsource(value))]
    if isinstance(value, Mapping):
        return {str(k): _described(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(v) for v in value]
    if isinstance(value, (float, Path, Enum, torch.dtype, torch.device)):
        return repr(value)  # JSON has no infinity
    return value if value is None or isinstance(value, (bool, int, str)) else uuid.uuid4().hex


def _stage(stage: Selector | Recover, decisive: Decisive) -> dict[str, Any]:
    """A stage and how it trains, but for what changes no number; of two batch sizes the one that counts."""
    how = _described(decisive.trainer, *INDIFFERENT, *decisive.but_of_trainer)
    how["precision"] = decisive.trainer.accelerator.mixed_precision
    return {"stage": _described(stage, *decisive.but), "trainer": how}


def _features(space: FeatureSpace) -> Any:
    """What tells a feature space from others, as far as it can be seen from outside."""
    weights = _weights(space) if isinstance(space, nn.Module) else None
    own = {k: v for k, v in vars(space).items() if k != "training" and isinstance(v, (int, float, str))}
    return [_described(type(space)), space.name, weights, _described(own)]


def _weights(model: nn.Module) -> str:
    return _hash(sorted(model.state_dict().items()))


def _identity(data: Samples, most: int) -> list[Any]:
    """What tells a data set from others: its length and some of its samples, evenly spaced, or all of them."""
    size = len(data)
    num = min(size, most)
    some = [i * (size - 1) // max(1, num - 1) for i in range(num)]
    parts = [some[first : first + 256] for first in range(0, num, 256)]
    return [size, digest([_hash(sorted(data.__getitems__(part).items())) for part in parts])]


def _hash(tensors: Sequence[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256()
    for name, t in tensors:
        found.update(f"{name} {list(t.shape)} {t.dtype}".encode())
        found.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
