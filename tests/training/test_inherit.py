"""The start with what the search has made of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from torch import nn

import interrupted
import tinyfusion_core as tiny
from marks import slow_but
from small_run import RECIPE, digits_task, run
from starting import TRAINER
from tinyfusion_core.cli import main
from tinyfusion_core.errors import Interrupted
from tinyfusion_core.runtime.stages import UPDATE
from toys import Planted, StopAt

SEARCH = tiny.Search(keep=4, steps=4, lr=1e-2, keep_update=True)
START = tiny.Recover(steps=0, start=tiny.Inherit())
UPDATES = [tiny.LoRA(rank=2), tiny.Full(), tiny.LastBlocks(blocks=8, head=False)]


@dataclass(frozen=True)
class Doubled(tiny.WeightUpdate):
    """Trains nothing, and leaves twice of each weight."""

    applied = tiny.Frozen.applied

    @contextmanager
    def merged(self, model: nn.Module, blocks: Sequence[str]) -> Iterator[list[nn.Parameter]]:
        model.requires_grad_(False)
        yield []
        for p in model.parameters():
            p.data *= 2


def started(task: tiny.Task, folder: tiny.RunFolder, search: tiny.Search) -> tuple[nn.Module, tiny.Decision]:
    decision = search(task, TRAINER, folder)
    return START(task, tiny.prune(task, decision), decision, TRAINER, folder), decision


@pytest.mark.parametrize("units", [(), ("attention", "mlp")])
def test_the_student_has_the_weights_that_the_search_left(units: tuple[str, ...], tmp_path: Path) -> None:
    task = digits_task()
    task = replace(task, backbone=replace(task.backbone, units=units))
    before = {name: p.clone() for name, p in task.teacher.named_parameters()}
    trained = [name for name, p in task.teacher.named_parameters() if p.requires_grad]
    student, decision = started(task, tiny.RunFolder(tmp_path), replace(SEARCH, update=Doubled()))
    pruned = tiny.prune(task, decision)
    assert all(torch.equal(p, before[name]) for name, p in task.teacher.named_parameters())
    assert [name for name, p in task.teacher.named_parameters() if p.requires_grad] == trained
    assert all(torch.equal(p, 2 * pruned.get_parameter(name)) for name, p in student.named_parameters())
    zero = {name for name, p in pruned.named_parameters() if not p.any()}
    assert load_file(tmp_path / UPDATE).keys() == {name for name, _ in pruned.named_parameters()} - zero


@pytest.mark.parametrize("update", slow_but(UPDATES, UPDATES[0]))
def test_what_moves_is_what_the_update_moves(update: tiny.WeightUpdate, tmp_path: Path) -> None:
    """And the search is the one that throws it away."""
    task, folder = digits_task(), tiny.RunFolder(tmp_path)
    student, decision = started(task, folder, replace(SEARCH, update=update))
    plain = replace(SEARCH, update=update, keep_update=False)(task, TRAINER)
    own = {name: value for name, value in decision.provenance.items() if name != "weight_update_sha256"}
    assert replace(decision, provenance=own) == plain
    pruned = tiny.prune(task, decision)
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, pruned.get_parameter(name))}
    layers = {n for n, m in pruned.named_modules() if n.startswith("blocks.") and isinstance(m, nn.Linear)}
    inside = {name for name, _ in pruned.named_parameters() if name.startswith("blocks.")}
    expected = {"LoRA": {f"{name}.weight" for name in layers}, "LastBlocks": inside}.get(type(update).__name__)
    assert moved == expected if expected else moved > inside
    assert {name for name, _ in student.named_buffers()} == {name for name, _ in pruned.named_buffers()}


def recipe_at(folder: Path, **parts: Any) -> Path:
    search = {"class_path": "Search", "init_args": {"keep": 4, "steps": 12, "lr": 1e-2}}
    content = {**RECIPE, "search": search, "recover": {"steps": 12, "start": "Inherit"}, "evaluate": [], **parts}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.mark.slow
def test_a_recipe_needs_no_more_than_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_at(tmp_path)
    assert run(recipe, tmp_path / "whole") == 0
    assert (tmp_path / "whole" / UPDATE).exists()
    plain = recipe_at(tmp_path, recover={"steps": 12})
    assert run(plain, tmp_path / "plain") == 0
    assert not (tmp_path / "plain" / UPDATE).exists()
    one, other = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole", "plain"))
    assert not torch.equal(one["blocks.0.mlp.fc1.weight"], other["blocks.0.mlp.fc1.weight"])
    # The search that has thrown it away has to be done again, and the message says so.
    capsys.readouterr()
    assert run(recipe_at(tmp_path), tmp_path / "plain") == 2
    said = capsys.readouterr().err
    assert "search.keep_update: None -> True" in said and "--restart-from search" in said
    assert run(recipe_at(tmp_path), tmp_path / "plain", "--restart-from", "search") == 0
    again = load_file(tmp_path / "plain" / "student" / "model.safetensors")
    assert all(torch.equal(t, again[name]) for name, t in one.items())


@pytest.mark.slow
def test_every_round_inherits_from_its_own_search(tmp_path: Path) -> None:
    search = {"class_path": "Search", "init_args": {"pattern": [1, 2], "steps": 4, "update": "Full", "lr": 1e-2}}
    rounds = {name: {"search": search, "recover": {"steps": 0, "start": "Inherit"}} for name in ("d4", "d2")}
    content = {k: v for k, v in RECIPE.items() if k not in ("search", "recover")} | {"rounds": rounds, "evaluate": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    assert run(tmp_path / "recipe.yaml", tmp_path / "run") == 0
    for name in rounds:
        place = tmp_path / "run" / name
        student, left = load_file(place / "student" / "model.safetensors"), load_file(place / UPDATE)
        assert "blocks.0.mlp.fc1.weight" in left
        assert all(torch.equal(student[key], value) for key, value in left.items())


def test_a_search_that_was_stopped_leaves_what_the_whole_one_leaves(tmp_path: Path) -> None:
    search = tiny.Search(pattern=(1, 2), steps=16, lr=1e-2, lr_gates=1e-2, update=tiny.Full(), keep_update=True)
    trainer = interrupted.TRAINER
    whole, folder = tiny.RunFolder(tmp_path / "whole"), tiny.RunFolder(tmp_path / "stopped")
    search(interrupted.task(), trainer, whole)
    task = interrupted.task(StopAt())
    before = {name: p.clone() for name, p in task.teacher.named_parameters()}
    with pytest.raises(Interrupted):
        search(task, trainer, folder)
    assert not (folder / UPDATE).exists()
    assert all(torch.equal(p, before[name]) for name, p in task.teacher.named_parameters())
    decision = search(interrupted.task(), trainer, folder)
    one, two = (load_file(place / UPDATE) for place in (whole, folder))
    assert one.keys() == two.keys() and all(torch.equal(t, two[name]) for name, t in one.items())
    recover = tiny.Recover(steps=16, lr=1e-2, start=tiny.Inherit())
    found = []
    for place, loss in ((whole, None), (folder, StopAt()), (folder, None)):
        task = interrupted.task(loss)
        student = tiny.prune(task, decision)
        if loss is None:
            found.append(recover(task, student, decision, trainer, place).state_dict())
            continue
        with pytest.raises(Interrupted):
            recover(task, student, decision, trainer, place)
    interrupted.assert_equal(*found)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        pytest.param(
            {"search": {"keep": 4, "steps": 20}},
            "Race trains nothing that the student could begin with",
            marks=pytest.mark.slow,
        ),
        ({"search": {"class_path": "Taylor", "init_args": {"keep": 4}}}, "Taylor trains nothing"),
        ({"search": {"pattern": [2, 4], "update": "Frozen"}}, "search.update: Frozen leaves nothing for recover.start"),
        pytest.param(
            {"search": {"pattern": [2, 4], "keep_update": False}},
            "search.keep_update is false, and recover.start",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"search": {"class_path": "Finals", "init_args": {"search": {"pattern": [2, 4], "steps": 4}}}},
            "Finals trains nothing",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_leaves_nothing_is_refused_before_it_runs(
    parts: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", str(recipe_at(tmp_path, **parts))]) == 2
    assert message in capsys.readouterr().err


def test_a_comparison_of_several_has_no_search_to_inherit_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_at(tmp_path, compare={"random": 1})
    assert main(["compare", str(recipe), "--run-dir", str(tmp_path / "study")]) == 2
    assert "a comparison keeps nothing of what searches train" in capsys.readouterr().err


@pytest.mark.slow
def test_a_recovery_is_begun_anew_only_with_what_the_search_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, folder = recipe_at(tmp_path), tmp_path / "run"
    assert run(recipe, folder) == 0
    whole = (folder / UPDATE).read_bytes()

    def refused(message: str) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != folder / UPDATE}
        for flags in (["--restart-from", "recover"], ["--recover.steps", "14", "--extend"]):
            capsys.readouterr()
            assert run(recipe, folder, *flags) == 2
            assert message in capsys.readouterr().err
            assert {path: path.read_bytes() for path in before} == before  # the student above all

    (folder / UPDATE).unlink()
    refused("no such file, in which the search leaves what it has trained")
    assert run(recipe, folder) == 0  # nothing is to be done
    (folder / UPDATE).write_bytes(whole)
    with safe_open(folder / UPDATE, "pt") as file:
        metadata = file.metadata()
    save_file({name: t + 1 for name, t in load(whole).items()}, folder / UPDATE, metadata=metadata)
    refused("is not what the search has left for this decision")
    (folder / UPDATE).write_bytes(whole)
    assert run(recipe, folder, "--restart-from", "recover") == 0


def test_what_is_not_what_the_search_left(tmp_path: Path) -> None:
    task = replace(interrupted.task(), backbone=Planted())
    folder, trainer = tiny.RunFolder(tmp_path), interrupted.TRAINER
    decision = tiny.Search(keep=4, steps=4, update=tiny.Full(), lr=1e-2, keep_update=True)(task, trainer, folder)

    def begin(decision: tiny.Decision = decision, place: tiny.RunFolder | None = folder) -> None:
        START(task, tiny.prune(task, decision), decision, trainer, place)

    begin()
    with pytest.raises(tiny.UserError, match="keep_update: the weights are kept in a run folder; give it as run"):
        SEARCH(task, trainer)
    with pytest.raises(tiny.UserError, match="Inherit reads what the search has left in its run folder"):
        begin(place=None)
    other = tuple(i for i in range(8) if i not in decision.kept)
    with pytest.raises(tiny.UserError, match=rf"is of a student with blocks .*, this one has \[{other[0]}, "):
        begin(replace(decision, kept=other))
    kept = {"kept": str(list(decision.kept))}
    save_file(dict(load_file(tmp_path / UPDATE)), tmp_path / UPDATE, metadata={**kept, "by": "another"})
    with pytest.raises(tiny.UserError, match="is not what the search has left for this decision"):
        begin()
    begin = partial(begin, replace(decision, provenance={}))
    for name, shape in (("blocks.7.linear.weight", (8, 8)), ("blocks.0.linear.weight", (1,))):
        save_file({name: torch.zeros(shape)}, tmp_path / UPDATE, metadata=kept)
        with pytest.raises(tiny.UserError, match=f"of another network: {name} is not in this one; restore it"):
            begin()
    save_file({"a": torch.zeros(1)}, tmp_path / UPDATE)
    with pytest.raises(tiny.UserError, match="not what a search has left"):
        begin()
    (tmp_path / UPDATE).write_bytes(b"nothing")
    with pytest.raises(tiny.UserError, match="not what a search has left"):
        begin()
    (tmp_path / UPDATE).unlink()
    with pytest.raises(tiny.UserError, match="no such file, in which the search leaves what it has trained; restore"):
        begin()
