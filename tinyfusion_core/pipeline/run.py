"""A whole run: train if asked, search, prune, recover, evaluate, report; each finished stage is kept."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..evaluation.generation import generate, has_pictures, pictures
from ..evaluation.metrics import Measurement, check_teacher, evaluate
from ..protocols.task import Task
from ..pruning.decision import Decision, versions
from ..pruning.prune import load_pretrained, origin, prune, save_network, save_pretrained
from ..reporting.report import write_report
from ..runtime.distributed import on_every_rank, on_main_process
from ..runtime.files import save_tensors, write_json
from ..runtime.locking import owned
from ..runtime.run_folder import RunFolder
from ..runtime.seeding import seed_of
from .plan import make_plan
from .recipe import Recipe
from .schema import Round
from .stages import check_claim, claim, stage_keys

NUM_SHOWN = 40


def run_recipe(
    recipe: Recipe, run_dir: Path | str, command: str = "tinyfusion run", restart_from: str | None = None
) -> Path:
    """Do what a recipe says, or what is left of it.

    With several processes all of them train and evaluate, and the main one alone writes and reports.

    Args:
        recipe: what to do.
        run_dir: the run folder. Stages that finished there with the same settings are not run again.
        command: what the user typed, for messages that say how to go on.
        restart_from: forget this stage and the later ones first.

    Returns:
        The path of the report.

    Raises:
        UserError: the plan does not work out, or the folder holds a run with other settings.
        Interrupted: a signal came; the same command goes on from there.
    """
    folder = RunFolder(run_dir)
    _ = recipe.trainer.accelerator  # from here on the processes know of each other
    task = on_every_rank(lambda: _prepared(recipe, folder, command, restart_from))
    if _to_be_searched(recipe, folder):
        check_teacher(task, recipe.trainer)
    with ExitStack() as stack:

        def take() -> None:
            stack.enter_context(owned(folder.path, "--run-dir"))
            claim(recipe, folder, command, restart_from)

        on_main_process(take)
        _Run(recipe, task, folder).go()
        on_main_process(lambda: write_report(folder))
    return folder / "report.html"


def _prepared(recipe: Recipe, folder: RunFolder, command: str, restart_from: str | None) -> Task:
    """All that can be wrong shows here, before anything is written."""
    plan = make_plan(recipe)
    if plan.problems or plan.missing:
        raise UserError("\n".join(plan.problems + plan.missing))
    rounds = recipe.each_round().values()
    searched = [training for step in rounds for training in step.search.trainings()]
    for stage in (recipe.train, *searched, *(step.recover for step in rounds)):
        if stage is not None:
            recipe.trainer.with_batch_size(stage.batch_size).split(recipe.trainer.accelerator.num_processes)
    check_claim(recipe, folder, command, restart_from)
    task = make_task(recipe)
    if recipe.train is None:
        _ = task.teacher  # a wrong checkpoint
    return task


def _to_be_searched(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether a search would begin with the teacher that the recipe names; the same answer on every process."""
    first = next(iter(recipe.each_round()), None)
    if recipe.train is not None or first is None:
        return False
    key = stage_keys(recipe)[f"{first}.search".lstrip(".")]
    return on_main_process(lambda: folder.round(first).finished().get("search", {}).get("key") != key)


def make_task(recipe: Recipe, model: nn.Module | None = None) -> Task:
    """The task of a recipe; without a model its backbone builds one."""
    return Task(
        backbone=recipe.backbone,
        loss=recipe.loss,
        train=recipe.data.train(),
        held_out=recipe.data.held_out(),
        feature_space=recipe.data.feature_space(),
        pixels=recipe.data.pixels,
        model=model,
    )


