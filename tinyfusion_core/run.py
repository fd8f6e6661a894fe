"""A whole run: train if asked, search, prune, recover, evaluate, report; each finished stage is kept."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from .decision import Decision
from .errors import UserError
from .evaluation import evaluate, generate
from .figures import draw_images
from .files import read_json, save_tensors, write_json, write_text
from .plan import make_plan
from .pruning import load_pretrained, prune, save_network, save_pretrained
from .randomness import seed_of
from .recipe import Recipe, flatten, load_recipe
from .report import write_report
from .run_folder import RunFolder
from .task import Task

STAGES = ("train", "search", "recover", "evaluate")
NUM_SHOWN = 40


def run_recipe(
    recipe: Recipe, run_dir: Path | str, command: str = "tinyfusion run", restart_from: str | None = None
) -> Path:
    """Do what a recipe says, or what is left of it.

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
    plan = make_plan(recipe)
    if plan.problems or plan.missing:
        raise UserError("\n".join(plan.problems + plan.missing))
    task = make_task(recipe)
    if recipe.train is None:
        _ = task.teacher  # a wrong checkpoint shows here, before anything is written
    for metric in recipe.evaluate:
        metric.check(task)
    folder = RunFolder(run_dir)
    _Run(recipe, task, folder, _claim(recipe, folder, command, restart_from)).go()
    return write_report(folder)


def make_task(recipe: Recipe, model: nn.Module | None = None) -> Task:
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
    def __init__(self, recipe: Recipe, task: Task, folder: RunFolder, keys: Mapping[str, str]) -> None:
        self.recipe, self.task, self.folder, self.keys = recipe, task, folder, keys

    def go(self) -> None:
        recipe, task, folder = self.recipe, self.task, self.folder
        if recipe.train is not None:
            task = self.task = make_task(recipe, self._stage("train", self._train, self._trained))
        models: dict[str, nn.Module] = {"teacher": task.teacher}
        if recipe.search is not None:
            decision = self._stage("search", self._search, lambda: Decision.load(folder / "decision.json"))
            pruned = prune(task, decision)
            models["pruned"] = pruned
            if recipe.recover is not None:
                models["recovered"] = self._stage("recover", lambda: self._recover(decision), self._student)
            else:
                save_pretrained(pruned, task, decision, folder / "student")
        self._stage("evaluate", lambda: self._evaluate(models), lambda: None)

    def _stage(self, name: str, work: Callable[[], Any], stored: Callable[[], Any]) -> Any:
        """The stage's result: read back when it has finished before, else made and marked as finished."""
        if self.folder.finished().get(name, {}).get("key") == self.keys[name]:
            return stored()
        start = time.monotonic()
        result = work()
        self.folder.finish(name, self.keys[name], time.monotonic() - start)
        return result

    def _train(self) -> nn.Module:
        recipe = self.recipe
        assert recipe.train is not None
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(recipe.trainer.seed, "train", "initial weights"))
            model = recipe.backbone.construct(recipe.backbone.config())
        model = recipe.train(self.task, model, recipe.trainer, self.folder, stage="train")
        source = {"checkpoint": "trained by this run", "seed": recipe.trainer.seed, "steps": recipe.train.steps}
        save_network(model, recipe.backbone, {**recipe.backbone.source(), **source}, self.folder / "teacher")
        return model

    def _trained(self) -> nn.Module:
        return load_pretrained(self.folder / "teacher")

    def _search(self) -> Decision:
        assert self.recipe.search is not None
        decision = self.recipe.search(self.task, self.recipe.trainer, self.folder)
        facts = {"recipe_sha256": _hash(dict(self.recipe.settings)), "versions": versions()}
        decision = replace(decision, provenance={**decision.provenance, **facts})
        decision.save(self.folder / "decision.json")
        return decision

    def _recover(self, decision: Decision) -> nn.Module:
        assert self.recipe.recover is not None
        student = prune(self.task, decision)
        student = self.recipe.recover(self.task, student, self.recipe.trainer, self.folder)
        save_pretrained(student, self.task, decision, self.folder / "student")
        return student

    def _student(self) -> nn.Module:
        return load_pretrained(self.folder / "student")

    def _evaluate(self, models: Mapping[str, nn.Module]) -> None:
        recipe, task = self.recipe, self.task
        measurements = evaluate(task, models, list(recipe.evaluate), recipe.trainer)
        shown: dict[str, Tensor] = {}
        if task.pixels(task.backbone.example(1)["x"]) is not None:
            for name, model in models.items():
                x, labels = generate(task, model, recipe.trainer, NUM_SHOWN, NUM_SHOWN, name=f"pictures of {name}")
                pixels = task.pixels(x)
                assert pixels is not None
                shown[name] = (255 * pixels).round().to(torch.uint8)
                shown["labels"] = labels
            save_tensors(self.folder / "samples.safetensors", shown)
        write_json(
            self.folder / "metrics.json",
            {"format_version": 1, "measurements": [asdict(m) for m in measurements], "versions": versions()},
        )


