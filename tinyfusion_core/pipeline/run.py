"""A whole run: all stages in order, loading those that have finished before, and the report."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, about_a_recipe
from ..evaluation.evaluate import check_teacher, evaluate, with_standing
from ..evaluation.metrics import Measurement
from ..protocols.backbone import constructed
from ..protocols.task import Task
from ..pruning.decision import Decision, versions
from ..pruning.prune import load_pretrained, origin, prune, save_network, save_pretrained
from ..pruning.record import decision_of
from ..reporting.page import Figures
from ..reporting.report import write_report
from ..runtime.distributed import on_every_rank, on_main_process
from ..runtime.files import write_json
from ..runtime.locking import owned
from ..runtime.run_folder import RUN, RunFolder
from ..runtime.seeding import seed_of
from ..runtime.stages import EVALUATE, RECOVER, SEARCH, TRAIN, Stage
from ..runtime.workers.base import Workers
from ..selection.base import Selector
from ..selection.judging.recoveries import Entrant
from ..selection.search import Search
from ..training.recover import Recover
from ..training.teacher_cache.samples import open_cache
from .planning.cached_teacher import cache_of
from .planning.plan import make_plan
from .recipe import Recipe
from .resuming.check import Asked, check_resume, extended, take_run_folder
from .resuming.fingerprint import stage_keys
from .slices import shallower
from .tasks import check_workers, make_task, recover_entrant


@about_a_recipe()
def run_recipe(
    recipe: Recipe,
    run_dir: Path | str,
    command: str = "tinyfusion run",
    restart_from: str | None = None,
    *,
    extend: bool = False,
    workers: Workers | None = None,
) -> Path:
    """Run a recipe, resuming what is there. All processes train and evaluate, and the main one writes and reports.

    Args:
        recipe: the recipe.
        run_dir: the run folder. Stages that finished there with the same settings are not run again.
        command: what the user typed, for messages that say how to resume.
        restart_from: delete this stage and the later ones first.
        extend: go on with a recovery that is to have more steps than it had, as though it had never stopped.
        workers: recover the entrants of races instead of this process, which waits for them.

    Returns:
        The path of the report.

    Raises:
        UserError: the plan has problems, or the folder holds a run with other settings, or what is no run; or workers
            were given to several processes, or have nothing to do.
        Interrupted: a signal arrived; the same command resumes.
    """
    folder, asked = RunFolder(run_dir), Asked(command, restart_from, extend)
    if workers is not None:
        check_workers(recipe)
    _ = recipe.trainer.accelerator  # from here on the processes know of each other
    recipe = on_every_rank(lambda: extended(recipe, folder)) if extend else recipe
    task = on_every_rank(lambda: _prepared(recipe, folder, asked))
    if _to_be_searched(recipe, folder):
        check_teacher(task, recipe.trainer)
    keep_what_is_loaded()
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(owned(folder.path, RUN))
            take_run_folder(recipe, folder, asked)

        on_main_process(take)
        run = _Run(recipe, task, folder, workers, stack)
        for stage in recipe.stages():
            run.do(stage)
        on_main_process(lambda: write_report(folder, sections_of_metrics(recipe, folder)))
    return folder / "report.html"


def keep_what_is_loaded() -> None:
    """Leave what is imported and loaded by now out of later garbage collections.

    Every training ends with a collection, which otherwise looks at all of it: a quarter of a second and more, as
    much as a short recovery of a race takes on a small network.
    """
    gc.collect()
    gc.freeze()


def _prepared(recipe: Recipe, folder: RunFolder, asked: Asked) -> Task:
    """Check everything that can be wrong, before anything is written."""
    plan = make_plan(recipe)
    if plan.problems or plan.missing:
        raise UserError("\n".join(plan.problems + plan.missing))
    for training in _trainings(recipe):
        recipe.trainer.with_batch_size(training.batch_size).split(recipe.trainer.accelerator.num_processes)
        if isinstance(training, Recover):
            training.check_trainer(recipe.trainer)
    check_resume(recipe, folder, asked)
    task = make_task(recipe)
    if recipe.train is None:
        _ = task.teacher  # a wrong checkpoint
        _check_starts(recipe, task)
    for cache in filter(None, map(cache_of, recipe.stages())):
        open_cache(cache, task)
    return task


def _check_starts(recipe: Recipe, task: Task) -> None:
    """Check that the starts of all recoveries are for this network. Raises UserError if one is not."""
    recoveries = [training for training in _trainings(recipe) if isinstance(training, Recover)]
    for start in {repr(how.start): how.start for how in recoveries if how.start}.values():
        start.check(task)


def _trainings(recipe: Recipe) -> Iterator[Search | Recover]:
    """The trainings of all stages, in order."""
    for stage in recipe.stages():
        how: Selector | Recover | None = stage.settings
        if isinstance(how, Selector):
            yield from how.trainings(recipe.trainer, recipe.trainer.accelerator.num_processes)
        elif isinstance(how, Recover):
            yield how


def sections_of_metrics(recipe: Recipe, folder: RunFolder) -> list[Figures]:
    """Return the sections of the report that the metrics draw."""
    return [section for metric in with_standing(recipe.evaluate) for section in metric.show(folder)]


def _to_be_searched(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether a search would start from the teacher of the recipe; the same answer on every process."""
    first = recipe.stages()[0]
    return first.name == SEARCH and not _has_finished(first, folder, stage_keys(recipe))


