"""Successive halving of the best masks of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import tinyfusion_core as tiny
from planted_search import TRAINER, WORKING, task
from small_run import RECIPE
from tinyfusion_core.cli import main
from toys import Match, planted_data


def test_the_final_heals_the_best_masks_and_keeps_the_winner() -> None:
    """A search that has learned nothing, and a final that has."""
    planted = task()
    blind = tiny.Search(keep=4, steps=1, update=tiny.Frozen(), start=tiny.Keep([0, 1, 3, 4]))
    assert list(blind(planted, TRAINER).kept) == [0, 1, 3, 4]
    before = {name: value.clone() for name, value in planted.teacher.state_dict().items()}
    final = tiny.Finals(search=blind, masks=12, steps=2, samples=64)
    decision = final(planted, TRAINER)
    assert list(decision.kept) == WORKING
    assert decision.method == "Finals"
    assert decision.confidences == ()  # those of another mask
    rounds = decision.provenance["finals"]
    assert [len(seen) for seen in rounds] == [12, 6, 3, 2]
    assert min(rounds[-1], key=lambda seen: seen["loss"])["kept"] == WORKING
    assert decision.provenance["evaluations"] == 1 * 16 * 4 + 23 * (2 * 16 + 64)
    assert all(torch.equal(value, before[name]) for name, value in planted.teacher.state_dict().items())
    assert final.preview(planted.blocks).kept == blind.preview(planted.blocks).kept
    few = replace(planted, train=planted_data(32))  # fewer than `samples`
    seen = replace(final, masks=2)(few, TRAINER).provenance["evaluations"]
    assert seen == 1 * 16 * 4 + 2 * (2 * 16 + 32)
    for wrong in ("masks", "steps", "lr", "samples", "batch_size"):
        with pytest.raises(tiny.UserError, match=rf"^{wrong} is 0"):
            tiny.Finals(search=blind, **{wrong: 0})


@dataclass(frozen=True)
class Fragile(Match):
    """A shallow network that begins with a block that does nothing cannot be trained."""

    def predict(self, model: torch.nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        out = super().predict(model, inputs)
        lost = model.training and len(model.blocks) < 8 and model.config["scales"][0] == 0
        return out * float("nan") if lost else out


def test_a_finalist_that_diverges_is_out(tmp_path: Path) -> None:
    fragile = replace(task(), loss=Fragile())
    blind = tiny.Search(keep=4, steps=1, update=tiny.Frozen(), start=tiny.Keep([0, 1, 2, 3]))
    others = (tiny.Keep([0, 1, 6, 7]), tiny.Keep([2, 3, 4, 5]), tiny.Keep([1, 2, 3, 4]))
    final = tiny.Finals(search=blind, masks=1, others=others, steps=12, samples=16)
    decision = final(fragile, TRAINER, tiny.RunFolder(tmp_path))
    assert decision.kept == (1, 2, 3, 4)
    (found,) = decision.provenance["finals"]
    assert [seen["loss"] for seen in found if seen["kept"][0] != 1] == [None] * 3
    decision.save(tmp_path / "decision.json")  # JSON has no infinity
    few = replace(final, others=others[:2])
    with pytest.raises(tiny.UserError, match=r"^lr is 0\.001: after 12 steps no finalist has a finite loss"):
        few(fragile, TRAINER)


def test_what_criteria_choose_meets_the_masks_of_the_search() -> None:
    """A search that has learned nothing finds none of the right ones; the final takes them from another."""
    blind = tiny.Search(keep=4, steps=1, update=tiny.Frozen(), start=tiny.Keep([0, 1, 3, 4]))
    others = (tiny.FirstN(keep=4), tiny.LeaveOneOut(keep=4, samples=32), tiny.Keep([0, 1, 3, 4]))
    final = tiny.Finals(search=blind, masks=1, others=others, steps=2, samples=64)
    decision = final(task(), TRAINER)
    assert list(decision.kept) == WORKING
    first = {tuple(seen["kept"]): seen["of"] for seen in decision.provenance["finals"][0]}
    assert first == {(0, 1, 2, 3): ["FirstN"], tuple(WORKING): ["LeaveOneOut"], (0, 1, 3, 4): ["Keep", "Search"]}
    looked_at = others[1](task(), TRAINER).provenance["evaluations"]
    assert looked_at > 0
    assert decision.provenance["evaluations"] == 1 * 16 * 4 + looked_at + (3 + 2) * (2 * 16 + 64)


def test_finalists_of_others_must_be_within_the_budget() -> None:
    blocks = [f"blocks.{i}" for i in range(8)]
    search = tiny.Search(pattern=(2, 4), steps=1)
    with pytest.raises(tiny.UserError, match=r"^others\[1\]: keeps 3 blocks, the search 4"):
        tiny.Finals(search=search, others=[tiny.FirstN(pattern=(2, 4)), tiny.FirstN(keep=3)]).preview(blocks)
    outside = tiny.Finals(search=search, others=[tiny.FirstN(keep=4)])
    with pytest.raises(tiny.UserError, match=r"^others\[0\]: FirstN keeps 0 1 2 3, which is outside"):
        outside(task(), TRAINER)


def test_files_of_inner_selectors_count(tmp_path) -> None:
    planted = task()
    tiny.Keep([0, 1, 2, 3])(planted, TRAINER).save(tmp_path / "d.json")
    start = tiny.Keep(decision=str(tmp_path / "d.json"))
    search = tiny.Search(keep=4, start=start)
    (hashed,) = start.inputs().values()
    assert list(search.inputs().values()) == list(tiny.Finals(search=search).inputs().values()) == [hashed]
    final = tiny.Finals(search=tiny.Search(keep=4), others=[search])
    assert final.inputs() == {"others[0].start.search.decision": hashed}


@pytest.mark.slow
def test_keys_inside_of_a_final_are_checked(recipe, capsys) -> None:
    final = "{class_path: Finals, init_args: {search: {keep: 4, stepz: 6}}}"
    assert main(["validate", str(recipe), f"--search={final}"]) == 2
    assert "search.search.stepz: unknown key; did you mean 'steps'?" in capsys.readouterr().err
    assert main(["validate", str(recipe), f"--search={final.replace('stepz', 'steps')}"]) == 0
    assert "under 4 masks" in " ".join(capsys.readouterr().out.split())
    others = (
        "{class_path: Finals, init_args: {search: {keep: 4}, others: [{class_path: Taylor, init_args: {keeep: 4}}]}}"
    )
    assert main(["validate", str(recipe), f"--search={others}"]) == 2
    assert "search.others[0].keeep: unknown key; did you mean 'keep'?" in capsys.readouterr().err
    assert main(["validate", str(recipe), f"--search={others.replace('keeep: 4', 'keep: 5')}"]) == 2
    assert "search.others[0]: keeps 5 blocks, the search 4" in capsys.readouterr().err


def test_the_batch_of_a_final_is_checked_before_the_search(recipe, capsys) -> None:
    final = "{class_path: Finals, init_args: {search: {keep: 4, steps: 6}, batch_size: 10}}"
    flags = [f"--search={final}", "--trainer.micro_batch_size", "4"]
    assert main(["run", str(recipe), "--run-dir", str(recipe.parent / "run"), *flags]) == 2
    assert "10 over 1 process(es) is 10 samples for each, which cannot be split" in capsys.readouterr().err
    assert not (recipe.parent / "run").exists()


@dataclass(frozen=True)
class Noted(tiny.Start):
    stages: list[str] = field(default_factory=list)

    def __call__(self, task, student, decision, trainer, stage, run=None) -> None:
        assert len(decision.kept) == len(student.blocks)
        self.stages.append(stage)


def test_finalists_begin_as_the_recovery_will(tmp_path: Path) -> None:
    finals = {"class_path": "Finals", "init_args": {"search": {"keep": 4, "steps": 2}}}
    recipe = {**RECIPE, "search": finals, "recover": {"steps": 5, "start": "Refit"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    search = tiny.load_recipe(tmp_path / "recipe.yaml").search
    assert isinstance(search, tiny.Finals) and search.start == tiny.Refit()
    blind = tiny.Search(keep=4, steps=1, update=tiny.Frozen())
    noted = Noted()
    tiny.Finals(search=blind, masks=3, steps=1, samples=8, start=noted)(task(), TRAINER)
    assert noted.stages == ["finals 1"] * 3  # the second round goes on with two of them
