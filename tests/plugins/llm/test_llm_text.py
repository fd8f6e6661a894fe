"""Next-token loss, tokenised text and what is measured of language models."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tinyfusion_core as tiny
from llm_toys import VOCABULARY, folder, tokenizer, words
from tinyfusion_core.cli import main
from tinyfusion_core.runtime.seeding import generator
from tinyfusion_llm import CausalLM, Generation, LmEval, NextToken, Perplexity, TextTokens
from tinyfusion_llm.hidden import IGNORED

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tokenizer(folder(tmp_path / "model", "llama"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for i in range(8):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{i}.txt").write_text(words(i, 40 + i))
    return tmp_path / "texts"


@pytest.fixture
def data(model: Path, texts: Path, tmp_path: Path) -> TextTokens:
    return TextTokens(tokenizer=str(model), files=[str(texts)], context=12, cache=str(tmp_path / "cache"))


def padded_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, VOCABULARY, (3, 11))
    labels = tokens.clone()
    labels[0, 7:], labels[1, :4], labels[2] = IGNORED, IGNORED, IGNORED
    return {"tokens": tokens, "labels": labels}


def test_the_loss_is_the_mean_over_the_counted_tokens_in_any_number_of_pieces() -> None:
    model, batch, rng = CausalLM.tiny().build(), padded_batch(), tiny.Rng(0, "test")
    logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
    all_losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none").view(3, -1)
    expected = torch.stack([all_losses[0].sum() / 6, all_losses[1].sum() / 7, all_losses[2].sum() * 0])
    gradients = []
    for chunk in (1024, 9, 1):
        loss = NextToken(chunk=chunk)
        inputs = loss.prepare(batch, rng)
        found = loss.loss(loss.predict(model, inputs), inputs)
        assert torch.allclose(found, expected, atol=1e-6)
        gradients.append(torch.autograd.grad(found.sum(), list(model.parameters())))
    expected_gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for some in gradients:
        assert all(torch.allclose(g, e, atol=1e-5) for g, e in zip(some, expected_gradients, strict=True))


def test_no_logits_of_the_whole_batch_are_held() -> None:
    model, batch = CausalLM.tiny().build(), padded_batch()
    sizes: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, _args, out: sizes.append(out.numel() // VOCABULARY))
    loss = NextToken(chunk=6)
    inputs = loss.prepare(batch, tiny.Rng(0, "test"))
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        total = loss.loss(loss.predict(model, inputs), inputs).sum()
    total.backward()
    assert max(sizes) == 6  # 2 tokens of 3 samples
    # Of tensors as wide as the vocabulary, the graph holds the head's own weights alone.
    assert {tuple(shape) for shape in saved if VOCABULARY in shape} <= {(32, VOCABULARY), (VOCABULARY, 32)}


def test_the_distance_is_the_divergence_from_the_teacher() -> None:
    batch, rng = padded_batch(), tiny.Rng(0, "test")
    student = CausalLM.tiny().build()
    teacher = CausalLM(network=CausalLM.tiny().network, _random_seed=1).build()
    loss = NextToken(temperature=2.0, chunk=6)
    inputs = loss.prepare(batch, rng)
    ours, theirs = (loss.predict(m, inputs) for m in (student, teacher))
    p, q = (
        (m(input_ids=batch["tokens"], use_cache=False).logits[:, :-1] / 2).log_softmax(-1) for m in (teacher, student)
    )
    counted = batch["labels"][:, 1:] != IGNORED
    kl = (p.exp() * (p - q)).sum(-1) * counted * 4
    expected = kl.sum(1) / counted.sum(1).clamp(min=1)
    found = loss.distance(ours, theirs, inputs)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(loss.distance(theirs, theirs, inputs), torch.zeros(3), atol=1e-6)
    bounds = [NextToken(temperature=2.0, top_k=k).distance(ours, theirs, inputs) for k in (1, 5, 40)]
    assert (bounds[0] <= bounds[1] + 1e-5).all() and (bounds[1] <= bounds[2] + 1e-5).all()
    assert (bounds[2] <= found + 1e-5).all() and (bounds[0][:2] > 0).all()
    assert torch.allclose(
        NextToken(temperature=2.0, top_k=VOCABULARY).distance(ours, theirs, inputs), expected, atol=1e-5
    )
    (gradient,) = torch.autograd.grad(bounds[0].sum(), student.lm_head.weight)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_packed_rows_are_the_documents_in_a_seeded_order(data: TextTokens, texts: Path) -> None:
    train, held_out = data.train(), data.held_out()
    documents = [[int(w[1:]) for w in path.read_text().split()] + [2] for path in sorted(texts.iterdir())]
    rows = train.__getitems__(list(range(len(train))))["tokens"]
    assert rows.shape[1] == 12
    text = rows.flatten().tolist()
    order = torch.randperm(8, generator=generator(0, "documents")).tolist()
    assert text == [token for i in order[1:] for token in documents[i]][: len(text)]
    held = held_out.__getitems__(list(range(len(held_out))))["tokens"].flatten().tolist()
    assert held == documents[order[0]][: len(held)]
    assert not set(pairwise(text)) >= set(pairwise(held))


def test_text_is_tokenised_once(data: TextTokens, texts: Path, tmp_path: Path) -> None:
    first = data.train().__getitems__([0])
    (made,) = (tmp_path / "cache").iterdir()
    assert sorted(p.name for p in made.iterdir()) == ["bounds", "counted", "largest", "tokens"]
    before = (made / "tokens").stat().st_mtime_ns
    again = TextTokens(tokenizer=data.tokenizer, files=[str(texts)], context=12, cache=data.cache)
    assert torch.equal(again.train().__getitems__([0])["tokens"], first["tokens"])
    assert (made / "tokens").stat().st_mtime_ns == before
    (texts / "0.txt").write_text(words(99, 50))
    TextTokens(tokenizer=data.tokenizer, files=[str(texts)], context=12, cache=data.cache).train()
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_prompts_do_not_count_and_padding_neither(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"q": words(i, 3), "a": words(i + 9, 4)}) for i in range(4)))
    options = {"tokenizer": str(model), "files": [str(path)], "text_field": "a", "prompt_field": "q"}
    options.update(context=10, cache=str(tmp_path / "cache"), held_out_files=[str(path)])
    data = TextTokens(**options, pack=False)
    row = data.held_out().__getitems__([2])
    prompt, answer = ([int(w[1:]) for w in words(seed, num).split()] for seed, num in ((2, 3), (11, 4)))
    assert row["tokens"][0].tolist() == [*prompt, *answer, 2, 0, 0]
    assert row["labels"][0].tolist() == [IGNORED] * 3 + [*answer, 2] + [IGNORED] * 2
    packed = TextTokens(**options, max_held_out=2)
    assert len(packed.held_out()) == 2
    assert (packed.held_out().__getitems__([0])["labels"] == IGNORED).sum() == 5  # two prompts of three, the second cut


def test_long_documents_are_rows_of_their_own_without_packing(model: Path, texts: Path, tmp_path: Path) -> None:
    data = TextTokens(tokenizer=str(model), files=[str(texts)], context=16, pack=False, cache=str(tmp_path / "cache"))
    rows = data.train().__getitems__(list(range(len(data.train()))))
    ends = (rows["tokens"] == 2).sum(1)
    assert int(ends.sum()) == 7  # one document of eight is held out
    assert ((rows["labels"] == IGNORED).sum(1) > 0).sum() <= 7


def test_bad_text(model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # installed here or not
    base = {"tokenizer": str(model), "cache": str(tmp_path / "cache")}
    (tmp_path / "bad.jsonl").write_text('{"text": "w4"}\n{"txt": "w5"}\n')
    (tmp_path / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "w4"}]}\n')
    (tmp_path / "number.jsonl").write_text('\n{"text": 3}\n')
    (tmp_path / "worse.jsonl").write_text('{"text": \n')
    (tmp_path / "empty").mkdir()
    for options, message in [
        ({"files": [str(texts)], "context": 400}, "fewer than a row of context 400"),
        ({"files": [str(texts / "0.txt")]}, "one document"),
        ({"files": [str(tmp_path / "none")]}, "no .*none; give .txt"),
        ({"files": [str(tmp_path / "empty")]}, "holds no .txt"),
        ({"files": []}, r"^files is \[\]; expected .txt, .md, .jsonl, .parquet files, or folders of them"),
        ({"files": [str(texts)], "held_out_files": []}, r"^held_out_files is \[\]; expected .txt"),
        ({"files": [str(texts)], "held_out_files": [str(tmp_path / "none")]}, "held_out_files: no .*none"),
        ({"files": [str(tmp_path / "bad.jsonl")], "text_field": "n"}, "row 1 has no 'n'"),
        ({"files": [str(tmp_path / "bad.jsonl")]}, "row 2 has no 'text' .found: txt."),
        ({"files": [str(tmp_path / "chat.jsonl")]}, "row 1 has no 'text'.*set chat_field: messages"),
        ({"files": [str(tmp_path / "number.jsonl")]}, "row 2: 'text' is 3; expected a text, or set text_field"),
        ({"files": [str(tmp_path / "worse.jsonl")]}, "line 1 is no JSON"),
        ({"dataset": "x"}, "needs datasets .*tinyfusion.text."),
        ({"dataset": "x", "rows": 1}, "^rows is 1; expected at least 2, or None"),
        ({"files": [str(texts)], "rows": 9}, "rows: of a dataset, which is streamed; files are read whole"),
        ({}, "one of the two"),
    ]:
        with pytest.raises(tiny.UserError, match=message):
            TextTokens(**base, **options).train()
    with pytest.raises(tiny.UserError, match="no tokenizer in"):
        TextTokens(tokenizer=str(texts), files=[str(texts)]).train()


def test_a_tokenizer_of_another_model_is_found_out(data: TextTokens, tmp_path: Path) -> None:
    backbone = CausalLM(model=str(folder(tmp_path / "small", "llama", vocab_size=20)), context=12)
    task = tiny.Task(backbone=backbone, loss=NextToken(), train=data.train(), held_out=data.held_out())
    with pytest.raises(tiny.UserError, match=r"\btokenizer.*below 20"):
        tiny.check_teacher(task, tiny.Trainer())


def test_perplexity_counts_every_token_once(data: TextTokens, model: Path) -> None:
    backbone = CausalLM(model=str(model), context=12)
    task = tiny.Task(backbone=backbone, loss=NextToken(), train=data.train(), held_out=data.held_out())
    rows = task.held_out
    tokens = rows.span(0, len(rows) * 12)["tokens"]
    network = backbone.build()
    for stride, window in ((None, None), (5, 12), (7, 24)):
        (found,) = Perplexity(stride=stride, window=window, batch_size=2)(task, {"teacher": network}, tiny.Trainer())
        size = window or 12
        firsts = [*range(0, len(tokens) - size, stride or size), len(tokens) - size]
        total, count, end = 0.0, 0, 0
        for first in firsts:
            with torch.no_grad():
                logits = network(input_ids=tokens[None, first : first + size], use_cache=False).logits[0, :-1]
            losses = F.cross_entropy(logits, tokens[first + 1 : first + size], reduction="none")
            new = [j for j in range(1, size) if first + j >= end]
            total, count, end = total + float(losses[[j - 1 for j in new]].sum()), count + len(new), first + size
        assert found.values["teacher"] == pytest.approx(math.exp(total / count), rel=1e-4)
        assert f"stride {stride or 12}" in found.note
    speeds = Generation(prompt=8, new_tokens=3, rounds=1)(task, {"teacher": network}, tiny.Trainer())
    assert [m.name for m in speeds] == ["prefill", "decode", "memory"]
    weights = sum(p.numel() for p in network.parameters()) * 4
    cache = 6 * 2 * 2 * 8 * 11 * 4  # layers, keys and values, heads, width, tokens, bytes
    assert speeds[2].values["teacher"] == pytest.approx((weights + cache) / 2**20)


RECIPE = """
backbone: {{class_path: CausalLM, init_args: {{model: {model}, context: 12}}}}
loss: {{class_path: NextToken, init_args: {{chunk: 30}}}}
data: {{class_path: TextTokens, init_args: {{tokenizer: {model}, files: [{texts}], context: 12, cache: {cache}}}}}
trainer: {{precision: fp32, batch_size: 4, seed: 0}}
search: {{pattern: [2, 3], steps: 3}}
recover: {{steps: 3, kd: MaskedKD}}
evaluate: [{{class_path: HeldOutLoss, init_args: {{draws: 1}}}}, Perplexity]
"""


@pytest.mark.slow
def test_a_run_from_text_to_a_folder_for_everybody(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("tinyfusion_core.pipeline.run.check_teacher", lambda *_: None)  # a random model knows nothing
    recipe, run = tmp_path / "small.yaml", tmp_path / "run"
    monkeypatch.chdir(model.parent)
    recipe.write_text(RECIPE.format(model=model.name, texts=texts, cache=tmp_path / "cache"))
    assert main(["validate", str(recipe)]) == 0
    assert "GFLOP a sample" in capsys.readouterr().out
    assert main(["run", str(recipe), "--run-dir", str(run)]) == 0
    assert "perplexity" in capsys.readouterr().out
    kept = list(tiny.Decision.load(run / "decision.json").kept)
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert student.config.num_hidden_layers == 4
    assert AutoTokenizer.from_pretrained(run / "student")("w7 w8").input_ids == [7, 8]
    assert main(["export", str(run), "--to", "transformers", "--out", str(tmp_path / "out")]) == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in again.state_dict().items())
    capsys.readouterr()
    assert main(["export", str(run), "--to", "indices"]) == 0
    assert json.loads(capsys.readouterr().out) == kept
    assert main(["export", str(run), "--to", "mergekit"]) == 0
    assert f"model: {model.absolute()}" in capsys.readouterr().out
    assert main(["export", str(run), "--to", "diffusers"]) == 2
    assert main(["export", str(run), "--to", "onnx"]) == 2
    assert main(["export", str(tmp_path / "model"), "--to", "indices"]) == 2
    assert main(["run", str(recipe), "--run-dir", str(run)]) == 0  # nothing left to do, the student is read back


def test_lm_eval_tasks_are_measured(data: TextTokens, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "toy.jsonl").write_text("\n".join(json.dumps({"q": words(i, 5), "a": "w9"}) for i in range(6)))
    (tmp_path / "toy.yaml").write_text(
        f"""task: toy
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path / "toy.jsonl"}}}
test_split: train
output_type: loglikelihood
doc_to_text: "{{{{q}}}}"
doc_to_target: " {{{{a}}}}"
metric_list: [{{metric: perplexity}}, {{metric: acc}}]
"""
    )
    backbone = CausalLM(model=str(model), context=12)
    task = tiny.Task(backbone=backbone, loss=NextToken(), train=data.train(), held_out=data.held_out())
    metric = LmEval(tasks=[str(tmp_path / "toy.yaml")], limit=4)
    metric.check(data)
    found = {m.name: m for m in metric(task, {"teacher": backbone.build()}, tiny.Trainer())}
    perplexity = found["toy perplexity"]
    assert perplexity.better == "lower" and found["toy acc"].better == "higher"
    network, tokenizer = backbone.build(), backbone.tokenizer()
    with torch.no_grad():
        questions = torch.tensor([tokenizer(words(i, 5)).input_ids for i in range(4)])
        logp = network(input_ids=questions, use_cache=False).logits[:, -1].log_softmax(-1)[:, 9]
    assert perplexity.values["teacher"] == pytest.approx(math.exp(-float(logp.mean())), rel=1e-3)


def test_parquet_rows_are_documents(model: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    table = pyarrow.table({"body": [words(i, 20) for i in range(5)]})
    pyarrow.parquet.write_table(table, tmp_path / "text.parquet")
    options = {"files": [str(tmp_path)], "cache": str(tmp_path / "cache"), "context": 7, "text_field": "body"}
    data = TextTokens(tokenizer=str(model), **options)
    assert len(data.train()) == 4 * 21 // 7 and len(data.held_out()) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # datasets and dill under a new numpy
def test_a_dataset_that_the_library_loads(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    datasets.disable_progress_bars()
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"body": words(i, 20)}) for i in range(5)))
    options = {"cache": str(tmp_path / "cache"), "context": 7, "text_field": "body"}
    data = TextTokens(tokenizer=str(model), dataset=str(folder), **options)
    files = TextTokens(tokenizer=str(model), files=[str(folder)], **options)
    assert len(data.train()) == len(files.train()) == 4 * 21 // 7
    assert torch.equal(*(source.train().__getitems__([0, 1])["tokens"] for source in (data, files)))