def _has_finished(stage: Stage, folder: RunFolder, keys: Mapping[str, str]) -> bool:
    """Whether a stage has finished with these settings; the same answer on every process."""
    record = on_main_process(folder.round(stage.round).finished).get(stage.name)
    return record is not None and record["key"] == keys[stage.key]


@dataclass(frozen=True)
class _Work:
    """How one kind of stage is run.

    Attributes:
        run: computes the stage's result and writes it to the stage's folder.
        load: loads the result of a finished stage.
        use: passes the result on to the following stages.
    """

    run: Callable[[Stage], Any]
    load: Callable[[Stage], Any]
    use: Callable[[Stage, Any], None]


class _Run:
    """A run, and the results of its stages so far.

    Args:
        recipe: the recipe.
        task: with the teacher of the first stage. Each round's student becomes the next teacher.
        folder: the run folder.
        workers: do pieces of searches.
        stack: ends them with the run.
    """

    def __init__(
        self, recipe: Recipe, task: Task, folder: RunFolder, workers: Workers | None, stack: ExitStack
    ) -> None:
        self.recipe, self.task, self.folder = recipe, task, folder
        self.workers, self.stack = workers, stack
        self.keys = stage_keys(recipe)
        self.models = {} if recipe.train else {"teacher": task.teacher}  # what there is to measure
        self.decisions: dict[str, Decision] = {}  # by round
        self.work = {
            TRAIN: _Work(self._train, self._stored_teacher, self._use_trained),
            SEARCH: _Work(self._search, self._stored_decision, self._use_decision),
            RECOVER: _Work(self._recover, self._stored_student, self._use_student),
            EVALUATE: _Work(self._evaluate, lambda stage: None, lambda stage, measured: None),
        }

    def do(self, stage: Stage) -> None:
        """Load a stage's result if it has finished before, else compute it and record the stage as finished."""
        work, folder = self.work[stage.name], self.folder.round(stage.round)
        if _has_finished(stage, self.folder, self.keys):
            result = on_every_rank(lambda: work.load(stage))
        else:
            start = time.monotonic()
            result = work.run(stage)
            spent = time.monotonic() - start
            spent, keep = folder.spent(spent, stage.name), stage.name == RECOVER and self.recipe.trainer.keep_state
            on_main_process(lambda: folder.finish(stage.name, self.keys[stage.key], spent, keep))
        work.use(stage, result)

    def _train(self, stage: Stage) -> nn.Module:
        recipe, how = self.recipe, stage.settings
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(recipe.trainer.seed, "train", "initial weights"))
            fresh = constructed(recipe.backbone, recipe.backbone.config())
        model: nn.Module = how(self.task, fresh, None, recipe.trainer, self.folder, stage=stage.name)
        made = {"checkpoint": "trained by this run", "seed": recipe.trainer.seed, "steps": how.steps}
        source = {**recipe.backbone.source(), **made}
        on_main_process(lambda: save_network(model, self.task, self.folder / "teacher", source=source))
        return model

    def _stored_teacher(self, stage: Stage) -> nn.Module:
        return load_pretrained(self.folder / "teacher")

    def _use_trained(self, stage: Stage, trained: nn.Module) -> None:
        self.task = replace(self.task, model=trained, origin=origin(self.folder / "teacher"))
        self.models["teacher"] = self.task.teacher
        _check_starts(self.recipe, self.task)  # which needs weights: before anything is searched

    def _search(self, stage: Stage) -> Decision:
        folder, recovery = self.folder.round(stage.round), self.recipe.each_round()[stage.round].recover
        if recovery is not None and recovery.validation is not None:
            recovery.validation.check_teacher(self.task, self.recipe.trainer)
        trainer = self.recipe.trainer
        if self.workers is not None:
            trainer = replace(trainer, elsewhere=partial(self._elsewhere, self.workers, stage.round))
        decision: Decision = stage.settings(self.task, trainer, folder)
        decision = replace(decision, provenance={**decision.provenance, "recipe_sha256": self.keys[stage.key]})
        on_main_process(lambda: decision.save(folder / "decision.json"))
        return decision

    def _elsewhere(self, workers: Workers, round_name: str, entrants: Sequence[Entrant]) -> Iterator[Entrant]:
        self.stack.enter_context(workers.started())
        folder = self.folder.path.resolve()
        do = partial(recover_entrant, str(folder), round_name, str(Path.cwd()))
        yield from workers.run(do, entrants, folder / "workers")

    def _stored_decision(self, stage: Stage) -> Decision:
        return decision_of(self.folder, stage.round)

    def _use_decision(self, stage: Stage, decision: Decision) -> None:
        self.decisions[stage.round] = decision
        self.models[f"{stage.round} pruned".strip()] = prune(self.task, decision).cpu()  # until it is measured

    def _recover(self, stage: Stage) -> nn.Module:
        folder, decision = self.folder.round(stage.round), self.decisions[stage.round]
        student = prune(self.task, decision)
        if stage.settings is not None:
            student = stage.settings(self.task, student, decision, self.recipe.trainer, folder)
        on_main_process(lambda: save_pretrained(student, self.task, decision, folder / "student"))
        return student

    def _stored_student(self, stage: Stage) -> nn.Module:
        decision_of(self.folder, stage.round)
        return load_pretrained(self.folder.round(stage.round) / "student")

    def _use_student(self, stage: Stage, student: nn.Module) -> None:
        if stage.round:  # alone, it keeps the teacher as the task's network
            source = origin(self.folder.round(stage.round) / "student")
            self.task = replace(self.task, model=student, origin=source)
        if stage.settings is not None:
            decision, depths = self.decisions[stage.round], stage.settings.depths
            self.models |= shallower(self.task, student, decision, depths, stage.round)
            self.models[stage.round or "recovered"] = student

    def _evaluate(self, stage: Stage) -> None:
        scratch = self.folder / "evaluation" / self.keys[stage.key][:24]
        metrics = with_standing(self.recipe.evaluate)
        measurements = evaluate(self.task, self.models, metrics, self.recipe.trainer, scratch)
        exhibits = {name for metric in metrics for name in metric.exhibits}
        on_main_process(lambda: self._keep(measurements, exhibits, scratch))

    def _keep(self, measurements: Sequence[Measurement], exhibits: Iterable[str], scratch: Path) -> None:
        """Write the measurements, and move the exhibits of the metrics to the run folder."""
        for left in (left for name in exhibits for left in scratch.glob(f"*/{name}")):
            left.replace(self.folder / left.name)
        write_json(
            self.folder / "metrics.json",
            {"format_version": 1, "measurements": [asdict(m) for m in measurements], "versions": versions()},
        )
        shutil.rmtree(self.folder / "evaluation", ignore_errors=True)
