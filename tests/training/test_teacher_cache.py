"""A teacher's predictions in files: the same losses as with the teacher, and no other teacher's by mistake."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tinyfusion_core as tiny
from interrupted import assert_equal
from small_run import RECIPE, digits_task, run
from tinyfusion_core.cli import main
from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_core.protocols.data import Tensors
from tinyfusion_core.runtime.seeding import Rng, generator
from tinyfusion_core.training.distilling.distilled import Distilled
from tinyfusion_core.training.teacher_cache import writing
from tinyfusion_core.training.teacher_cache.samples import CachedSamples, open_cache, read_metadata
from tinyfusion_llm import CausalLM, NextToken
from tinyfusion_mar import MaskedTokenDiffusion
from tinyfusion_sit import FlowMatching
from toys import Match, Planted, planted_data

pytestmark = pytest.mark.numerics
TRAINER = tiny.Trainer(batch_size=16, precision="fp32", seed=0, checkpoint_every=4, log_every=3)


def planted(**changes: Any) -> tiny.Task:
    given = {"backbone": Planted(), "loss": Match(), "train": planted_data(), "held_out": planted_data(16)}
    return tiny.Task(**{**given, **changes})


def language() -> tiny.Task:
    tokens = torch.randint(3, 97, (24, 12), generator=generator("tokens"))
    labels = tokens.clone()
    labels[::2, 7:] = -100
    data = Tensors({"tokens": tokens, "labels": labels})
    return tiny.Task(
        backbone=CausalLM.tiny(), loss=NextToken(top_k=5, temperature=2.0, chunk=30), train=data, held_out=data
    )


def decision_of(task: tiny.Task, kept: tuple[int, ...]) -> tiny.Decision:
    return tiny.Decision(blocks=tuple(task.blocks), kept=kept, method="Keep")


TASKS: dict[str, Any] = {
    "diffusion": lambda: digits_task(),
    "flow": lambda: replace(digits_task(), loss=FlowMatching(guided_channels=None)),
    "language": language,
    "planted": planted,
}


@pytest.mark.parametrize("kind", [tiny.OutputKD, tiny.MaskedKD])
@pytest.mark.parametrize("name", TASKS)
def test_losses_and_gradients_are_those_of_the_teacher_in_memory(name: str, kind: Any, tmp_path: Path) -> None:
    task = TASKS[name]()
    kept = tuple(range(0, len(task.blocks), 2))
    decision = decision_of(task, kept)
    blocks = sorted({block for _, block in tiny.MaskedKD().taps_for(decision)}) if kind is tiny.MaskedKD else []
    draws = 1 if name == "language" else 2  # nothing is drawn there
    cache = tiny.TeacherCache(folder=str(tmp_path), draws=draws, samples=20, blocks=blocks, dtype="float32")
    tiny.write_cache(cache, task, TRAINER)
    samples, found = open_cache(cache, task), []
    inputs = samples.prepare(samples.__getitems__([3, 20 * draws - 1, 10 * draws, 0]), Rng(7, "of no matter"))
    for kd in (kind(cache=cache), kind()):
        student = tiny.prune(task, decision)
        objective = Distilled(student, task, decision, kd)
        objective.before_step(0.0)
        own = {key: value for key, value in inputs.items() if kd.cache or not key.startswith("teacher.")}
        loss, losses = objective(own, Rng(0, "recover"))
        loss.backward()
        found.append((losses, [p.grad for p in student.parameters() if p.grad is not None]))
    (cached, ours), (online, theirs) = found
    assert cached.abs().max() > 0
    assert torch.allclose(cached, online, atol=1e-6, rtol=1e-6)
    assert len(ours) == len(theirs) > 0
    assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_two_draws_of_a_sample_differ_and_a_row_is_always_the_same(tmp_path: Path) -> None:
    task = planted()
    samples = open_written(task, tiny.TeacherCache(folder=str(tmp_path), draws=2))
    assert len(samples) == 128
    rows = [[5], [9, 5], [69]]
    first, again, other = (samples.prepare(samples.__getitems__(some), Rng(0, "recover", len(some))) for some in rows)
    assert torch.equal(first["x"][0], again["x"][1])
    assert not torch.equal(first["x"], other["x"])  # the 5th of 64 samples once more
    assert torch.equal(samples.__getitems__([5])["x"], samples.__getitems__([69])["x"])


def open_written(task: tiny.Task, cache: tiny.TeacherCache) -> CachedSamples:
    tiny.write_cache(cache, task, TRAINER)
    return open_cache(cache, task)


@contextmanager
def small_shards(monkeypatch: pytest.MonkeyPatch, rows: int = 10) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(writing, "LARGEST_SHARD", rows)
        yield


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def test_what_was_interrupted_goes_on_and_what_is_damaged_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, made = planted(), []
    write = writing._Writing.write

    def counted(self: Any, rows: range) -> None:
        if stop and len(made) == 3:
            raise KeyboardInterrupt
        made.append(rows)
        write(self, rows)

    monkeypatch.setattr(writing._Writing, "write", counted)
    with small_shards(monkeypatch):
        stop = False
        tiny.write_cache(tiny.TeacherCache(folder=str(tmp_path / "whole")), task, TRAINER)
        assert len(made) == 7
        cache, stop = tiny.TeacherCache(folder=str(tmp_path / "stopped")), True
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            tiny.write_cache(cache, task, TRAINER)
        with pytest.raises(MissingFileError, match="is not finished; `tinyfusion cache-teacher RECIPE` writes it"):
            open_cache(cache, task)
        made.clear()
        stop = False
        tiny.write_cache(cache, task, TRAINER)
        assert len(made) == 4
        assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
        shard = tmp_path / "stopped" / "00002-of-00007.safetensors"
        shard.write_bytes(shard.read_bytes()[:-7])
        made.clear()
        tiny.write_cache(cache, task, TRAINER)
        assert made == [range(20, 30)]
        assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def recovered(cache: tiny.TeacherCache, run: tiny.RunFolder | None = None, trainer: tiny.Trainer = TRAINER) -> Any:
    task = planted()
    decision = decision_of(task, (1, 3, 4))
    recovery = tiny.Recover(steps=20, lr=1e-2, kd=tiny.OutputKD(cache=cache))
    return recovery(task, tiny.prune(task, decision), decision, trainer, run).state_dict()


def test_a_recovery_goes_on_bit_for_bit_in_any_number_of_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny.TeacherCache(folder=str(tmp_path / "cache"), draws=2)
    with small_shards(monkeypatch):
        tiny.write_cache(cache, planted(), TRAINER)
    whole = recovered(cache)
    log, stop_at = tiny.RunFolder.log, [8]

    def stopping(self: tiny.RunFolder, stage: str, step: int, values: dict[str, Any]) -> None:
        log(self, stage, step, values)
        if step >= stop_at[0]:
            raise KeyboardInterrupt

    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(tiny.RunFolder, "log", stopping)
        with pytest.raises(KeyboardInterrupt):
            recovered(cache, tiny.RunFolder(tmp_path / "run"))
    assert_equal(recovered(cache, tiny.RunFolder(tmp_path / "run")), whole)
    micro = recovered(cache, trainer=replace(TRAINER, micro_batch_size=4))
    assert all(torch.allclose(value, whole[name], atol=1e-6) for name, value in micro.items())


def test_half_precision_is_close_and_what_it_does_not_hold_is_refused(tmp_path: Path) -> None:
    exact = open_written(planted(), tiny.TeacherCache(folder=str(tmp_path / "32"), dtype="float32"))
    half = open_written(planted(), tiny.TeacherCache(folder=str(tmp_path / "16")))
    ours, theirs = (s.__getitems__([0, 1])["teacher.prediction.0"] for s in (half, exact))
    assert ours.dtype == theirs.dtype == torch.float32
    assert 0 < (ours - theirs).abs().max() < 2e-3 * theirs.abs().max()
    large = planted(train=Tensors({"x": 1e8 * planted_data().columns["x"]}))
    with pytest.raises(UserError, match=r"Recover.kd.cache.dtype: float16 does not hold 'prediction.0' of the teacher"):
        tiny.write_cache(tiny.TeacherCache(folder=str(tmp_path / "large")), large, TRAINER)


class Other(Planted):
    def build(self) -> torch.nn.Module:
        model = super().build()
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        return model


class Swapped(Planted):
    """The same weights in another order."""

    def build(self) -> torch.nn.Module:
        model = super().build()
        with torch.no_grad():
            weight = next(p for p in model.parameters() if p.ndim == 2)
            weight.copy_(weight.flip(0))
        return model


class Configured(Planted):
    """The same weights, and a config that uses them otherwise."""

    def config(self, model: torch.nn.Module | None = None) -> dict[str, Any]:
        return {**super().config(model), "heads": 2}


Configured.__name__ = "Planted"
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "teacher": ({"model": Other().build()}, {}, "of another teacher .weights"),
    "order": ({"model": Swapped().build()}, {}, "of another teacher .weights"),
    "config": ({"backbone": Configured()}, {}, "of another teacher .config"),
    "data": ({"train": Tensors({"x": planted_data().columns["x"].flip(0)})}, {}, "on other data"),
    "length": ({"train": planted_data(65)}, {}, "on other samples"),
    "objective": ({"loss": Match(noise=0.2)}, {}, "for another objective .noise: '0.1', now '0.2'."),
    "draws": ({}, {"draws": 2}, "with other draws .1, now 2."),
    "seed": ({}, {"seed": 1}, "with other draws"),
    "samples": ({}, {"samples": 9}, r"on other samples .\[64, 64\], now \[9, 64\]."),
    "blocks": ({}, {"blocks": [2]}, "without the outputs of these blocks"),
    "dtype": ({}, {"dtype": "float32"}, "in another dtype"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_predictions_of_something_else_are_refused(name: str, tmp_path: Path) -> None:
    cache = tiny.TeacherCache(folder=str(tmp_path))
    tiny.write_cache(cache, planted(), TRAINER)
    changes, options, said = OTHERS[name]
    for use in (open_cache, lambda cache, task: tiny.write_cache(cache, task, TRAINER)):
        with pytest.raises(UserError, match=f"Recover.kd.cache: {tmp_path} holds predictions {said}"):
            use(replace(cache, **options), planted(**changes))


def test_what_cannot_be_kept_is_said_before_anything_is_written(tmp_path: Path) -> None:
    cache = tiny.TeacherCache(folder=str(tmp_path / "new"))
    every = replace(language(), loss=NextToken())
    with pytest.raises(UserError, match="^top_k: null compares the whole vocabulary"):
        tiny.write_cache(cache, every, TRAINER)
    per_batch = replace(digits_task(), loss=MaskedTokenDiffusion())
    with pytest.raises(UserError, match="draws 'mask rate' once for a batch"):
        tiny.write_cache(cache, per_batch, TRAINER)
    with pytest.raises(UserError, match=r"Recover.kd.cache.blocks is \[8\]; expected blocks of the teacher, 0 to 7"):
        tiny.write_cache(replace(cache, blocks=[8]), planted(), TRAINER)
    (tmp_path / "new" / "mine.txt").write_text("x")
    (tmp_path / "new" / "metadata.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="is neither empty nor a cache of teacher predictions"):
        tiny.write_cache(cache, planted(), TRAINER)
    for options in ({"folder": ""}, {"draws": 0}, {"samples": 0}):
        with pytest.raises(UserError, match=f"Recover.kd.cache.{next(iter(options))}"):
            tiny.TeacherCache(**{"folder": "x", **options})


def test_one_cache_is_of_one_precision_and_may_keep_more_than_is_compared(tmp_path: Path) -> None:
    cache = tiny.TeacherCache(folder=str(tmp_path), blocks=[5, 2, 5])
    tiny.write_cache(cache, planted(), TRAINER)
    text = (tmp_path / "metadata.json").read_text()
    (tmp_path / "metadata.json").write_text(text.replace('"precision": "no"', '"precision": "bf16"'))
    with pytest.raises(UserError, match="in another Trainer.precision .'bf16', now 'no'."):  # some rows would be
        tiny.write_cache(cache, planted(), TRAINER)
    assert len(open_cache(replace(cache, blocks=[5]), planted())) == 64
    with pytest.raises(UserError, match=r"without the outputs of these blocks .\[2, 5\], now \[3\]"):
        open_cache(replace(cache, blocks=[3]), planted())


def test_what_is_missing_or_damaged_in_the_folder_is_said_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tiny.TeacherCache(folder=str(tmp_path / "kept"))
    with small_shards(monkeypatch):
        tiny.write_cache(cache, planted(), TRAINER)
    metadata = tmp_path / "kept" / "metadata.json"
    whole = metadata.read_text()
    for damage, said in (
        (lambda c: c["shards"].reverse(), "the shards are not in their order; delete the folder"),
        (lambda c: c["shards"].pop(), "is not finished; `tinyfusion cache-teacher RECIPE` writes it"),
        (lambda c: c.pop("made_of"), "'made_of' is missing; expected a mapping; delete the folder"),
        (lambda c: c.update(format_version=2), "version 2; delete the folder"),
    ):
        content = json.loads(whole)
        damage(content)
        metadata.write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            open_cache(cache, planted())
    metadata.write_text("{")
    with pytest.raises(UserError, match="not readable as JSON .*; delete the folder"):
        open_cache(cache, planted())
    metadata.write_text(whole)
    (tmp_path / "kept" / "00003-of-00007.safetensors").unlink()
    with pytest.raises(MissingFileError, match="00003-of-00007.safetensors: no such file; `tinyfusion cache-teacher"):
        open_cache(cache, planted())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is no folder"):
        open_cache(tiny.TeacherCache(folder=str(tmp_path / "file")), planted())


def test_what_takes_more_than_the_disk_has_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="Recover.kd.cache: takes 1.02e-06 GB, 16 bytes for each of 64 rows"):
        tiny.write_cache(tiny.TeacherCache(folder=str(tmp_path)), planted(), TRAINER)
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}


def test_draws_of_an_objective_that_draws_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Recover.kd.cache.draws is 2; expected 1: the objective draws nothing"):
        tiny.write_cache(tiny.TeacherCache(folder=str(tmp_path), draws=2), language(), TRAINER)


def test_taps_need_the_outputs_of_their_blocks(tmp_path: Path) -> None:
    cache = tiny.TeacherCache(folder=str(tmp_path), blocks=[2])
    task, decision = planted(), decision_of(planted(), (1, 3, 4))
    with pytest.raises(UserError, match="Recover.kd.cache.blocks: lacks 7, blocks of the teacher"):
        Distilled(tiny.prune(task, decision), task, decision, tiny.MaskedKD(cache=cache))
    given = tiny.MaskedKD(cache=cache, taps=[(1, 2)])
    given.check_cache(decision, final=False)
    with pytest.raises(UserError, match="lacks 0, 1, 3, 4, 5, 6, 7"):
        tiny.MaskedKD(cache=cache).check_cache(decision, final=False)


def test_a_recipe_plans_it_writes_it_and_learns_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kd = {"class_path": "OutputKD", "init_args": {"cache": {"folder": "kept", "samples": 40, "draws": 2}}}
    search = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 6, 7]}}
    content = {**RECIPE, "search": search, "recover": {"steps": 4, "kd": kd}}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    assert main(["validate", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"needed to run: recover.kd.cache.folder: there is no cache in {tmp_path}/kept" in said
    assert run(path, tmp_path / "run") == 2
    assert not (tmp_path / "run").exists()
    capsys.readouterr()
    assert main(["cache-teacher", str(path)]) == 0
    assert capsys.readouterr().out.startswith("kept: 80 predictions of 129 bytes, 0.0103 MB in all")
    assert main(["validate", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "the teacher is not run" in said
    assert ", teacher " not in said[said.index("recover: memory") :]
    assert run(path, tmp_path / "run") == 0
    assert len(read_metadata(Path("kept"))["shards"]) == 1
    metadata = json.loads(Path("kept/metadata.json").read_text())
    metadata["made_of"]["teacher"]["weights"] = "0"
    Path("kept/metadata.json").write_text(json.dumps(metadata))
    capsys.readouterr()
    assert run(path, tmp_path / "other") == 2
    assert "kept holds predictions of another teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_what_will_not_do_is_said_when_the_plan_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    kd = {"class_path": "OutputKD", "init_args": {"cache": {"folder": "kept"}}}
    search = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 6, 7]}}
    path = tmp_path / "small.yaml"

    def refused(*command: str, **changes: Any) -> str:
        path.write_text(yaml.safe_dump({**RECIPE, "search": search, "recover": {"steps": 4, "kd": kd}, **changes}))
        assert main([*command, str(path)]) == 2
        return " ".join(capsys.readouterr().err.split())

    rounds = {"one": {"search": search, "recover": {"steps": 4}}, "two": {"search": {"keep": 2}, "recover": {"kd": kd}}}
    for command in ("validate", "cache-teacher", "run"):
        said = refused(command, search=None, recover=None, rounds=rounds)
        assert "this teacher comes from the round before" in said
    plain = {"steps": 4}
    assert "no recovery of the recipe names one; set recover.kd.cache.folder" in refused("cache-teacher", recover=plain)
    masked = {"steps": 4, "kd": {**kd, "class_path": "MaskedKD"}}
    for command in ("validate", "cache-teacher", "run", "compare"):
        assert "recover.kd.cache.blocks: lacks 0, 1, 2, 3, 4, 5, 6, 7" in refused(
            command, recover=masked, compare={"candidates": {"a": {"class_path": "Greedy", "init_args": {"keep": 4}}}}
        )
    lacking = {"class_path": "OutputKD", "init_args": {"cache": {"draws": 3}}}
    assert refused("validate", recover={"steps": 4, "kd": lacking}).endswith("recover.kd.cache.folder: missing")
    assert not (tmp_path / "kept").exists()
