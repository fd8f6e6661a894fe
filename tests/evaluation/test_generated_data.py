"""A teacher makes training data: the same by one process or two, in any batch, interrupted or not."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tinyfusion_core as tiny
from forks import command, kill_when, start, wait
from places import ROOT
from small_run import RECIPE, SHIPPED, digits_task
from tinyfusion_core.cli import main
from tinyfusion_core.dataloading.shards import ShardedSamples
from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_dit import DiT, GaussianDiffusion, Latents
from tinyfusion_images import Digits
from toys import Match, Planted, planted_data

TRAINER = tiny.Trainer(batch_size=8, precision="fp32", seed=3)
NUM = 23


def generate(**how: Any) -> tiny.GenerateData:
    return tiny.GenerateData(**{"samples": NUM, "shard_size": 5, "batch_size": 3, **how})


def rows(folder: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def recipe(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({**RECIPE, "evaluate": [], **sections}))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "made"
    generate()(digits_task(), TRAINER, out)
    return out


def test_samples_are_the_teachers_for_balanced_labels(made: Path) -> None:
    found = rows(made)
    assert found["y"].tolist() == [i % 10 for i in range(NUM)]
    task, row = digits_task(), 17
    like = torch.empty(1, 1, 8, 8)
    alone = task.loss.sample(task.teacher, like, torch.tensor([7]), tiny.Rng(0, "generated data", rows=(row,)))
    torch.testing.assert_close(found["x"][row : row + 1], alone, rtol=1e-4, atol=1e-5)
    space = Digits().feature_space()
    assert (space(found["x"])[1].argmax(1) == found["y"]).float().mean() > 0.7
    metadata = json.loads((made / "metadata.json").read_text())
    assert metadata["loss.sampling_steps"] == "3"
    assert metadata["teacher"] == task.source


def test_a_sample_follows_from_the_seed_and_its_number(made: Path, tmp_path: Path) -> None:
    generate(samples=9, shard_size=9, batch_size=9)(digits_task(), replace(TRAINER, seed=0), tmp_path / "few")
    few, many = rows(tmp_path / "few"), rows(made)
    torch.testing.assert_close(few["x"], many["x"][:9], rtol=1e-4, atol=1e-5)
    generate(seed=1, dtype="float16")(digits_task(), TRAINER, tmp_path / "other")
    other = rows(tmp_path / "other")
    assert other["x"].dtype == torch.float16
    assert (other["x"] - many["x"]).abs().mean() > 0.05
    assert len({*many["x"].flatten(1).sum(1).tolist()}) == NUM


def test_data_read_them(made: Path, tmp_path: Path) -> None:
    data, found = tiny.Generated(folder=str(made), num_held_out=4), rows(made)
    train, held_out = data.train(), data.held_out()
    assert (len(train), len(held_out)) == (NUM - 4, 4)
    assert torch.equal(held_out.__getitems__([3])["x"], found["x"][3:4])
    assert torch.equal(train.__getitems__([0, 18])["x"], found["x"][[4, 22]])
    assert train.sizes == [1, 5, 5, 5, 3]
    latents = Latents(folder=str(made), num_held_out=4)  # what `tinyfusion encode` writes is read alike
    assert torch.equal(latents.train().__getitems__([5])["x"], found["x"][9:10])
    with pytest.raises(UserError, match="^num_held_out is 23; expected below the 23 samples there are"):
        tiny.Generated(folder=str(made), num_held_out=NUM).train()
    with pytest.raises(MissingFileError, match=r"`tinyfusion generate-data RECIPE --samples 10000 --out nowhere`"):
        tiny.Generated(folder="nowhere").train()
    assert len(tiny.Generated(folder=str(made), num_held_out=0).held_out()) == 0
    (tmp_path / "metadata.json").write_text('{"format_version": 1, "vae": "x"}')
    with pytest.raises(UserError, match=r"^folder: '.*' holds latents in arrays; read them with data: Latents"):
        tiny.Generated(folder=str(tmp_path)).train()


def test_real_data_judge_what_generated_ones_train(made: Path) -> None:
    def mixture(real: float, generated: float, held_out: int = 0) -> tiny.Mixture:
        parts = {"real": Digits(), "made": tiny.Generated(folder=str(made), num_held_out=held_out)}
        return tiny.Mixture(parts=parts, weights={"real": real, "made": generated})

    alone = mixture(0, 1)
    assert torch.equal(alone.train().__getitems__([*range(NUM)])["x"], rows(made)["x"])
    assert isinstance(alone.train(), ShardedSamples)  # read in the order of its shards
    assert len(alone.held_out()) == len(Digits().held_out())
    assert alone.feature_space() is not None
    both = mixture(1, 1)
    assert len(both.train()) == 2 * len(Digits().train())
    assert {name: t.dtype for name, t in both.train().__getitems__([0, 2999]).items()} == {
        "x": torch.float32,
        "y": torch.int64,
    }
    assert len(mixture(0, 1, held_out=4).held_out()) == len(Digits().held_out()) + 4
    with pytest.raises(UserError, match="^weights is .*; expected at least one above 0"):
        mixture(0, 0)
    nothing = tiny.Mixture(parts={"made": tiny.Generated(folder=str(made), num_held_out=0)})
    with pytest.raises(UserError, match="^parts: none of them holds a sample out; set num_held_out of one"):
        nothing.held_out()


def test_damaged_shards_are_made_again(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    generate()(digits_task(), TRAINER, out)
    assert content(out) == content(made)
    whole = (out / "00003-of-00005.safetensors").read_bytes()
    (out / "00003-of-00005.safetensors").write_bytes(whole[:-4])
    (out / "00001-of-00005.safetensors").unlink()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    generate()(digits_task(), TRAINER, out)
    assert content(out) == content(made)
    again = {name for name, time in times.items() if (out / name).stat().st_mtime_ns != time}
    assert again == {"00003-of-00005.safetensors"}


def test_what_was_made_otherwise_is_refused(made: Path) -> None:
    before, task = content(made), digits_task()
    other = DiT(checkpoint="digits").build()
    with torch.no_grad():
        next(other.parameters()).add_(1)
    for how, of, message in (
        (generate(seed=4), task, "seed: 0, now 4"),
        (generate(samples=30), task, "samples: 23, now 30"),
        (generate(), digits_task(sampling_steps=5), "sampling_steps: '3', now '5'"),
        (generate(), replace(task, model=other), "teacher_sha256: "),
    ):
        with pytest.raises(UserError, match=f"generated data that were made otherwise .{message}.*choose another"):
            how(of, TRAINER, made)
    assert content(made) == before


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="^generate-data: samples is 0; expected at least 1"):
        generate(samples=0)
    with pytest.raises(UserError, match="^dtype .of GenerateData. is 'int8'"):
        generate(dtype="int8")
    task = tiny.Task(backbone=Planted(), loss=Match(), train=planted_data(), held_out=planted_data(16))
    with pytest.raises(UserError, match="^loss: Match cannot make training data: it has neither"):
        generate()(task, TRAINER, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="neither empty nor generated data of tinyfusion's"):
        generate()(digits_task(), TRAINER, tmp_path / "mine")

    def refused(path: Path, *flags: str) -> str:
        assert main(["generate-data", str(path), "--out", str(tmp_path / "out"), "--samples", "4", *flags]) == 2
        return capsys.readouterr().err

    plain = recipe(tmp_path / "plain.yaml")
    trained = recipe(tmp_path / "trained.yaml", backbone={"class_path": "DiT"}, train={"steps": 2})
    assert "train: generate-data needs a teacher; give the backbone the checkpoint" in refused(trained)
    assert "sampling_steps" in refused(plain, "--loss.sampling_steps", "1")
    assert "generate-data: batch_size is 0; expected at least 1" in refused(plain, "--batch-size", "0")
    assert "learn_sigma" in refused(plain, "--loss.learn_sigma", "true")
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True, kw_only=True)
class Diverging(GaussianDiffusion):
    def sample(self, model: Any, like: torch.Tensor, conditions: torch.Tensor, rng: tiny.Rng) -> torch.Tensor:
        return torch.full_like(like, torch.inf)


@dataclass(frozen=True, kw_only=True)
class Losing(GaussianDiffusion):
    def generated(self, model: Any, batch: tiny.Batch, conditions: str, rng: tiny.Rng) -> dict[str, torch.Tensor]:
        return {"x": batch["x"][1:]}


@pytest.mark.parametrize(("loss", "message"), [(Diverging, "that are not finite"), (Losing, "it has 3 rows in the pl")])
def test_what_no_data_are_is_refused(loss: type[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        generate()(replace(digits_task(), loss=loss(learn_sigma=False)), TRAINER, tmp_path / "out")


def test_without_labels_the_training_samples_say_what_to_make(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Unlabelled(DiT):
        def num_labels(self, model: torch.nn.Module) -> None:
            return None

    task = replace(digits_task(), backbone=Unlabelled(checkpoint=str(SHIPPED)))
    generate(samples=3)(task, TRAINER, tmp_path / "out")
    assert torch.equal(rows(tmp_path / "out")["y"], task.train.__getitems__([0, 1, 2])["y"])


@pytest.mark.slow
def test_the_lines_of_the_page_recover_without_real_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "recovery.md").read_text().split("\n## No data set at hand\n")[1]
    block = page.split("```yaml\n")[1].split("```")[0]
    lines = page.split("```bash\n")[1].split("```")[0].splitlines()
    alone, judged = yaml.safe_load_all(block)
    monkeypatch.chdir(tmp_path)
    for name, data in (("alone", alone), ("judged", judged)):
        recipe(Path("my_recipe.yaml"), **data, recover={"steps": 2, "kd": "MaskedKD"})
        for line in lines:
            words = line.split("  #")[0].replace("10000", "40").split()[1:]
            if words[0] == "run":
                words += ["--run-dir", name] + (["--data.num_held_out", "8"] if data is alone else [])
            assert main(words) == 0
    printed = capsys.readouterr().out
    assert printed.count("data/made: 40 samples in 1 shards, all verified\n") == 2
    assert Path("judged/student/model.safetensors").is_file()


@pytest.mark.slow
def test_two_processes_and_a_kill_make_what_one_makes(tmp_path: Path) -> None:
    path = recipe(tmp_path / "recipe.yaml", data={"class_path": "Latents", "init_args": {"folder": "nowhere"}})
    words = [path, "--samples", 24, "--shard-size", 1, "--batch-size", 1]
    torch.set_num_threads(1)  # what a forked process can use
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log.txt"
    assert main(["generate-data", *map(str, words), "--out", str(whole)]) == 0
    (process,) = start(command("generate-data", *words, "--out", killed), tmp_path / "killed.txt")
    kill_when(process, lambda: list(killed.glob("0*.json")))
    assert process.exitcode == -signal.SIGKILL
    assert 0 < len(list(killed.glob("*.safetensors"))) < 24
    with pytest.raises(UserError, match="lists no shards; let the command that makes them finish"):
        tiny.Generated(folder=str(killed)).train()
    ranks = start(command("generate-data", *words, "--out", killed), log, processes=2)
    assert wait(ranks) == [0, 0], log.read_text()[-3000:]
    assert log.read_text().count("24 samples in 24 shards, all verified") == 1
    assert content(killed) == content(whole)
