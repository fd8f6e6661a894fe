"""Encoders of transformers: families, files, padding, and runs of whole recipes."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import tinyfusion_core as tiny
from encoder_families import FAMILIES, PAGE, examine
from encoder_toys import BATCH, PARTS, folder, output, recipe_of, sentence_folder, task_of, texts
from llm_toys import decide
from marks import slow_but
from tinyfusion_core.cli import main
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_core.pipeline.planning.training import Hardware
from tinyfusion_core.pruning.gating import Gates
from tinyfusion_llm import MaskedLM, TextEncoder

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers
ROWS = {row.split()[1]: row for row in re.findall(r"^\| (?!family )\S+ \| \w+ \|.*$", PAGE.read_text(), re.MULTILINE)}
LIBRARY = os.environ.get("TINYFUSION_CLIENTS", "")


@pytest.mark.parametrize("family", slow_but(FAMILIES, "albert", "bart"))
def test_a_family_is_what_the_page_says(family: str, tmp_path: Path) -> None:
    row = examine(family, tmp_path).row(family)
    if f"transformers {transformers.__version__}," in PAGE.read_text():  # of another version it may differ
        assert row == ROWS[family], "run python tests/encoder_families.py"


def test_the_page_lists_all_of_them() -> None:
    if f"transformers {transformers.__version__}," in PAGE.read_text():
        assert set(ROWS) == set(FAMILIES)
    counts = [int(n) for n in re.findall(r"^## .*: (\d+)$", PAGE.read_text(), re.MULTILINE)]
    assert sum(counts) == len(ROWS)
    assert counts[0] >= 30


@pytest.mark.parametrize("family", ["mpnet", "distilbert", "modernbert"])
def test_a_batch_without_padding_goes_through_gates(family: str, tmp_path: Path) -> None:
    head = family != "mpnet"
    more = {"mpnet": {}, "distilbert": {"n_layers": 6}, "modernbert": {"local_attention": 8}}[family]
    task = task_of(folder(tmp_path, family, head, **more), head)
    full = {name: t[:1].expand(3, *t.shape[1:]) for name, t in BATCH.items()}  # the first has none
    with Gates(task.teacher, task.blocks, task.batch_dim(task.teacher), task.streams, task.backbone.unneeded) as gates:
        gates.mask = torch.tensor([[1.0] * 6, [1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1]])
        found = task.loss.losses(task.teacher, task.loss.prepare(full, tiny.Rng(0, "test")))
    for row, kept in ((1, (0, 1, 3, 4, 5)), (2, (0, 2, 3, 5))):
        student = tiny.prune(task, decide(task, kept))
        alone = task.loss.losses(student, task.loss.prepare(full, tiny.Rng(0, "test")))
        assert torch.allclose(alone[row], found[row], rtol=1e-4)


def test_weights_that_no_prediction_reaches_stay(tmp_path: Path) -> None:
    network = TextEncoder(model=str(folder(tmp_path, "bert", head=False)), context=12).build()
    still = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert still == ["pooler.dense.weight", "pooler.dense.bias"]
    whole = MaskedLM(model=str(folder(tmp_path / "whole", "bert")), context=12).build()
    assert all(p.requires_grad for p in whole.parameters())


def test_a_student_keeps_what_sentence_transformers_reads(tmp_path: Path) -> None:
    teacher = sentence_folder(tmp_path / "teacher")
    task = task_of(teacher, head=False)
    student = tiny.prune(task, decide(task, (0, 2, 3, 5)))
    for _ in range(2):  # over what an earlier one has left
        tiny.save_pretrained(student, task, decide(task, (0, 2, 3, 5)), tmp_path / "student")
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        assert (tmp_path / "student" / name).read_bytes() == (teacher / name).read_bytes()
        assert name in json.loads((tmp_path / "student" / "tinyfusion.json").read_text())["sha256"]
    again = tiny.load_pretrained(tmp_path / "student")
    assert again.config.num_hidden_layers == 4
    assert torch.equal(output(again), output(student))
    (tmp_path / "student" / "1_Pooling" / "config.json").write_text("{}")
    with pytest.raises(tiny.UserError, match=r"1_Pooling/config.json: not the file that"):
        tiny.load_pretrained(tmp_path / "student")


@pytest.mark.slow
@pytest.mark.skipif(not Path(LIBRARY, "sentence_transformers").is_dir(), reason="needs TINYFUSION_CLIENTS")
def test_sentence_transformers_reads_a_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, LIBRARY])
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

    task = task_of(sentence_folder(tmp_path / "teacher"), head=False)
    student = tiny.prune(task, decide(task, (0, 2, 3, 5)))
    tiny.save_pretrained(student, task, decide(task, (0, 2, 3, 5)), tmp_path / "student")
    found = SentenceTransformer(str(tmp_path / "student"), device="cpu").encode(["w7 w8 w9", "w10"])
    for row, ids in enumerate(([1, 7, 8, 9, 2], [1, 10, 2])):
        inputs = {"tokens": torch.tensor([ids]), "attention": torch.ones(1, len(ids), dtype=torch.long)}
        expected = task.loss.predict(student, inputs)[0].detach()
        assert torch.allclose(torch.from_numpy(found[row]), expected, atol=1e-5)


@pytest.mark.parametrize("head", slow_but([True, False], False))
def test_a_recipe_runs_up_to_a_student_that_transformers_reads(
    head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinyfusion_core.pipeline.run.check_teacher", lambda *_: None)  # a random model knows nothing
    path = folder(tmp_path / "model", "bert", head)
    metric = "MaskedAccuracy" if head else "SimilarityRank"
    recipe = recipe_of(path, tmp_path, head, held_out_fraction=0.4)
    content = yaml.safe_load(Path(recipe).read_text())
    content |= {"evaluate": [metric], "trainer": {"precision": "fp32", "batch_size": 4}}
    if not head:
        content["data"]["init_args"]["teacher"] = None
        content["data"]["init_args"]["tokenizer"] = str(sentence_folder(tmp_path / "same"))
        content["backbone"]["init_args"]["model"] = str(tmp_path / "same")
    Path(recipe).write_text(yaml.safe_dump(content))
    assert main(["run", recipe, "--run-dir", "run", "--recover.kd", "OutputKD"]) == 0
    student: Any = getattr(transformers, PARTS[head][2]).from_pretrained("run/student")
    assert student.config.num_hidden_layers == 4
    measured = {m["name"]: m["values"] for m in json.loads(Path("run/metrics.json").read_text())["measurements"]}
    if not head:
        assert measured["similarity rank"]["teacher"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("head", "family", "more", "message"),
    [
        (True, "albert", {"embedding_size": 32}, r"one ModuleList of blocks, each with weights of its own"),
        pytest.param(
            True,
            "t5",
            {"num_layers": 6},
            r"is an encoder-decoder; expected a masked language model",
            marks=pytest.mark.slow,
        ),
        (False, "t5", {"num_layers": 6}, r"is an encoder-decoder; expected an encoder"),
        (True, "llama", {}, r"is not a masked language model; AutoModelForMaskedLM of transformers does not have one"),
        (True, "bert", {"max_position_embeddings": 8}, r"backbone.context is 12; expected at most 8, the network's"),
        pytest.param(
            True,
            "bert",
            {"vocab_size": 60},
            r"network has 60 tokens, 0 to 59: take the model's own tokenizer",
            marks=pytest.mark.slow,
        ),
        (False, "bert", {"hidden_size": 16}, r"'embedding' of a sample is \[32\], .* takes \[16\]"),
    ],
)
def test_what_cannot_be_pruned_is_refused_in_the_plan(
    head: bool, family: str, more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    config = transformers.AutoConfig.for_model(family, **{"num_hidden_layers": 6, **_COMMON, **more})
    kinds = {"t5": "T5ForConditionalGeneration", "llama": "LlamaForCausalLM"}
    if family in kinds:
        getattr(transformers, kinds[family])(config).save_pretrained(path)
    else:
        folder(path, family, head, **more)
    problems = make_plan(tiny.load_recipe(recipe_of(path, tmp_path, head))).problems
    assert any(re.search(message, problem) for problem in problems), problems


@pytest.mark.parametrize("head", [True, False])
def test_next_tokens_are_no_loss_of_an_encoder(head: bool, tmp_path: Path) -> None:
    recipe = recipe_of(folder(tmp_path / "model", "bert", head), tmp_path, head)
    problems = make_plan(tiny.load_recipe(recipe, ["--loss=NextToken"])).problems
    assert any("an encoder sees what follows; take MaskedToken or" in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("head", "loss"), [(True, "SentenceEmbedding"), (False, "MaskedToken"), (True, "FlowMatching")]
)
def test_a_loss_that_is_made_for_others_is_named(head: bool, loss: str, tmp_path: Path) -> None:
    recipe = recipe_of(folder(tmp_path / "model", "bert", head), tmp_path, head)
    (problem,) = make_plan(tiny.load_recipe(recipe, [f"--loss={loss}"]), hardware=Hardware()).problems
    assert re.search(
        rf"loss: {loss} \(of .* does not fit (MaskedLM|TextEncoder) .*take a loss that is made for it", problem
    )


_COMMON = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 97, "d_model": 32}


def test_data_for_other_networks_are_refused(tmp_path: Path) -> None:
    path, data = folder(tmp_path / "model", "bert", head=False), {"files": [str(texts(tmp_path / "t.jsonl"))]}
    recipe = yaml.safe_load(Path(recipe_of(path, tmp_path, head=False)).read_text())
    told = {**recipe["data"]["init_args"], **data}
    told.pop("teacher")
    recipe["data"] = {"class_path": "PaddedText", "init_args": told}
    Path(tmp_path / "other.yaml").write_text(yaml.safe_dump(recipe))
    problems = make_plan(tiny.load_recipe(str(tmp_path / "other.yaml"))).problems
    assert any("'embedding' of a sample is missing" in problem for problem in problems), problems