class _Run:
    def __init__(self, recipe: Recipe, task: Task, folder: RunFolder) -> None:
        self.recipe, self.task, self.folder = recipe, task, folder
        self.keys = stage_keys(recipe)
        self.accelerator = recipe.trainer.accelerator

    def go(self) -> None:
        recipe, folder = self.recipe, self.folder
        if recipe.train is not None:
            trained = self._stage("train", self._train, lambda: load_pretrained(folder / "teacher"))
            self.task = replace(self.task, model=trained, origin=origin(folder / "teacher"))
        models: dict[str, nn.Module] = {"teacher": self.task.teacher}
        for name, step in recipe.each_round().items():
            models.update(self._round(name, step))
        self._stage("evaluate", lambda: self._evaluate(models), lambda: None)

    def _round(self, name: str, step: Round) -> dict[str, nn.Module]:
        """Search, prune, recover; the student becomes the task's network. Returns what there is to measure."""
        folder, before, prefix = self.folder.round(name), self.task, f"{name}." if name else ""
        decision = self._stage(
            f"{prefix}search", lambda: self._search(step, name), lambda: Decision.load(folder / "decision.json")
        )
        pruned = prune(before, decision).cpu()  # until it is measured
        student = self._stage(
            f"{prefix}recover",
            lambda: self._recover(step, folder, decision),
            lambda: _stored_student(folder, decision, f"{prefix}recover"),
        )
        if name:  # alone, it keeps the teacher as the task's network
            self.task = replace(before, model=student, origin=origin(folder / "student"))
        made = {f"{name} pruned".strip(): pruned}
        return made if step.recover is None else {**made, name or "recovered": student}

    def _stage(self, name: str, work: Callable[[], Any], stored: Callable[[], Any]) -> Any:
        """The stage's result: read back when it has finished before, else made and marked as finished."""
        round_name, _, local = name.rpartition(".")
        folder = self.folder.round(round_name)
        if on_main_process(lambda: folder.finished().get(local, {}).get("key") == self.keys[name]):
            return on_every_rank(stored)
        start = time.monotonic()
        result = work()
        on_main_process(
            lambda: folder.finish(local, self.keys[name], folder.spent(time.monotonic() - start, local)),
        )
        return result

    def _train(self) -> nn.Module:
        recipe = self.recipe
        assert recipe.train is not None
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(recipe.trainer.seed, "train", "initial weights"))
            model = recipe.backbone.construct(recipe.backbone.config())
        model = recipe.train(self.task, model, None, recipe.trainer, self.folder, stage="train")
        made = {"checkpoint": "trained by this run", "seed": recipe.trainer.seed, "steps": recipe.train.steps}
        source = {**recipe.backbone.source(), **made}
        on_main_process(lambda: save_network(model, recipe.backbone, source, self.folder / "teacher"))
        return model

    def _search(self, step: Round, name: str) -> Decision:
        folder = self.folder.round(name)
        decision = step.search(self.task, self.recipe.trainer, folder)
        recipe_hash = {"recipe_sha256": self.keys[f"{name}.search".lstrip(".")]}
        decision = replace(decision, provenance={**decision.provenance, **recipe_hash})
        on_main_process(lambda: decision.save(folder / "decision.json"))
        return decision

    def _recover(self, step: Round, folder: RunFolder, decision: Decision) -> nn.Module:
        student = prune(self.task, decision)
        if step.recover is not None:
            student = step.recover(self.task, student, decision, self.recipe.trainer, folder)
        on_main_process(lambda: save_pretrained(student, self.task, decision, folder / "student"))
        return student

    def _evaluate(self, models: Mapping[str, nn.Module]) -> None:
        recipe, task = self.recipe, self.task
        scratch = self.folder / "evaluation" / self.keys["evaluate"][:24]
        measurements = evaluate(task, models, recipe.evaluate, recipe.trainer, scratch)
        shown: dict[str, Tensor] = {}
        if has_pictures(task) and task.loss.generates:
            for name, model in models.items():
                what = f"pictures of {name}"
                shown[name], shown["labels"] = generate(task, model, recipe.trainer, NUM_SHOWN, NUM_SHOWN, what)
        on_main_process(lambda: self._keep(measurements, shown))

    def _keep(self, measurements: Sequence[Measurement], shown: Mapping[str, Tensor]) -> None:
        """Write what was measured, and images of every network beside the labels they were generated for."""
        if shown:
            device = self.accelerator.device
            images = {name: x if name == "labels" else pictures(self.task, x.to(device)) for name, x in shown.items()}
            save_tensors(self.folder / "samples.safetensors", images)
        write_json(
            self.folder / "metrics.json",
            {"format_version": 1, "measurements": [asdict(m) for m in measurements], "versions": versions()},
        )
        shutil.rmtree(self.folder / "evaluation", ignore_errors=True)


def _stored_student(folder: RunFolder, decision: Decision, stage: str) -> nn.Module:
    if Decision.load(folder / "student" / "decision.json") != decision:
        raise UserError(
            f"{folder / 'decision.json'}: not the decision that student/ was made from; "
            f"restore it, or run with --restart-from {stage}"
        )
    return load_pretrained(folder / "student")
