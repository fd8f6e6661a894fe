"""Prompts become shards of embeddings: what the pipeline itself would give its transformer."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

import diffusers_prompts as tiny_pipelines
import tinyfusion_core as tiny
from forks import command, kill_when, start, wait
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_core.errors import Interrupted, UserError
from tinyfusion_core.protocols.columns import columns_of
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_diffusers import DiffusersTransformer, RectifiedFlow
from tinyfusion_diffusers.prompts.encode import EncodePrompts

PROMPTS = ["a cat", "two dogs in a garden", 'a sign that says "the sea"', "a very long walk " * 40]
MASKED, GUIDED = ("text", "mask", "no text", "no mask"), ("text", "no text")
RETURNS = {
    "PixArtAlphaPipeline": MASKED,
    "PixArtSigmaPipeline": MASKED,
    "StableDiffusion3Pipeline": ("text", "no text", "pooled", "no pooled"),
    "FluxPipeline": ("text", "pooled", "positions"),
    "AuraFlowPipeline": ("text", "positions", "no text", "no positions"),  # a mask, which its transformer does not take
    "SanaPipeline": MASKED,
    "WanPipeline": GUIDED,
    "QwenImagePipeline": ("text", "mask"),
    "LTXPipeline": MASKED,
    "CogVideoXPipeline": GUIDED,
    "Lumina2Pipeline": MASKED,
    "HunyuanImagePipeline": ("text", "mask", "text_2", "mask_2"),
}
"""What `encode_prompt` gives, in diffusers' own words for it."""


class Asked(Exception):
    """The pipeline has encoded its prompts."""


