"""The result cache of a comparison: one small file per result, named by a hash of everything that decides it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import nn

from ..errors import Diverged, UserError
from ..evaluation.evaluate import measure
from ..evaluation.metrics import HeldOutLoss, Metric
from ..parsing.records import read_as, shaped
from ..protocols.backbone import config_of
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import prune
from ..runtime.distributed import map_alone, on_main_process, rank_and_world_size
from ..runtime.files import digest, write_json
from ..runtime.progress import Tracker
from ..runtime.run_folder import NOW, RESULT_CACHE, RunFolder
from ..selection.base import Decisive, Selector
from ..training.recover import Recover
from ..training.trainer import Trainer
from .keys import data_key, described, features_key, stage_key, weights_key
from .legacy_keys import then
from .results import Entry

AGAIN = "delete it to compute that again"
NEEDED = {"decision": ("kept", "scores", "seconds", "evaluations"), "calibration": ("loss",), "healing": ("loss",)}
"""What a result of each kind has for certain."""


class CachedResult(TypedDict):
    """A result, of whichever kind, and what decides it."""

    of: dict[str, Any]
    kept: NotRequired[list[int]]
    scores: NotRequired[list[float | None] | None]
    seconds: NotRequired[float]
    evaluations: NotRequired[int]
    loss: NotRequired[float | None]


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
        self.trainer = trainer.quiet()  # hundreds of short trainings, whose logs go when they are done
        self.held_out, self.metrics = held_out, metrics
        self.accelerator, self.main = trainer.accelerator, trainer.accelerator.is_main_process
        loss = described(task.loss)
        sampling = {name: loss.pop(name) for name in task.loss.sampling_options() if name in loss}
        config = config_of(task.backbone, task.teacher)
        network = [described(task.backbone), described(config), weights_key(task.teacher)]
        self.training = {"network": network, "loss": loss, "data": data_key(task.train, 256)}
        self.measuring = {
            "network": network,
            "loss": loss,
            "data": data_key(task.held_out, len(task.held_out)),
            "metric": described(self.held_out, "batch_size"),
            "precision": self.accelerator.mixed_precision,
        }
        # What a change of the sampling or of the features changes is the metrics alone.
        features = features_key(task.feature_space) if metrics and task.feature_space is not None else None
        keys = {column: [described(metric, "batch_size"), sampling, features] for column, metric in metrics.items()}
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

        key = {**self.training, **stage_key(selector, selector.decisive(trainer)), **selector.inputs()}
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

    def recover(self, entries: Sequence[Entry], full: bool = False) -> tuple[Entry, ...]:
        """Prune and recover entries; with `full`, measure all metrics too. The loss is None if one diverges.

        Without further metrics, each is recovered by one of several processes: a latency would be that beside others.
        """
        distinct = {(entry.kept, entry.seed): entry for entry in entries}
        trainer = self.trainer.with_batch_size(self.recovery.batch_size)
        alone = None if full and self.figures else trainer.each_alone(len(distinct))
        done, share = self.progress.done, 1

        def work(entry: Entry) -> Entry:
            found = self._recovered(entry, alone or trainer, full)
            self.progress.advance(min(share, done + len(entries) - self.progress.done))
            return found

        if alone is None:
            return tuple(work(entry) for entry in entries)
        share = rank_and_world_size()[1]  # meanwhile the others have done as much
        map_alone(list(dict.fromkeys(kept for kept, _ in distinct)), self.calibrate)
        found = dict(zip(distinct, map_alone(list(distinct.values()), work), strict=True))
        self.progress.advance(done + len(entries) - self.progress.done)
        told = ((entry, found[entry.kept, entry.seed]) for entry in entries)
        return tuple(
            replace(entry, calibration=one.calibration, recovered=one.recovered, metrics=one.metrics)
            for entry, one in told
        )

    def _recovered(self, entry: Entry, trainer: Trainer, full: bool) -> Entry:
        calibration = self.calibrate(entry.kept)
        trainer = replace(trainer, seed=entry.seed)
        figures_of = self.figures if full else {}

        def work(folder: RunFolder) -> dict[str, Any]:
            decision = self._decision(entry.kept)
            try:
                student = self.recovery(self.task, prune(self.task, decision), decision, trainer, folder)
            except Diverged:
                return {"loss": None, **{name: None for name, _ in figures_of.values()}}
            figures = {"loss": self._loss(student)}
            for column, (name, _) in figures_of.items():
                where, plain = folder / "evaluation" / name, replace(self.trainer, seed=entry.seed)
                found = measure(self.metrics[column], self.task, {"recovered": student}, plain, where)
                figures[name] = found[0].values["recovered"] if found else None
            return figures

        key = {
            **{f"training {k}": v for k, v in self.training.items()},
            **self.measuring,
            **stage_key(self.recovery, Decisive(trainer, but=("batch_size",))),
            "patience": trainer.max_skipped,  # decides what has diverged
            "kept": list(entry.kept),
        }
        what = f"{entry.method or 'random subset'}, seed {entry.seed}: recovering"
        figures = self._cached("healing", key, what, work, needs=list(figures_of.values()))
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
            if self.main:  # for those who watch
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


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def read_cached(kind: str, path: Path, num_blocks: int) -> dict[str, Any]:
    """Read the file of a result.

    Args:
        kind: a key of `NEEDED`.
        path: the file.
        num_blocks: how many blocks the network has.

    Raises:
        UserError: it is damaged.
    """
    content: dict[str, Any] = dict(read_as(path, CachedResult, AGAIN))
    if missing := [name for name in NEEDED[kind] if name not in content]:
        raise UserError(f"{path}: {missing[0]!r} is missing; {AGAIN}")
    for name in content.keys() - CachedResult.__annotations__.keys():  # metrics, by the hash of how they were measured
        shaped(content[name], float | None, f"{path}: {name!r}", AGAIN)  # type: ignore[arg-type]  # a type all the same
    kept, scores, blocks = content.get("kept"), content.get("scores"), range(num_blocks)
    if kind == "decision" and not (kept and kept == sorted(set(kept)) and set(kept) <= set(blocks)):
        raise UserError(f"{path}: 'kept' is {kept!r:.60}; expected some of 0 to {num_blocks - 1}, ascending; {AGAIN}")
    if scores is not None and len(scores) != num_blocks:
        raise UserError(f"{path}: 'scores' has {len(scores)}; expected one for each of {num_blocks} blocks; {AGAIN}")
    return content
