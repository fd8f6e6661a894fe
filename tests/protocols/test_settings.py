"""Settings given in Python are checked like those of a recipe, and a recipe's errors come together."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml

import tinyfusion_core as tiny
from small_run import RECIPE, digits_task
from tinyfusion_core.comparison.study import Audit, Compare
from tinyfusion_core.parsing.settings import Settings, fits
from tinyfusion_core.pipeline.schema import PLAIN
from tinyfusion_core.registry.registry import registry
from tinyfusion_diffusers import PublishedPipeline
from tinyfusion_dit import DiT
from tinyfusion_images import Digits

CLASSES = [cls for kind in registry().classes.values() for cls in kind.values() if issubclass(cls, Settings)]
SETTINGS = [
    cls
    for cls in {*CLASSES, *PLAIN, PublishedPipeline}
    if is_dataclass(cls) and cls.__module__.startswith("tinyfusion_")
]


@pytest.mark.parametrize("cls", sorted(SETTINGS, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_no_field_takes_what_it_is_not(cls: type[Any]) -> None:
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    for field in fields(cls):
        if field.init and not field.name.startswith("_"):
            with pytest.raises(tiny.UserError):
                cls(**{name: object() for name in {*needed, field.name}})


UNLIMITED = {"seed", "_random_seed", "costs", "budget"}


@pytest.mark.parametrize("cls", sorted(SETTINGS, key=lambda cls: cls.__name__), ids=lambda cls: cls.__name__)
def test_no_number_is_absurd(cls: type[Any]) -> None:
    hints = get_type_hints(cls)
    needed = {f.name: "x" for f in fields(cls) if f.default is f.default_factory is MISSING}
    needed |= {"search": tiny.Search(keep=4)} if "search" in needed else {}
    needed |= {"data": {"digits": Digits()}} if "data" in needed else {}
    needed |= {"files": ["x"]} if "files" in needed else {}
    for field in fields(cls):
        takes = [number for number in (0.5, 1) if fits(number, hints[field.name]) and field.name not in UNLIMITED]
        for number in (10**18 if takes == [1] else 1e300, 10**400) if takes else ():
            message = rf"{field.name} \(of {cls.__name__}\) is .*expected (at most \d|finite numbers, up to)"
            with pytest.raises(tiny.UserError, match=message):
                cls(**{**needed, field.name: number})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.Trainer(num_workers=1025), r"num_workers \(of Trainer\) is 1025; expected at most 1,024"),
        (lambda: tiny.Trainer(batch_size=10**6), r"batch_size \(of Trainer\) is 1000000; expected at most 100,000"),
        (lambda: tiny.Recover(schedule="linear"), r"schedule \(of Recover\) is 'linear'; expected 'cosine' or 'consta"),
        (lambda: tiny.Recover(kd="MaskedKD"), r"kd \(of Recover\) is 'MaskedKD'; expected OutputKD or None"),
        (lambda: tiny.Recover(steps="10"), r"steps \(of Recover\) is '10'; expected a whole number"),
        (lambda: tiny.Recover(steps=True), r"steps \(of Recover\) is True; expected a whole number"),
        (lambda: tiny.Recover(steps=None), r"steps \(of Recover\) is None; expected a whole number"),
        (lambda: tiny.Recover(lr=float("nan")), r"lr \(of Recover\) is nan; expected finite numbers"),
        (lambda: tiny.Search(pattern=(2, 4), tau=(4.0, float("inf"))), r"tau \(of Search\) is .* finite numbers"),
        (lambda: tiny.Search(pattern=(2, 4), tau=(4.0,)), r"tau \(of Search\) is \(4.0,\); expected a pair of numbers"),
        (
            lambda: tiny.Search(keep=4, protect=["3"]),
            r"protect \(of Search\) is \['3'\]; expected a list of whole numbers or",
        ),
        (lambda: tiny.Trainer(precision="fp8"), r"precision \(of Trainer\) is 'fp8'; expected 'auto' or 'fp32'"),
        (lambda: tiny.Trainer(trackers="wandb"), r"trackers \(of Trainer\) is 'wandb'; expected a list of texts"),
        (
            lambda: Compare(candidates={"one": "LastN"}),
            r"candidates \(of Compare\) is .* expected a mapping of names to Selector",
        ),
        (lambda: Audit(seeds=1.5), r"seeds \(of Audit\) is 1.5; expected a whole number"),
    ],
)
def test_what_is_wrong_is_named(make: Any, message: str) -> None:
    with pytest.raises(tiny.UserError, match=message):
        make()


def test_lists_and_paths_stand_for_tuples_and_texts(tmp_path: Path) -> None:
    assert tiny.Search(pattern=[2, 4], tau=[4, 0.1]).tau == (4, 0.1)
    assert tiny.MaskedKD(taps=[[0, 1], [1, 3]]).taps == [(0, 1), (1, 3)]
    assert tiny.Keep(decision=tmp_path).decision == str(tmp_path)


def test_a_plugins_class_is_checked_before_it_checks_itself() -> None:
    @dataclass(frozen=True)
    class Ours(tiny.Metric):
        rounds: int = 3

        def __post_init__(self) -> None:
            assert self.rounds > 0

        def __call__(self, task: Any, models: Any, trainer: Any) -> list[Any]:
            return []

    with pytest.raises(tiny.UserError, match=r"rounds \(of Ours\) is 'a'"):
        Ours(rounds="a")  # type: ignore[arg-type]
    assert Ours(rounds=2).rounds == 2


def refusals(tmp_path: Path, **changes: Any) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**RECIPE, **changes}.items() if v is not None}))
    with pytest.raises(tiny.UserError) as error:
        tiny.load_recipe(path)
    return [line.removeprefix(f"{path}: ") for line in str(error.value).splitlines()]


def test_all_errors_of_a_recipe_are_shown_together(tmp_path: Path) -> None:
    found = refusals(
        tmp_path,
        search={"pattern": [2, 4], "steps": "many", "lr": [1], "warmp": 2},
        recover={"steps": 0},
        trainer={"batch_size": "a", "precision": "fp8"},
        evaluate=["Nothing", {"class_path": "HeldOutLoss", "init_args": {"draws": -1}}],
    )
    for beginning in (
        "search.warmp: unknown key; did you mean 'warmup'?",
        "search.steps is",
        "search.lr is",
        "steps (of recover or train) is 0",
        "trainer.batch_size is",
        "trainer.precision is",
        "evaluate[0]: unknown class 'Nothing'",
        "evaluate: HeldOutLoss.draws is -1",
    ):
        assert any(line.startswith(beginning) for line in found), beginning
    assert len(found) == 8


def test_a_misspelt_section_is_not_a_missing_one(tmp_path: Path) -> None:
    assert [line[:41] for line in refusals(tmp_path, loss=None, los="GaussianDiffusion")] == [
        "los: unknown key; did you mean 'loss'? (k"
    ]
    assert refusals(tmp_path, loss=None) == ["the key 'loss' is missing"]


def test_a_text_is_no_list_of_texts(tmp_path: Path) -> None:
    backbone = {"class_path": "DiT", "init_args": {"checkpoint": "digits", "units": "attention", "ignore": "head"}}
    assert sorted(refusals(tmp_path, backbone=backbone), reverse=True) == [
        "backbone.units is 'attention'; expected a list of texts",
        "backbone.ignore is 'head'; expected a list of texts",
    ]
    with pytest.raises(tiny.UserError, match=r"^units \(of DiT\) is 'attention'; expected a list of texts$"):
        DiT(checkpoint="digits", units="attention")  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [[], [1], "a", 3, False, 0, ""])
def test_arguments_are_a_mapping(tmp_path: Path, arguments: Any) -> None:
    (found,) = refusals(tmp_path, backbone={"class_path": "DiT", "init_args": arguments})
    assert found.startswith(
        f"backbone: got {arguments!r}; expected a mapping with keys among units, variant, checkpoint,"
    )


@pytest.mark.parametrize(
    "path", ["tinyfusion_dit.os.DiT", "DiT.DiT", "os.DiT", "tinyfusion_dit.backbone.x.DiT", ".DiT"]
)
def test_a_class_path_is_one_that_exists(tmp_path: Path, path: str) -> None:
    (found,) = refusals(tmp_path, backbone={"class_path": path, "init_args": {"checkpoint": "digits"}})
    assert found.startswith(f"backbone: unknown class '{path}'; did you mean 'DiT'?")


@pytest.mark.parametrize("path", ["DiT", "tinyfusion_dit.DiT", "tinyfusion_dit.backbone.DiT"])
def test_a_class_is_found_by_its_name_and_by_its_paths(tmp_path: Path, path: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    backbone = {"class_path": path, "init_args": {"checkpoint": "digits"}}
    recipe.write_text(yaml.safe_dump({**RECIPE, "backbone": backbone}))
    assert type(tiny.load_recipe(recipe).backbone).__name__ == "DiT"


def test_arguments_of_functions_are_checked_too() -> None:
    task, trainer = digits_task(), tiny.Trainer(precision="fp32", batch_size=8)
    decision = tiny.Keep(blocks=[0, 2, 4, 6])(task, trainer)
    student, recover = tiny.prune(task, decision), tiny.Recover(steps=1)
    blocks = tuple(f"layers.{i}" for i in range(8))
    other = dataclasses.replace(decision, blocks=blocks)
    shorter = dataclasses.replace(decision, kept=(0, 2, 4))
    for wrong, message in (
        (lambda: tiny.prune(task, [0, 1]), r"decision is \[0, 1\]; expected Decision"),
        (lambda: tiny.prune(task.teacher, decision), "task is a DiT; expected Task"),
        (lambda: tiny.save_pretrained(decision, task, student, "x"), "student is a Decision; expected Module"),
        (lambda: recover(task, student, [0, 1], trainer), r"decision is \[0, 1\]; expected Decision or None"),
        (lambda: recover(task, student, decision, trainer, "folder"), "run is 'folder'; expected RunFolder or None"),
        (lambda: recover(task, student, other, trainer), r"the decision is about 8 blocks \(layers.0 to layers.7\)"),
        (lambda: recover(task, student, shorter, trainer), "the decision keeps 3 blocks, the student has 4"),
        (lambda: tiny.Greedy(keep=4)(task, None), "trainer is None; expected Trainer"),
        (lambda: tiny.Search(keep=4)(task, trainer, "run"), "run is 'run'; expected RunFolder or None"),
        (
            lambda: tiny.Task(backbone=task.backbone, loss="mse", train=task.train, held_out=task.held_out),
            "loss .of Tas",
        ),
        (
            lambda: dataclasses.replace(decision, kept=(0, "1")),
            r"kept \(of Decision\) is \(0, '1'\); expected a list of whole numbers",
        ),
    ):
        with pytest.raises(tiny.UserError, match=message):
            wrong()
