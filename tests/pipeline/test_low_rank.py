"""What LoRA has added to the sliced teacher, as an adapter: the libraries that load it make the student of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import tinyfusion_core as tiny
from diffusers_tasks import make
from llm_toys import TOKENS, decide, folder, task_of
from small_run import RECIPE, digits_task, run
from starting import TRAINER
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.exporting.low_rank import adapter_files, factors_of
from tinyfusion_core.pruning.weight_update import LoRA
from tinyfusion_dit import DiT, GaussianDiffusion
from tinyfusion_mar import MAR, MaskedTokenDiffusion
from tinyfusion_sit import FlowMatching, SiT

pytestmark = pytest.mark.filterwarnings("ignore")  # of peft and transformers
KEEP = {"class_path": "Keep", "init_args": {"blocks": [0, 1, 3, 6]}}


def adapted(task: tiny.Task, decision: tiny.Decision, rank: int = 3, scale: float = 0.1) -> nn.Module:
    """A student after a recovery by LoRA, in whose every layer something was learned."""
    student = tiny.prune(task, decision)
    torch.manual_seed(0)
    with LoRA(rank=rank).merged(student, task.backbone.block_paths(student)) as weights, torch.no_grad():
        for p in weights:
            p.copy_(scale * torch.randn_like(p))
    return student


def written(task: tiny.Task, student: nn.Module, decision: tiny.Decision, place: Path, rank: int = 3) -> Path:
    for name, write in adapter_files(task, student, decision, rank).items():
        write(place / name)
    return place


def furthest(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of two networks' weights, of the largest weight."""
    theirs = other.state_dict()
    size = max(float(t.abs().max()) for t in theirs.values())
    return max(float((t - theirs[name]).abs().max()) for name, t in model.state_dict().items()) / size


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float32"),
        pytest.param("gpt2", "float32", marks=pytest.mark.slow),
        pytest.param("llama", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_peft_and_transformers_make_the_student_of_it(family: str, dtype: str, tmp_path: Path) -> None:
    from peft import PeftModel

    task = task_of(folder(tmp_path / "full", family))
    task.teacher.to(getattr(torch, dtype))
    decision = decide(task, (0, 2, 3, 5))
    student = adapted(task, decision)
    place = written(task, student, decision, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny.prune(task, decision), place)
    other: Any = tiny.prune(task, decision)
    other.load_adapter(str(place))
    exact = 1e-5 if dtype == "float32" else 2e-2
    with torch.no_grad():
        expected, plain = (m(input_ids=TOKENS, use_cache=False).logits for m in (student, tiny.prune(task, decision)))
        for model in (loaded, other):
            assert torch.allclose(model(input_ids=TOKENS, use_cache=False).logits, expected, atol=exact)
    assert (expected - plain).abs().max() > 10 * exact
    assert furthest(loaded.merge_and_unload(), student) < (1e-6 if dtype == "float32" else 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        pytest.param("FluxTransformer2DModel", "FluxPipeline", marks=pytest.mark.slow),
        ("SD3Transformer2DModel", "StableDiffusion3Pipeline"),
    ],
)
def test_diffusers_makes_the_student_of_it(name: str, pipeline: str, tmp_path: Path) -> None:
    import diffusers
    from peft import PeftModel

    task, inputs = make(name)
    kept = tuple(i for i in range(len(task.blocks)) if i not in (1, len(task.blocks) - 2))
    decision = tiny.Decision(tuple(task.blocks), kept, "Keep")
    student = adapted(task, decision)
    place = written(task, student, decision, tmp_path / "adapter")
    alone: Any = tiny.prune(task, decision)
    alone.load_lora_adapter(place, weight_name="pytorch_lora_weights.safetensors")
    inside, cls = tiny.prune(task, decision), getattr(diffusers, pipeline)
    state = cls.lora_state_dict(place)  # what the pipeline's `load_lora_weights` does
    cls.load_lora_into_transformer(state, **({"network_alphas": None} if "Flux" in name else {}), transformer=inside)
    by_peft = PeftModel.from_pretrained(tiny.prune(task, decision), place).merge_and_unload()
    with torch.no_grad():
        expected, plain = (task.loss.predict(model, inputs) for model in (student, tiny.prune(task, decision)))
        for model in (alone, inside, by_peft):
            assert torch.allclose(task.loss.predict(model, inputs), expected, atol=1e-5)
    assert not torch.allclose(expected, plain, atol=1e-3)