def asked(pipe: Any, prompts: list[str], name: str, **options: Any) -> dict[str, Any]:
    """What the pipeline gets from its `encode_prompt` when it is called with prompts."""
    real, found = pipe.encode_prompt, {}

    def recorded(*args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            found.update(zip(RETURNS[name], real(*args, **kwargs), strict=True))
        raise Asked

    pipe.encode_prompt = recorded
    if name in ("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline"):
        options["use_resolution_binning"] = False
    with pytest.raises(Asked):
        pipe(prompts, height=64, width=64, **options)
    pipe.encode_prompt = real
    return {key: value for key, value in found.items() if "positions" not in key and value is not None}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipelines.saved("FluxPipeline", tmp_path_factory.mktemp("flux") / "pipeline")


def written(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "prompts.txt").write_text("".join(f"{line}\n" for line in lines))
    return folder / "prompts.txt"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def rows(folder: Path) -> dict[str, torch.Tensor]:
    shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


@pytest.mark.parametrize(
    "name", slow_but(tiny_pipelines.ENCODERS, "FluxPipeline", "PixArtSigmaPipeline", "WanPipeline")
)
def test_the_files_hold_what_the_pipeline_would_be_given(name: str, tmp_path: Path) -> None:
    folder = tiny_pipelines.saved(name, tmp_path / "pipeline")
    how = EncodePrompts(model=str(folder), dtype="float32", batch_size=4, shard_size=4)
    made = how(written(tmp_path, *PROMPTS, ""), tmp_path / "out")
    assert made == json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert made["num_prompts"] == 5
    found = rows(tmp_path / "out")
    given = asked(tiny_pipelines.pipeline(name), PROMPTS, name)
    assert {key for key in given if not key.startswith("no ")} == found.keys()
    length = given["text"].shape[1]
    for key in found.keys() & given.keys():
        column = found[key][:4]
        if key == "pooled":
            assert torch.equal(column, given[key])
        else:
            assert torch.equal(column[:, :length], given[key].to(column.dtype))
            assert not column[:, length:].any()
    assert found["text"][:4].std() > 0.01
    if "no text" in given:
        for key in found:
            torch.testing.assert_close(found[key][4].float(), given[f"no {key}"][0].float())
    else:
        alone = asked(tiny_pipelines.pipeline(name), [""], name)
        assert torch.equal(found["text"][4, : alone["text"].shape[1]], alone["text"][0])
        real = alone["mask"].sum() if "mask" in alone else alone["text"].shape[1]
        assert "mask" not in found or int(found["mask"][4].sum()) == int(real)


def test_a_share_of_the_prompts_is_the_empty_one(flux: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path, *(f"cat {'a' * i}" for i in range(40)))
    how = {"model": str(flux), "dtype": "float32", "text_length": 8}
    for empty in (0.0, 0.3):
        EncodePrompts(**how, empty=empty)(prompts, tmp_path / str(empty))
    whole, some = rows(tmp_path / "0.0"), rows(tmp_path / "0.3")
    assert whole["text"].shape == (40, 8, tiny_pipelines.WIDTH)
    EncodePrompts(**how)(written(tmp_path / "none", "cat", ""), tmp_path / "nothing")
    nothing = {name: column[1] for name, column in rows(tmp_path / "nothing").items()}
    replaced = [torch.equal(row, nothing["text"]) for row in some["text"]]
    assert 4 <= sum(replaced) <= 20
    for name, column in some.items():
        for row, gone in enumerate(replaced):
            torch.testing.assert_close(column[row], nothing[name] if gone else whole[name][row])


def test_numbers_are_stored_in_bfloat16_unless_asked_otherwise(flux: Path, tmp_path: Path) -> None:
    made = EncodePrompts(model=str(flux), text_length=4)(written(tmp_path, "cat"), tmp_path / "out")
    assert made["dtype"] == "bfloat16"
    assert {column.dtype for column in rows(tmp_path / "out").values()} == {torch.bfloat16}
    assert made["row"] == {"text": [4, tiny_pipelines.WIDTH], "pooled": [tiny_pipelines.POOLED]}


def test_captions_of_a_jsonl_file(flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "captions.jsonl", tmp_path / "out"
    path.write_text("".join(json.dumps({"caption": text, "long": text * 2}) + "\n" for text in ("cat", "dog")))
    words = ["encode-prompts", str(path), "--model", str(flux), "--dtype", "float32", "--text-length", "4"]
    assert main([*words, "--out", str(out)]) == 0
    assert f"{out}: 2 prompts in 1 shards, all verified" in capsys.readouterr().out
    EncodePrompts(model=str(flux), dtype="float32", text_length=4)(written(tmp_path, "cat", "dog"), tmp_path / "plain")
    assert content(out) == content(tmp_path / "plain")
    assert main([*words, "--out", str(out), "--field", "long"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "holds embeddings of prompts that were made otherwise (source: " in error


def test_a_signal_stops_between_batches_and_the_next_run_goes_on(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyfusion_core.dataloading import encoding as module

    prompts, out, write = written(tmp_path, *PROMPTS, "", "a dog"), tmp_path / "out", module.write_shard
    how = EncodePrompts(model=str(flux), dtype="float32", shard_size=2, batch_size=1, empty=0.2, text_length=16)
    how(prompts, tmp_path / "whole")

    def write_and_signal(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*args)

    monkeypatch.setattr(module, "write_shard", write_and_signal)
    with pytest.raises(Interrupted, match="stopped after 1 of 3 shards"):
        how(prompts, out)
    assert [path.name for path in sorted(out.glob("*.safetensors"))] == ["00000-of-00003.safetensors"]
    monkeypatch.undo()
    kept = (out / "00000-of-00003.safetensors").stat().st_mtime_ns
    how(prompts, out)
    assert content(out) == content(tmp_path / "whole")
    assert (out / "00000-of-00003.safetensors").stat().st_mtime_ns == kept
    (out / "00001-of-00003.safetensors").write_bytes(b"?")
    how(prompts, out)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_and_a_kill_make_what_one_makes(flux: Path, tmp_path: Path) -> None:
    prompts = written(tmp_path, *(f"{text} {i * 'a'}" for i in range(10) for text in PROMPTS))
    words = ["encode-prompts", prompts, "--model", flux, "--dtype", "float32", "--text-length", "32"]
    words += ["--shard-size", "1", "--batch-size", "1", "--empty", "0.1"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main([*map(str, words), "--out", str(whole)]) == 0
    (process,) = start(command(*words, "--out", killed), tmp_path / "killed.txt")
    kill_when(process, lambda: list(killed.glob("0*.json")))
    assert 0 < len(list(killed.glob("*.safetensors"))) < 40
    log = tmp_path / "log.txt"
    assert wait(start(command(*words, "--out", killed), log, processes=2)) == [0, 0], log.read_text()[-3000:]
    assert log.read_text().count("40 prompts in 40 shards, all verified") == 1
    assert content(killed) == content(whole)


def test_a_second_text_is_taken_as_it_was_written(tmp_path: Path) -> None:
    folder = tiny_pipelines.saved("HunyuanImagePipeline", tmp_path / "pipeline")
    how = EncodePrompts(model=str(folder), dtype="float32", shard_size=4)
    made = how(written(tmp_path, *PROMPTS), tmp_path / "out")
    text, text_2 = (made["row"][name][0] for name in ("text", "text_2"))
    assert text != text_2
    columns = rows(tmp_path / "out")
    assert columns["mask_2"].any(1).tolist() == [False, False, True, False]  # one has words in quotes
    backbone = DiffusersTransformer(model=str(folder), latent=[4, 4], text_length=text, text_length_2=text_2)
    task = tiny.Task.without_data(backbone, RectifiedFlow(), backbone.build())
    columns_of(backbone, task.teacher, "y").check(
        {**columns, "x": (x := backbone.example(4)["x"])}, lambda name, row: "here"
    )
    inputs = task.loss.prepare({**columns, "x": x + 1}, Rng(0, "test"))
    losses = task.loss.losses(task.teacher, inputs)
    assert losses.isfinite().all()
    other = task.loss.losses(task.teacher, {**inputs, "text_2": inputs["text_2"].flip(-1)})
    assert (other != losses).tolist() == [False, False, True, False]
    with pytest.raises(UserError, match="text_length_2 is 3; .*FluxTransformer2DModel as configured takes no second"):
        replace(DiffusersTransformer.tiny(), text_length_2=3).example(1)


def test_pipelines_and_prompts_that_are_refused(flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, out = written(tmp_path, "a cat"), tmp_path / "out"

    def refused(message: str, where: Path = flux, of: Path = prompts, **how: Any) -> None:
        with pytest.raises(UserError, match=message) as error:
            EncodePrompts(model=str(where), **how)(of, out)
        assert str(error.value).count(". ") <= 1
        assert not out.exists() or not list(out.glob("*.safetensors"))

    refused("nowhere: no pipeline there .*; expected a folder with model_index.json", tmp_path / "nowhere")
    refused("nothing.txt", of=tmp_path / "nothing.txt")
    refused("empty.txt: holds no prompts", of=written(tmp_path / "empty", "", "").rename(tmp_path / "empty.txt"))
    refused("encode-prompts: empty is 1.0; expected a share", empty=1.0)
    refused("encode-prompts: text_length is 0; expected at least 1", text_length=0)
    refused(r"dtype \(of EncodePrompts\) is .int8.", dtype="int8")
    lines = tmp_path / "lines.jsonl"
    for text, message in {
        '{"caption": "a"}\n["b"]': r"lines.jsonl: line 2: has no text 'caption' \(there is: list\)",
        '{"text": "a"}': r"line 1: has no text 'caption' \(there is: text\); name the entry with --field",
        "a cat": "line 1: not readable as JSON",
    }.items():
        lines.write_text(text)
        refused(message, of=lines)

    dit, index = tmp_path / "dit", json.loads((flux / "model_index.json").read_text())
    dit.mkdir()
    (dit / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "transformer": ["diffusers", "x"]}))
    refused("the pipeline DiTPipeline has no encode_prompt", dit)
    wan = tiny_pipelines.saved("WanPipeline", tmp_path / "wan")
    monkeypatch.setattr(diffusers.WanPipeline, "encode_prompt", lambda self, prompt, picture: None)
    refused("encode_prompt of WanPipeline is not in the known form, .* \\(it takes 'picture'\\)", wan)
    refused("text_length is 7, but .*wan takes texts of a length of its own", wan, text_length=7)
    monkeypatch.setattr(diffusers.WanPipeline, "encode_prompt", lambda self, prompt: ("no tensor",))
    refused("encode_prompt of WanPipeline is not in the known form", wan)
    monkeypatch.undo()

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for path in flux.iterdir():
        (foreign / path.name).symlink_to(path)
    (foreign / "model_index.json").unlink()
    (foreign / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["mine", "Mine"]}))
    refused("text_encoder comes from 'mine'; parts of diffusers and transformers are read", foreign)
    (foreign / "model_index.json").write_text(json.dumps(index))
    (foreign / "text_encoder_2").unlink()
    refused("foreign: its text encoders cannot be read", foreign)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
    refused("encode-prompts: takes .* GB, 12,308 bytes for each of 1 examples", flux)