def sample_images(folder: RunFolder, num: int, seed: int, out: Path | None = None) -> Path:
    """Generate images with a run's student, or with its teacher when it pruned nothing.

    Args:
        folder: a run that has finished its training.
        num: how many images.
        seed: of the noise.
        out: the picture; default `figures/student.png` in the run folder.

    Returns:
        The path of the picture.

    Raises:
        UserError: no network has been saved there yet, or its data cannot be shown.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    name = "student" if recipe.search is not None else "teacher"
    if not (folder / name / "config.json").exists():
        raise UserError(f"{folder.path}: no {name} yet; let the run finish first")
    if num < 1:
        raise UserError(f"--num {num}: expected at least 1")
    model = load_pretrained(folder / name)
    task = make_task(recipe, model)
    trainer = replace(recipe.trainer, seed=seed)
    x, labels = generate(task, model.to(trainer.accelerator.device), trainer, num, 250)
    pixels = task.pixels(x[labels.argsort(stable=True)].cpu())
    if pixels is None:
        raise UserError(f"data: {type(recipe.data).__name__} cannot show its examples as images")
    out = out or folder / "figures" / f"{name}.png"
    draw_images((255 * pixels).round().to(torch.uint8), out, columns=math.ceil(math.sqrt(num)))
    return out


def _claim(recipe: Recipe, folder: RunFolder, command: str, restart_from: str | None) -> dict[str, str]:
    """Make the folder this recipe's, or refuse with the changed keys. Returns each stage's key."""
    settings = dict(recipe.settings)
    content = recipe.backbone.source().get("sha256") if recipe.train is None else None
    now = {**flatten(settings), "backbone.checkpoint (its content)": content}
    old_path = folder / "recipe.yaml"
    if old_path.exists():
        before = {
            **flatten(yaml.safe_load(old_path.read_text())),
            "backbone.checkpoint (its content)": read_json(folder / "run.json").get("checkpoint_sha256"),
        }
        changed = {k for k in before.keys() | now.keys() if before.get(k) != now.get(k)}
        sections = {k.partition(".")[0] for k in changed}
        first = min((STAGES.index(s) if s in STAGES else 0 for s in sections), default=len(STAGES))
        if changed and (restart_from is None or STAGES.index(restart_from) > first):
            stage = next(s for s in STAGES[first:] if settings.get(s) is not None or s == "evaluate")
            lines = [f"  {k}: {before.get(k)} -> {now.get(k)}" for k in sorted(changed)]
            raise UserError(
                f"{folder.path} holds a run with other settings:\n"
                + "\n".join(lines)
                + "\nEither make a new run, or replace this one from the first stage concerned:\n"
                f"  {command} --run-dir {_free_name(folder.path)}\n"
                f"  {command} --run-dir {folder.path} --restart-from {stage}"
            )
    if restart_from is not None:
        folder.restart(list(STAGES[STAGES.index(restart_from) :]))
    write_text(old_path, yaml.safe_dump(settings, sort_keys=False))
    write_json(
        folder / "run.json",
        {"format_version": 1, "command": command, "checkpoint_sha256": content, "versions": versions()},
    )
    keys, upstream = {}, _hash({k: v for k, v in now.items() if k.partition(".")[0] not in STAGES})
    for stage in STAGES:
        own = {k: v for k, v in now.items() if k.partition(".")[0] == stage}
        keys[stage] = upstream = _hash([upstream, own])
    return keys


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    found = {}
    for name in ("tinyfusion", "torch", "accelerate", "peft", "diffusers", "timm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _free_name(path: Path) -> Path:
    number = next(n for n in range(2, 10_000) if not path.with_name(f"{path.name}-{n}").exists())
    return path.with_name(f"{path.name}-{number}")


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
