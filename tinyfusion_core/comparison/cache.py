"""The result cache of a comparison: one small file per result, named by a hash of everything that decides it."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import Diverged, UserError
from ..evaluation.evaluate import measure
from ..evaluation.metrics import HeldOutLoss, Metric
from ..protocols.backbone import config_of
from ..protocols.task import Task
from ..pruning.decision import Decision
from ..pruning.prune import prune
from ..runtime.distributed import map_alone, on_main_process, rank_and_world_size
from ..runtime.files import digest, write_json
from ..runtime.progress import Tracker, track
from ..runtime.run_folder import NOW, RESULT_CACHE, RunFolder
from ..selection.base import Decisive, Selector
from ..training.recover import Recover
from ..training.trainer import Trainer
from .keys import data_key, described, features_key, stage_key, weights_key
from .legacy_keys import then
from .results import Entry, read_cached

Elsewhere = Callable[[Sequence[Entry]], Iterator[Entry]]
"""Has other processes compute results, in any order, and yields each when it is there."""


class ResultCache:
    """Cached results, one JSON file each, and how to compute the missing ones.

    Args:
        task: what to prune.
        recoveries: how subsets are recovered, by the name that an entry says.
        trainer: how to train; its seed is ignored.
        folder: holds `cells/`, the folder of the files.
        progress: advances with every result that is asked for.
        held_out: how the losses are measured.
        metrics: what else to measure of the candidates' networks, by the name of its column.
        helps: whether results are for another process, which says how far the whole is.
    """

    def __init__(
        self,
        task: Task,
        recoveries: Mapping[str, Recover],
        trainer: Trainer,
        folder: RunFolder,
        progress: Tracker,
        held_out: HeldOutLoss,
        metrics: Mapping[str, Metric],
        helps: bool = False,
    ) -> None:
        self.task, self.folder, self.progress, self.helps = task, folder, progress, helps
        self.recoveries = recoveries
        self.trainer = trainer.quiet()  # hundreds of short trainings, whose logs go when they are done
        self.held_out, self.metrics = held_out, metrics
        self.accelerator, self.main = trainer.accelerator, trainer.accelerator.is_main_process
        loss = described(task.loss)
        self.sampling = sampling = {name: loss.pop(name) for name in task.loss.sampling_options() if name in loss}
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
        # What a change of the sampling or of the features changes is the metrics alone, and recoveries on policy.
        features = features_key(task.feature_space) if metrics and task.feature_space is not None else None
        keys = {column: [described(metric, "batch_size"), sampling, features] for column, metric in metrics.items()}
        self.figures = {column: (digest(key), digest(then(key))) for column, key in keys.items()}
        """Names of the metrics' values in a file: now, and in files of earlier versions."""

    def decide(self, entry: Entry, selector: Selector) -> Entry:
        """Let a candidate choose the blocks of an entry, which has no losses yet.

        Raises:
            UserError: the candidate cannot decide; names it.
        """
        trainer, key = self._choice(selector, entry.seed)

        def work(folder: RunFolder) -> dict[str, Any]:
            start = time.monotonic()
            try:
                decision = selector(self.task, trainer, folder)
            except UserError as e:
                raise type(e)(f"candidate '{entry.method}', seed {entry.seed}: {e}") from e  # another's stays one
            seconds = folder.spent(time.monotonic() - start)
            cost = decision.provenance.get("evaluations", 0)
            scores = decision.provenance.get("scores")
            scores = None if scores is None else [_finite(s) for s in scores]
            return {"kept": list(decision.kept), "scores": scores, "seconds": seconds, "evaluations": cost}

        made = self._cached("decision", key, f"{entry.method}, seed {entry.seed}: choosing", work)
        self.progress.advance()
        kept, scores = tuple(made.pop("kept")), made.pop("scores")
        return replace(entry, kept=kept, scores=None if scores is None else tuple(scores), **made)

    def hand_out(
        self, elsewhere: Elsewhere | None, entries: Sequence[Entry], selectors: Mapping[str, Selector]
    ) -> None:
        """Have what is missing computed elsewhere, and show how much of it is there.

        Args:
            elsewhere: computes it; None: nothing is done, and each result is computed when it is asked for.
            entries: without blocks, a choice is meant; otherwise a recovery, of a candidate's with all metrics.
            selectors: the candidates by name.
        """
        if elsewhere is None:
            return
        # Of equal recoveries the last one: candidates, which want all metrics, come after random subsets.
        distinct = {(e.kept or e.method, e.seed, e.recovery): e for e in entries}
        lacking = [e for e in distinct.values() if self._lacks(e, selectors)]
        if not lacking:
            return
        what = "recoveries" if lacking[0].kept else "choices"
        self.progress.tell("by workers")
        with track(what, len(lacking)) as done:
            for _ in elsewhere(lacking):
                done.advance()
                now = {"part": "", "what": f"{what} by workers", "done": done.done, "total": done.total}
                write_json(self.folder / RESULT_CACHE / NOW, now)

    def _lacks(self, entry: Entry, selectors: Mapping[str, Selector]) -> bool:
        if not entry.kept:
            return not self._known("decision", self._choice(selectors[entry.method], entry.seed)[1])[1]
        needs = list(self.figures.values()) if entry.method else []
        return _misses(self._known("healing", self._key_of_recovery(entry))[1], needs)

    def judge_teacher(self) -> float | None:
        """Return the held-out loss of the teacher; None if it is not finite.

        Raises:
            UserError: a recovery is to go on until a multiple of its loss, which is 0.
        """
        for how in self.recoveries.values():
            if how.validation is not None:
                how.validation.check_teacher(self.task, self.trainer)
        return self.calibrate(range(len(self.task.blocks)))

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
        distinct = {(entry.kept, entry.seed, entry.recovery): entry for entry in entries}
        together = full and self.figures
        alone = {e.recovery: None if together else self._trainer(e).each_alone(len(distinct)) for e in entries}
        done, share = self.progress.done, 1

        def work(entry: Entry) -> Entry:
            found = self._recovered(entry, alone[entry.recovery] or self._trainer(entry), full)
            self.progress.advance(min(share, done + len(entries) - self.progress.done))
            return found

        if not any(alone.values()):
            return tuple(work(entry) for entry in entries)
        share = rank_and_world_size()[1]  # meanwhile the others have done as much
        map_alone(list(dict.fromkeys(kept for kept, _, _ in distinct)), self.calibrate)
        found = dict(zip(distinct, map_alone(list(distinct.values()), work), strict=True))
        self.progress.advance(done + len(entries) - self.progress.done)
        chosen = ("method", "scores", "seconds", "evaluations")
        told = ((entry, found[entry.kept, entry.seed, entry.recovery]) for entry in entries)
        return tuple(replace(one, **{name: getattr(entry, name) for name in chosen}) for entry, one in told)

    def _recovered(self, entry: Entry, trainer: Trainer, full: bool) -> Entry:
        calibration = self.calibrate(entry.kept)
        trainer = replace(trainer, seed=entry.seed)
        figures_of = self.figures if full else {}

        def work(folder: RunFolder) -> dict[str, Any]:
            decision, recovery, start = self._decision(entry.kept), self.recoveries[entry.recovery], time.monotonic()
            try:
                student = recovery(self.task, prune(self.task, decision), decision, trainer, folder)
            except Diverged:
                return {"loss": None, **{name: None for name, _ in figures_of.values()}}
            seconds = folder.spent(time.monotonic() - start)
            figures = {"seconds": seconds, "loss": self._loss(student)}
            for column, (name, _) in figures_of.items():
                where, plain = folder / "evaluation" / name, replace(self.trainer, seed=entry.seed)
                found = measure(self.metrics[column], self.task, {"recovered": student}, plain, where)
                figures[name] = found[0].values["recovered"] if found else None
            return figures

        key = self._key_of_recovery(entry)
        what = f"{entry.method or 'random subset'}, seed {entry.seed}: recovering"
        figures = self._cached("healing", key, what, work, needs=list(figures_of.values()))
        metrics = {column: figures[new if new in figures else old] for column, (new, old) in figures_of.items()}
        known = {column: value for column, value in metrics.items() if value is not None}
        took = figures.get("seconds")
        return replace(entry, calibration=calibration, recovered=figures["loss"], metrics=known, recovery_seconds=took)

    def _cached(
        self,
        kind: str,
        key: Mapping[str, Any],
        what: str,
        work: Callable[[RunFolder], dict[str, Any]],
        needs: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """Return a cached result, or compute it in a folder of its own, where checkpoints survive a kill.

        Args:
            kind: first part of the file name.
            key: everything that decides the content.
            what: to show while it is computed.
            work: computes it.
            needs: pairs of names; if neither of a pair is in the file, it is computed again.
        """
        folder = self.folder / RESULT_CACHE
        name, before = on_main_process(lambda: self._known(kind, key))  # the others may describe it otherwise
        path, scratch = folder / f"{name}.json", RunFolder(folder / name)
        made: dict[str, Any] = {}
        if _misses(before, needs):
            self.progress.tell(what)
            if self.main:  # for those who watch
                part, where = ("", scratch.path) if self.helps else (name, folder)
                now = {"part": part, "what": what, "done": self.progress.done, "total": self.progress.total}
                write_json(where / NOW, now)
            made = work(scratch)

        def keep() -> dict[str, Any]:
            if made:
                write_json(path, {**before, **made, "of": dict(key)})
            shutil.rmtree(scratch.path, ignore_errors=True)
            return {name: value for name, value in self._read(kind, path).items() if name != "of"}

        return on_main_process(keep)

    def _known(self, kind: str, key: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """The name of a result, that of its old key if it was begun so, and its content, if there is any."""
        folder = self.folder / RESULT_CACHE
        new, old = (f"{kind}-{digest(k)[:24]}" for k in (key, then(key)))
        there = (name for name in (new, old) if (folder / f"{name}.json").exists() or (folder / name).exists())
        path = folder / f"{(name := next(there, new))}.json"
        return name, self._read(kind, path) if path.exists() else {}

    def _read(self, kind: str, path: Path) -> dict[str, Any]:
        return read_cached(kind, path, len(self.task.blocks))

    def _choice(self, selector: Selector, seed: int) -> tuple[Trainer, dict[str, Any]]:
        """The trainer of a candidate's choice, and all that decides it."""
        trainer = replace(self.trainer, seed=seed)
        return trainer, {**self.training, **stage_key(selector, selector.decisive(trainer)), **selector.inputs()}

    def _trainer(self, entry: Entry) -> Trainer:
        """The trainer of its recovery."""
        return replace(self.trainer.with_batch_size(self.recoveries[entry.recovery].batch_size), seed=entry.seed)

    def _key_of_recovery(self, entry: Entry) -> dict[str, Any]:
        trainer, how = self._trainer(entry), self.recoveries[entry.recovery]
        return {
            **{f"training {k}": v for k, v in self.training.items()},
            **self.measuring,
            **({"sampling": self.sampling} if how.on_policy else {}),
            **stage_key(how, Decisive(trainer, but=("batch_size",))),
            "patience": trainer.max_skipped,  # decides what has diverged
            "kept": list(entry.kept),
        }

    def _decision(self, kept: Sequence[int]) -> Decision:
        """Without groups, so that taps, and with them the recovery, follow from the kept blocks alone."""
        return Decision(blocks=tuple(self.task.blocks), kept=tuple(kept), method="comparison")

    def _loss(self, model: nn.Module) -> float | None:
        model.to(self.accelerator.device)
        return _finite(self.held_out(self.task, {"model": model}, self.trainer)[0].values["model"])


def _misses(content: Mapping[str, Any], needs: Sequence[tuple[str, str]]) -> bool:
    """Whether there is no content, or both names of something needed are missing in it."""
    return not content or any(content.keys().isdisjoint(names) for names in needs)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
