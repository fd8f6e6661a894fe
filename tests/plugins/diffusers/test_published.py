"""Networks make pictures in the published pipeline: those that a call of it gives, and the same however it is run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import diffusers_whole
import shared_work  # noqa: F401  # registers the features "toy"
import tinyfusion_core as tiny
from diffusers_families import FAMILIES
from diffusers_whole import NETWORKS, PROMPTS, SMALL
from forks import command, start, wait
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_core.errors import MissingFileError, UserError
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_diffusers import DiffusersTransformer, EncodedPrompts, PublishedPipeline, RectifiedFlow
from tinyfusion_images.pictures import artist, asked_for

pytestmark = pytest.mark.filterwarnings("ignore")  # of other libraries
SEED = 3
TRAINER = tiny.Trainer(batch_size=4, precision="fp32", seed=SEED)


def backbone_in(folder: Path, name: str) -> DiffusersTransformer:
    return DiffusersTransformer(model=str(folder), latent=FAMILIES[NETWORKS[name]].latent, text_length=5)


def pipeline_in(where: Path, name: str, **changes: Any) -> PublishedPipeline:
    prompts = None if name == "DiTPipeline" else PROMPTS
    return PublishedPipeline(**{"folder": str(where), "prompts": prompts, "options": SMALL[name], **changes})


def streams(rows: Sequence[int]) -> list[torch.Generator]:
    return [generator(SEED, "pictures", row) for row in rows]


@pytest.mark.parametrize("name", slow_but(SMALL, "StableDiffusion3Pipeline", "DiTPipeline"))
def test_pictures_are_those_of_a_call(name: str, tmp_path: Path) -> None:
    folder = diffusers_whole.whole(name, tmp_path / "pipeline")
    backbone, loss = backbone_in(folder, name), FAMILIES[NETWORKS[name]].loss
    pipeline = pipeline_in(folder, name)
    pipeline.check(backbone)
    samples = tiny.Tensors(backbone.example(9))
    task = tiny.Task(backbone=backbone, loss=loss, train=samples, held_out=samples)
    student = tiny.prune(task, tiny.Uniform(keep=len(task.blocks) - 1)(task, TRAINER))
    object.__setattr__(loss := type(loss)(), "pipeline", pipeline)
    task = tiny.Task(backbone=backbone, loss=loss, train=samples, held_out=samples)
    draw, rows = artist(task, TRAINER), range(1, 6)
    told = asked_for(task, student, rows)
    assert told.tolist() == ([1, 2, 3, 4, 5] if name == "DiTPipeline" else [1, 2, 3, 0, 1])
    images, finite = draw(student, rows, told)
    assert finite.all()

    call = getattr(diffusers, name).from_pretrained(folder, transformer=student)
    asked = {"class_labels": told.tolist()} if name == "DiTPipeline" else {"prompt": [PROMPTS[i] for i in told]}
    found = call(**asked, **SMALL[name], generator=streams(rows), output_type="np", return_dict=False)[0]
    found = found[:, 2] if found.ndim == 5 else found  # of five frames the third
    expected = torch.from_numpy(found).movedim(-1, 1)
    assert images.dtype == torch.uint8
    assert (images / 255 - expected).abs().max() < 0.003
    assert expected.std() > 0.05

    alone, _ = draw(student, range(3, 4), told[2:3])
    assert (alone.int() - images[2:3].int()).abs().max() <= 1
    teacher, _ = draw(task.teacher, rows, told)
    assert not torch.equal(teacher, images)
    assert torch.equal(draw(student, rows, told)[0], images), "whoever was drawn between"


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline whose transformer knows its objective, its data, real pictures and a CLIP model."""
    home = tmp_path_factory.mktemp("published")
    name = "StableDiffusion3Pipeline"
    backbone = backbone_in(diffusers_whole.whole(name, home / "pipeline"), name)
    columns = {key: t.repeat(5, *[1] * (t.ndim - 1)) for key, t in backbone.example(8).items()}
    for key, column in columns.items():
        column.normal_(generator=generator("published", key))
    (home / "data").mkdir()
    for key, column in columns.items():
        np.save(home / "data" / f"{key}.npy", (0.5 * column if key == "x" else column).numpy())
    data = EncodedPrompts(folder=str(home / "data"), num_held_out=4)
    task = tiny.Task(backbone=backbone, loss=RectifiedFlow(), train=data.train(), held_out=data.held_out())
    tiny.Recover(steps=80, lr=1e-2, ema=0)(task, task.teacher, None, tiny.Trainer(batch_size=8))
    task.teacher.save_pretrained(home / "pipeline" / "transformer")
    (home / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (home / "real").mkdir()
    for i in range(12):
        pixels = torch.randint(256, (16, 16, 3), generator=generator("real", i)).numpy().astype(np.uint8)
        Image.fromarray(pixels).save(home / "real" / f"{i}.png")
    diffusers_whole.clip_model(home / "clip")
    return home


def recipe(home: Path, to: Path, **pipeline: Any) -> Path:
    of = {"folder": str(home / "pipeline"), "prompts": str(home / "prompts.txt")}
    options = SMALL["StableDiffusion3Pipeline"]
    fidelity = {"num_samples": 12, "batch_size": 4, "reference": str(home / "real"), "features": "toy"}
    told = {
        "backbone": {
            "class_path": "DiffusersTransformer",
            "init_args": {"model": str(home / "pipeline"), "text_length": 5},
        },
        "loss": {"class_path": "RectifiedFlow", "init_args": {"pipeline": {**of, "options": options, **pipeline}}},
        "data": {"class_path": "EncodedPrompts", "init_args": {"folder": str(home / "data"), "num_held_out": 4}},
        "trainer": {"precision": "fp32", "batch_size": 4, "seed": SEED},
        "search": {"class_path": "Uniform", "init_args": {"keep": 3}},
        "recover": {"steps": 4},
        "evaluate": [
            {"class_path": "HeldOutLoss", "init_args": {"draws": 1}},
            {"class_path": "Fidelity", "init_args": fidelity},
            {"class_path": "PromptScore", "init_args": {"model": str(home / "clip"), "batch_size": 3}},
        ],
    }
    to.write_text(yaml.safe_dump(told))
    return to


@pytest.fixture(scope="module")
def finished(taught: Path) -> Path:
    path = recipe(taught, taught / "recipe.yaml")
    assert main(["validate", str(path)]) == 0
    assert main(["run", str(path), "--run-dir", str(taught / "run")]) == 0
    return taught / "run"


def test_a_run_shows_and_measures_pictures(taught: Path, finished: Path) -> None:
    rows = {row["name"]: row for row in json.loads((finished / "metrics.json").read_text())["measurements"]}
    assert all(rows["FID (toy)"]["values"][name] > 0 for name in ("teacher", "recovered"))
    score, wins = rows["prompt score (clip)"], rows["win rate over the teacher (clip)"]
    assert all(score["values"][name] > 0 for name in ("teacher", "recovered"))
    assert "one picture for each of 4 prompts, judged by clip" in score["note"]
    assert wins["values"]["teacher"] is None
    assert 0 <= wins["values"]["recovered"] <= 1
    assert "standard error: recovered" in wins["note"]
    shown = load_file(finished / "samples.safetensors")
    assert shown["labels"].tolist() == [0, 1, 2, 3] * 3
    assert shown["recovered"].shape == (12, 3, 16, 16)
    assert (finished / "figures" / "samples_recovered.png").exists()
    assert json.loads((finished / "prompts.json").read_text()) == PROMPTS
    assert "The prompts are 0: a cat; 1: two dogs in a garden;" in (finished / "report.html").read_text()


def test_samples_of_a_run_are_the_pipelines(taught: Path, finished: Path, tmp_path: Path) -> None:
    words = ["sample", str(finished), "--num", "5", "--batch-size", "2", "--seed", str(SEED)]
    assert main([*words, "--to", str(tmp_path / "set.npz")]) == 0
    assert main([*words, "--to", str(tmp_path / "set")]) == 0
    student = diffusers.AutoModel.from_pretrained(str(finished / "student"))
    call = diffusers.StableDiffusion3Pipeline.from_pretrained(taught / "pipeline", transformer=student)
    with np.load(tmp_path / "set.npz") as made:
        assert made["arr_1"].tolist() == [0, 1, 2, 3, 0]
        for i, image in enumerate(made["arr_0"]):
            options = {**SMALL["StableDiffusion3Pipeline"], "generator": streams([i]), "output_type": "np"}
            alone = call(PROMPTS[i % 4], **options).images[0]
            assert np.abs(image / 255 - alone).max() < 0.006
            assert np.array_equal(np.asarray(Image.open(tmp_path / "set" / f"{i:06d}.png")), image)
    shutil.copy(tmp_path / "set" / "000003.png", tmp_path / "before.png")
    for name in ("000003.png", "000002.png"):
        (tmp_path / "set" / name).unlink()
    assert main([*words, "--to", str(tmp_path / "set")]) == 0
    assert (tmp_path / "set" / "000003.png").read_bytes() == (tmp_path / "before.png").read_bytes()
    assert main(["sample", str(finished), "--num", "3", "--out", str(tmp_path / "grid.png")]) == 0


def test_other_prompts_are_other_samples_and_no_other_training(
    taught: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, home = tmp_path / "run", tmp_path
    shutil.copytree(finished, run)
    words = ["sample", str(run), "--num", "2", "--to", str(tmp_path / "set")]
    assert main(words) == 0
    (home / "prompts.txt").write_text("a boat\n")
    changed = recipe(taught, home / "recipe.yaml", prompts=str(home / "prompts.txt"))
    student = (run / "student" / "config.json").stat().st_mtime_ns
    capsys.readouterr()
    assert (
        main(["run", str(changed), "--run-dir", str(run), "--restart-from", "evaluate"]) == 2
    )  # one prompt is too few
    assert "PromptScore needs at least 2 prompts" in capsys.readouterr().err
    (home / "prompts.txt").write_text("a boat\na hill\n")
    assert main(["run", str(changed), "--run-dir", str(run), "--restart-from", "evaluate"]) == 0
    assert (run / "student" / "config.json").stat().st_mtime_ns == student
    assert load_file(run / "samples.safetensors")["labels"].tolist() == [0, 1] * 6
    assert main(words) == 2
    assert "has samples made with another loss, prompts" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_what_one_makes(taught: Path, finished: Path, tmp_path: Path) -> None:
    words = ["sample", finished, "--num", "7", "--batch-size", "2", "--to"]
    assert main([*map(str, words), str(tmp_path / "one")]) == 0
    log = tmp_path / "log.txt"
    assert wait(start(command(*words, tmp_path / "two"), log, processes=2)) == [0, 0], log.read_text()[-3000:]
    for i in range(7):
        assert (tmp_path / "one" / f"{i:06d}.png").read_bytes() == (tmp_path / "two" / f"{i:06d}.png").read_bytes()
    told = yaml.safe_load((taught / "recipe.yaml").read_text())
    told["evaluate"] = [metric for metric in told["evaluate"] if metric["class_path"] != "Fidelity"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(told))
    again, log = ["run", tmp_path / "recipe.yaml", "--run-dir", tmp_path / "run"], tmp_path / "run.txt"
    assert wait(start(command(*again), log, processes=2)) == [0, 0], log.read_text()[-3000:]
    one, two = (load_file(run / "samples.safetensors") for run in (finished, tmp_path / "run"))
    assert torch.equal(one["teacher"], two["teacher"])
    one, two = (
        {
            row["name"]: row["values"]["teacher"]
            for row in json.loads((run / "metrics.json").read_text())["measurements"]
        }
        for run in (finished, tmp_path / "run")
    )
    assert one["prompt score (clip)"] == two["prompt score (clip)"]


def test_what_is_missing_is_said_before_anything_is_spent(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "StableDiffusion3Pipeline"
    backbone, folder = backbone_in(taught / "pipeline", name), tmp_path / "pipeline"
    shutil.copytree(taught / "pipeline", folder)

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(UserError, match=message):
            pipeline_in(folder, name, **changes).check(backbone)

    refused("pipeline.folder: 'org/model' is no folder; .* `hf download", folder="org/model")
    refused("no pipeline there", folder=str(taught / "data"))
    refused("pipeline.prompts: StableDiffusion3Pipeline takes prompts; name a file", prompts=None)
    refused("pipeline.prompts: holds no prompts", prompts=["", " "])
    refused("none.txt", prompts="none.txt")
    refused(r"options.guidance: .* has no such option; did you mean 'guidance_scale'", options={"guidance": 2.0})
    for own in ("generator", "self"):
        refused(f"options.{own}: .* has no such option", options={own: 1})
    dit = backbone_in(diffusers_whole.whole("DiTPipeline", tmp_path / "dit"), "DiTPipeline")
    with pytest.raises(UserError, match="transformer of '.*' is a SD3Transformer2DModel, the backbone's a DiTTrans"):
        pipeline_in(folder, name).check(dit)
    with pytest.raises(UserError, match="prompts: DiTPipeline takes class labels; set null"):
        pipeline_in(tmp_path / "dit", "DiTPipeline", prompts=["a cat"]).check(dit)
    filled = FAMILIES["FluxTransformer2DModel"].backbone("FluxTransformer2DModel", in_channels=288, out_channels=16)
    flux = tmp_path / "flux"
    flux.mkdir()
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (flux / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="FluxTransformer2DModel as configured takes 'condition', which no prompt"):
        pipeline_in(flux, "FluxPipeline").check(filled)
    (flux / "model_index.json").write_text(json.dumps({**index, "transformer_2": index["transformer"]}))
    with pytest.raises(
        UserError, match="in the place of 'transformer', and the backbone is the pipeline's 'transformer_2'"
    ):
        pipeline_in(flux, "FluxPipeline").check(replace(filled, subfolder="transformer_2"))

    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingFileError, match="vae' holds no weights as safetensors"):
        pipeline_in(folder, name).check(backbone)
    shutil.rmtree(folder / "vae")
    path = recipe(taught, tmp_path / "recipe.yaml", folder=str(folder))
    for words, ends in ((["validate", str(path)], 0), (["run", str(path), "--run-dir", str(tmp_path / "run")], 2)):
        capsys.readouterr()
        assert main(words) == ends
        said = "".join(capsys.readouterr())
        assert f"loss.pipeline.folder: '{folder / 'vae'}' is missing, and StableDiffusion3Pipeline needs it" in said
    assert not (tmp_path / "run" / "student").exists()
    assert main(["validate", str(recipe(taught, path, folders="x"))]) == 2
    assert "loss.pipeline.folders: unknown key; did you mean 'folder'?" in capsys.readouterr().err
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    refused("pipeline' has no autoencoder, its model_index.json says")
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["mine", "Mine"]}))
    refused("vae comes from 'mine'; parts of diffusers and transformers are read")


def test_options_that_the_pipeline_refuses_when_it_is_called(taught: Path) -> None:
    name = "StableDiffusion3Pipeline"
    model = backbone_in(taught / "pipeline", name).build()
    draw = pipeline_in(taught / "pipeline", name, options={"height": 17}).opened()
    with pytest.raises(UserError, match="StableDiffusion3Pipeline makes no picture .*divisible"):
        draw(model, [0], streams([0]))
    shutil.copytree(taught / "pipeline", broken := taught / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"?")
    with pytest.raises(UserError, match=r"pipeline.folder: '.*broken' cannot be read"):
        pipeline_in(broken, name).opened()(model, [0], streams([0]))
