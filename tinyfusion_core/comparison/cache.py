"""The result cache of a comparison: one small file per result, named by a hash of everything that decides it."""

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
from ..evaluation.evaluate import measure
from ..evaluation.metrics import HeldOutLoss, Metric
from ..protocols.data import FeatureSpace, Samples
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import prune
from ..registry.registry import record_of
from ..runtime.distributed import on_main_process
from ..runtime.files import NEUTRAL, digest, write_json
from ..runtime.progress import Tracker
from ..runtime.run_folder import NOW, RESULT_CACHE, RunFolder
from ..selection.base import Decisive, Selector
from ..training.recover import Recover
from ..training.trainer import NUMERICALLY_NEUTRAL, Trainer
from .cached_results import read_cached
from .legacy_keys import Name, then
from .results import Entry


class ResultCache:
    """Cached results, one JSON file each, and how to compute the missing ones.

    Args:
        task: what to prune.
        recovery: how every subset is recovered.
        trainer: how to train; its seed is ignored.
        folder: holds `cells/`, the folder of the files.
        progress: advances with every result that is asked for.
        held_out: how the losses are measured.
        metrics: what else to measure of the candidates' networks, by the name of its column.
    """

    def __init__(
        self,
        task: Task,
        recovery: Recover,
        trainer: Trainer,
        folder: RunFolder,
        progress: Tracker,
        held_out: HeldOutLoss,
        metrics: Mapping[str, Metric],
    ) -> None:
        self.task, self.recovery, self.folder, self.progress = task, recovery, folder, progress
        self.trainer = replace(trainer, trackers=())  # hundreds of short trainings, whose logs go when they are done
        self.held_out, self.metrics = held_out, metrics
        self.accelerator = trainer.accelerator
        loss = _described(task.loss)
        sampling = {name: loss.pop(name) for name in task.loss.sampling_options() if name in loss}
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
        # What a change of the sampling or of the features changes is the metrics alone.
        features = _features(task.feature_space) if metrics and task.feature_space is not None else None
        keys = {column: [_described(metric, "batch_size"), sampling, features] for column, metric in metrics.items()}
        self.figures = {column: (digest(key), digest(then(key))) for column, key in keys.items()}
        """Names of the metrics' values in a file: now, and in files of earlier versions."""

    def decide(self, name: str, selector: Selector, seed: int) -> Entry:
        """Let a candidate choose blocks. The entry has no losses yet.

        Raises:
            UserError: the candidate cannot decide; names it.
        """
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
        made = self._cached("decision", key, f"{name}, seed {seed}: choosing", work)
        self.progress.advance()
        kept, scores = tuple(made.pop("kept")), made.pop("scores")
        return Entry(name, seed, kept, scores=None if scores is None else tuple(scores), **made)

    def calibrate(self, kept: Sequence[int]) -> float | None:
        """Return the held-out loss of the network with only these blocks, without recovery; None if not finite."""

        def work(folder: RunFolder) -> dict[str, Any]:
            return {"loss": self._loss(prune(self.task, self._decision(kept)))}

        key = {**self.measuring, "kept": list(kept)}
        loss: float | None = self._cached("calibration", key, "loss right after pruning", work)["loss"]
        return loss

    def recover(self, entry: Entry, full: bool = False) -> Entry:
        """Prune and recover an entry; with `full`, measure all metrics too. The loss is None if it diverges."""
        calibration = self.calibrate(entry.kept)
        trainer = replace(self.trainer, seed=entry.seed)
        figures_of = self.figures if full else {}

        def work(folder: RunFolder) -> dict[str, Any]:
            decision = self._decision(entry.kept)
            try:
                student = self.recovery(self.task, prune(self.task, decision), decision, trainer, folder)
            except Diverged:
                return {"loss": None, **{name: None for name, _ in figures_of.values()}}
            figures = {"loss": self._loss(student)}
            for column, (name, _) in figures_of.items():
                found = measure(
                    self.metrics[column], self.task, {"recovered": student}, trainer, folder / "evaluation" / name
                )
                figures[name] = found[0].values["recovered"] if found else None
            return figures

        key = {
            **{f"training {k}": v for k, v in self.training.items()},
            **self.measuring,
            **_stage(self.recovery, Decisive(trainer.with_batch_size(self.recovery.batch_size), but=("batch_size",))),
            "patience": trainer.max_skipped,  # decides what has diverged
            "kept": list(entry.kept),
        }
        what = f"{entry.method or 'random subset'}, seed {entry.seed}: recovering"
        figures = self._cached("healing", key, what, work, needs=list(figures_of.values()))
        self.progress.advance()
        metrics = {column: figures[new if new in figures else old] for column, (new, old) in figures_of.items()}
        known = {column: value for column, value in metrics.items() if value is not None}
        return replace(entry, calibration=calibration, recovered=figures["loss"], metrics=known)

    def _cached(
        self,
        kind: str,
        key: Mapping[str, Any],
        what: str,
        work: Callable[[RunFolder], dict[str, Any]],
        needs: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """Return a cached result, or compute it in a folder of its own, where checkpoints survive a kill.

        A result that was begun or finished under its old key keeps that name.

        Args:
            kind: first part of the file name.
            key: everything that decides the content.
            what: to show while it is computed.
            work: computes it.
            needs: pairs of names; if neither of a pair is in the file, it is computed again.
        """
        folder, depth = self.folder / RESULT_CACHE, len(self.task.blocks)

        def named() -> str:
            new, old = (f"{kind}-{digest(k)[:24]}" for k in (key, then(key)))
            there = (name for name in (new, old) if (folder / f"{name}.json").exists() or (folder / name).exists())
            return next(there, new)

        name = on_main_process(named)  # the others may describe it otherwise
        path, scratch = folder / f"{name}.json", RunFolder(folder / name)
        before = on_main_process(lambda: read_cached(kind, path, depth) if path.exists() else {})
        made: dict[str, Any] = {}
        if not before or any(before.keys().isdisjoint(names) for names in needs):
            self.progress.tell(what)
            if self.accelerator.is_main_process:  # for those who watch
                now = {"part": name, "what": what, "done": self.progress.done, "total": self.progress.total}
                write_json(folder / NOW, now)
            made = work(scratch)

        def keep() -> dict[str, Any]:
            if made:
                write_json(path, {**before, **made, "of": dict(key)})
            shutil.rmtree(scratch.path, ignore_errors=True)
            return {name: value for name, value in read_cached(kind, path, depth).items() if name != "of"}

        return on_main_process(keep)

    def _decision(self, kept: Sequence[int]) -> Decision:
        """Without groups, so that taps, and with them the recovery, follow from the kept blocks alone."""
        return Decision(blocks=tuple(self.task.blocks), kept=tuple(kept), method="comparison")

    def _loss(self, model: nn.Module) -> float | None:
        model.to(self.accelerator.device)
        return _finite(self.held_out(self.task, {"model": model}, self.trainer)[0].values["model"])


def _described(value: Any, *but: str) -> Any:
    """Settings as JSON, without the given names. A value that cannot be described is never the same twice."""
    if isinstance(value, FeatureSpace):
        return _features(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _settings(value, but)
    if isinstance(value, functools.partial):
        return [_described(v) for v in (value.func, value.args, value.keywords)]
    if (name := _definition(value)) is not None:
        return name
    if isinstance(value, Mapping):
        return {str(k): _described(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_described(v) for v in value]
    if isinstance(value, (float, Path, Enum, torch.dtype, torch.device)):
        return repr(value)  # JSON has no infinity
    return value if value is None or isinstance(value, (bool, int, str)) else uuid.uuid4().hex


def _settings(value: Any, but: Sequence[str]) -> dict[str, Any]:
    """The class and the fields of a dataclass, without the given names.

    Every field is included, also at its default: otherwise a default could change and the key would not. A field that
    is added later says in its metadata which value is `NEUTRAL`, and is left out while it has that value, so that
    earlier results stay valid. That value is fixed for good; the default may change.
    """
    own = {f: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in but}
    told = {f.name: _described(v) for f, v in own.items() if NEUTRAL not in f.metadata or v != f.metadata[NEUTRAL]}
    return {"class": _described(type(value)), **told}


def _definition(value: Any) -> Name | list[Any] | None:
    """A class or function by its name, with what distinguishes it from others of that name; None if nothing does."""
    if isinstance(value, type) and "<locals>" not in value.__qualname__:
        plugin = record_of(value)
        return [Name.of(value), plugin["sha256"]] if "file" in plugin else Name.of(value)
    if inspect.isfunction(value) and value.__qualname__.isidentifier() and value.__closure__ is None:
        with suppress(OSError):
            return [Name.of(value), digest(inspect.getsource(value))]
    return None


def _stage(stage: Selector | Recover, decisive: Decisive) -> dict[str, Any]:
    """A stage and its trainer, without what changes no result; of two batch sizes the one that is used."""
    how = _described(decisive.trainer, *NUMERICALLY_NEUTRAL, *decisive.but_of_trainer)
    how["precision"] = decisive.trainer.accelerator.mixed_precision
    return {"stage": _described(stage, *decisive.but), "trainer": how}


def _features(space: FeatureSpace) -> Any:
    """What distinguishes a feature space from others, as far as is visible from outside."""
    weights = _weights(space) if isinstance(space, nn.Module) else None
    own = {k: v for k, v in vars(space).items() if k != "training" and isinstance(v, (int, float, str))}
    return [_described(type(space)), space.name, weights, _described(own)]


def _weights(model: nn.Module) -> str:
    return _hash(sorted(model.state_dict().items()))


def _identity(data: Samples, most: int) -> list[Any]:
    """What distinguishes a data set from others: its length, and some evenly spaced samples or all of them."""
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