class Convolutions(nn.Module):
    """Blocks of every kind of layer that has a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Conv1d(6, 4, 3), nn.Conv2d(4, 5, 3), nn.Conv3d(3, 4, (1, 3, 2)), nn.Linear(2, 9)]
        )


def test_layers_with_kernels_and_narrow_ones(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = Convolutions()
    student = Convolutions()
    student.load_state_dict(base.state_dict())
    blocks = [f"blocks.{i}" for i in range(4)]
    with LoRA(rank=3).merged(
        nn.ModuleDict({"net": student}), [f"net.{b.partition('.')[0]}" for b in blocks]
    ) as weights:
        for p in weights:
            nn.init.normal_(p)
    found = factors_of(base, student, 3)
    assert list(found) == blocks
    # They have the shapes, and the meaning, that they have in peft.
    made = get_peft_model(base, LoraConfig(r=3, lora_alpha=3, target_modules=blocks))
    state = made.state_dict()
    for path, pair in found.items():
        for side, factor in pair.items():
            state[f"base_model.model.{path}.lora_{side}.default.weight"].copy_(factor)
    assert furthest(made.merge_and_unload(), student) < 1e-6


@pytest.mark.parametrize("of", [SiT, MAR, DiT])
def test_networks_of_ours_are_plain_to_peft(of: type[Any], tmp_path: Path) -> None:
    from peft import PeftModel

    backbone = replace(of.tiny(), units=("attention", "mlp")) if of is DiT else of.tiny()  # branches of one
    loss = {DiT: GaussianDiffusion, SiT: FlowMatching, MAR: MaskedTokenDiffusion}[of]()
    task = tiny.Task.without_data(backbone, loss, backbone.build())
    kept = tuple(i for i in range(len(task.blocks)) if i not in (1, 2, len(task.blocks) - 1))
    decision = tiny.Decision(tuple(task.blocks), kept, "Keep")
    student = adapted(task, decision)
    place = written(task, student, decision, tmp_path / "adapter")
    assert furthest(PeftModel.from_pretrained(tiny.prune(task, decision), place).merge_and_unload(), student) < 1e-6


def recipe_at(place: Path, **parts: Any) -> Path:
    recover = {"steps": 6, "update": {"class_path": "LoRA", "init_args": {"rank": 2}}, "lr": 1e-2}
    content = {**RECIPE, "search": KEEP, "recover": recover, "evaluate": [], **parts}
    place.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return place


ROUND = {"steps": 4, "update": {"class_path": "LoRA", "init_args": {"rank": 1}}, "lr": 1e-2}
LEARNED = {"pattern": [2, 4], "steps": 4, "lr": 1e-2, "update": {"class_path": "LoRA", "init_args": {"rank": 3}}}
SIZES = {"input_size": 8, "patch_size": 2, "in_channels": 1, "hidden_size": 16, "depth": 8, "num_heads": 2}
FRESH = {"class_path": "DiT", "init_args": {**SIZES, "num_classes": 10, "learn_sigma": False}}


@pytest.mark.parametrize(
    ("parts", "rank"),
    [
        ({}, 2),
        pytest.param({"search": LEARNED, "recover": {**ROUND, "start": "Inherit"}}, 4, marks=pytest.mark.slow),
        pytest.param({"search": LEARNED, "recover": {"steps": 0, "start": "Inherit"}}, 3, marks=pytest.mark.slow),
        pytest.param({"backbone": FRESH, "train": {"steps": 30, "lr": 1e-2}}, 2, marks=pytest.mark.slow),
        pytest.param(
            {
                "search": None,
                "recover": None,
                "rounds": {
                    "a": {"search": {"class_path": "Keep", "init_args": {"blocks": [0, 1, 3, 4, 6]}}, "recover": ROUND},
                    "b": {"search": {"class_path": "Keep", "init_args": {"blocks": [0, 2, 4]}}, "recover": ROUND},
                },
            },
            2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_of_a_run(parts: dict[str, Any], rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import PeftModel

    recipe = recipe_at(tmp_path / "recipe.yaml", **parts)
    assert run(recipe, tmp_path / "run") == 0
    capsys.readouterr()
    for _ in range(2):  # what is ours is written again
        assert main(["export", str(tmp_path / "run"), "--to", "adapter"]) == 0
    place = tmp_path / "run" / "export" / "adapter"
    assert capsys.readouterr().out.split() == [str(place)] * 2
    settings = json.loads((place / "adapter_config.json").read_text())
    assert settings["r"] == settings["lora_alpha"] == rank
    weights = load_file(place / "adapter_model.safetensors")
    assert {t.shape[0 if "lora_A" in name else 1] for name, t in weights.items()} == {rank}
    # The sliced teacher, made as the model card says.
    command = ["run", str(recipe), "--run-dir", str(tmp_path / "sliced"), "--recover", "null", "--evaluate", "[]"]
    command += ["--search", f"{{class_path: Keep, init_args: {{decision: {place / 'decision.json'}}}}}"]
    command += ["--rounds", "null"]
    if "train" in parts:
        command += ["--train", "null", "--backbone.checkpoint", str(tmp_path / "run" / "teacher")]
    assert main(command) == 0
    sliced = tiny.load_pretrained(tmp_path / "sliced" / "student")
    last = tmp_path / "run" / ("b" if "rounds" in parts else "") / "student"
    student = tiny.load_pretrained(last)
    assert furthest(sliced, student) > 1e-4
    assert furthest(PeftModel.from_pretrained(sliced, place).merge_and_unload(), student) < 1e-6


@pytest.mark.slow
def test_of_a_recovery_that_went_on(tmp_path: Path) -> None:
    from peft import PeftModel

    recipe = recipe_at(tmp_path / "recipe.yaml")
    assert run(recipe, tmp_path / "run") == 0
    assert run(recipe, tmp_path / "run", "--recover.steps", "12", "--extend") == 0
    assert main(["export", str(tmp_path / "run"), "--to", "adapter", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 2
    task, decision = digits_task(), tiny.Decision.load(tmp_path / "out" / "decision.json")
    student = tiny.load_pretrained(tmp_path / "run" / "student")
    loaded = PeftModel.from_pretrained(tiny.prune(task, decision), tmp_path / "out").merge_and_unload()
    assert furthest(loaded, student) < 1e-6


@pytest.mark.parametrize(
    ("recover", "message"),
    [
        (None, "recover: nothing was trained, so the student is its sliced teacher"),
        pytest.param(
            {"steps": 1},
            "recover.update: null moves the weights, and an adapter holds what LoRA adds",
            marks=pytest.mark.slow,
        ),
        ({"steps": 1, "update": "LastBlocks"}, "recover.update: LastBlocks moves the weights"),
        pytest.param(
            {**ROUND, "start": "Fuse"},
            "recover.start: Fuse changes weights that an adapter would lie on",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_is_no_adapter(recover: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_at(tmp_path / "recipe.yaml", recover=recover)
    if recover and recover.get("start"):
        recover["start"] = {"class_path": "Fuse", "init_args": {"steps": 1}}
        recipe = recipe_at(tmp_path / "recipe.yaml", recover=recover)
    assert run(recipe, tmp_path / "run") == 0
    assert main(["export", str(tmp_path / "run"), "--to", "adapter"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "export").exists()


def test_a_teacher_that_is_not_the_run_s(tmp_path: Path) -> None:
    task = digits_task()
    decision = tiny.Keep([0, 1, 3, 6])(task, TRAINER)
    student = adapted(task, decision)
    with torch.no_grad():
        (weight := student.get_parameter("blocks.2.mlp.fc1.weight")).add_(torch.randn_like(weight))
    with pytest.raises(tiny.UserError, match=r"blocks\.2\.mlp\.fc1\.weight: .* by more than LoRA of rank 3 adds"):
        adapter_files(task, student, decision, 3)
    student = adapted(task, decision)
    with torch.no_grad():
        student.get_parameter("blocks.2.mlp.fc1.bias").add_(1e-4)
    with pytest.raises(
        tiny.UserError, match=r"blocks\.2\.mlp\.fc1\.bias: .* by more than LoRA of rank 3 adds to a layer"
    ):
        adapter_files(task, student, decision, 3)
    other = tiny.Decision(tuple(f"layers.{i}" for i in range(8)), decision.kept, "Keep")
    with pytest.raises(tiny.UserError, match="the checkpoint has 8"):
        adapter_files(task, adapted(task, decision), other, 3)


@pytest.mark.slow
def test_a_folder_of_somebody_else_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_at(tmp_path / "recipe.yaml")
    assert run(recipe, tmp_path / "run") == 0
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "adapter_config.json").write_text("{}")
    assert main(["export", str(tmp_path / "run"), "--to", "adapter", "--out", str(tmp_path / "theirs")]) == 2
    assert (tmp_path / "theirs" / "adapter_config.json").read_text() == "{}"
