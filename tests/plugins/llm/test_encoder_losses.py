"""Losses, data and metrics of encoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

import tinyfusion_core as tiny
from encoder_toys import ATTENTION, BATCH, MASK, TOKENS, sentence_folder, texts, tokenizer
from llm_toys import VOCABULARY
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_llm import (
    EmbeddedText,
    MaskedAccuracy,
    MaskedLM,
    MaskedToken,
    PaddedText,
    SentenceEmbedding,
    SimilarityRank,
    TextEncoder,
)
from tinyfusion_llm.hidden import IGNORED

pytestmark = [pytest.mark.numerics, pytest.mark.filterwarnings("ignore")]  # of transformers


@pytest.fixture
def model() -> Any:
    return MaskedLM.tiny().build()


def test_the_loss_is_the_cross_entropy_of_masked_tokens_in_any_number_of_pieces(model: Any) -> None:
    for chunk in (1024, 3):
        loss = MaskedToken(fraction=0.4, chunk=chunk)
        inputs = loss.prepare(BATCH, Rng(0, "test"))
        logits = model(input_ids=inputs["tokens"], attention_mask=ATTENTION).logits
        for row, number in enumerate((5, 4, 2)):  # of 12, 9 and 5 tokens, rounded
            places = inputs["places"][row, :number]
            assert len(places.unique()) == number
            assert (places < ATTENTION[row].sum()).all()
            assert torch.equal(inputs["targets"][row, :number], TOKENS[row, places])
            assert (inputs["targets"][row, number:] == IGNORED).all()
            expected = F.cross_entropy(logits[row, places], TOKENS[row, places])
            assert torch.allclose(loss.losses(model, inputs)[row], expected, atol=1e-6)
            unchosen = torch.ones(12, dtype=torch.bool).index_fill(0, places, False)
            assert torch.equal(inputs["tokens"][row, unchosen], BATCH["tokens"][row, unchosen])


def test_of_the_chosen_tokens_80_percent_are_masked_and_10_random() -> None:
    tokens = torch.full((40, 500), 50)
    batch = {"tokens": tokens, "attention": torch.ones_like(tokens), "labels": tokens}
    batch |= {"mask_token": torch.full((40,), MASK), "last_token": torch.full((40,), VOCABULARY - 1)}
    inputs = MaskedToken().prepare(batch, Rng(0, "test"))
    assert inputs["targets"].shape == (40, 75)
    chosen = inputs["tokens"].gather(1, inputs["places"])
    masked, same = (chosen == MASK).float().mean(), (chosen == 50).float().mean()
    assert abs(masked - 0.8) < 0.03  # 3000 tokens
    assert abs(same - 0.1) < 0.03
    others = chosen[(chosen != MASK) & (chosen != 50)]
    assert others.min() < 5
    assert others.max() > VOCABULARY - 5
    assert (inputs["tokens"] != 50).sum() == (chosen != 50).sum()


def test_rows_are_masked_by_streams_of_their_own() -> None:
    whole = MaskedToken().prepare(BATCH, Rng(0, "search", 2))
    last = MaskedToken().prepare({name: t[2:] for name, t in BATCH.items()}, Rng(0, "search", 2, first=2))
    assert all(torch.equal(whole[name][2:], last[name]) for name in whole)
    again = MaskedToken().prepare(BATCH, Rng(0, "search", 3))
    assert not torch.equal(whole["places"], again["places"])
    clean = MaskedToken().prepare_clean(BATCH, Rng(0, "search", 2))
    assert torch.equal(clean["tokens"], BATCH["tokens"])


def test_a_sample_without_tokens_that_count_has_no_loss(model: Any) -> None:
    batch = {**BATCH, "labels": torch.full_like(TOKENS, IGNORED)}
    loss = MaskedToken()
    inputs = loss.prepare(batch, Rng(0, "test"))
    assert torch.equal(inputs["tokens"], BATCH["tokens"])
    assert loss.losses(model, inputs).tolist() == [0, 0, 0]


def test_the_distance_is_the_divergence_at_the_masked_tokens(model: Any) -> None:
    student, loss = MaskedLM.tiny().build(), MaskedToken(temperature=2.0)
    with torch.no_grad():
        student.bert.encoder.layer[1].output.dense.weight.mul_(2)
    inputs = loss.prepare(BATCH, Rng(0, "test"))
    ours, theirs = (loss.predict(network, inputs) for network in (student, model))
    log_p, log_q = (
        (network(input_ids=inputs["tokens"], attention_mask=ATTENTION).logits / 2).log_softmax(-1)
        for network in (model, student)
    )
    kl = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).gather(1, inputs["places"])
    counted = inputs["targets"] != IGNORED
    expected = (kl * counted).sum(1) / counted.sum(1)
    assert torch.allclose(loss.distance(ours, theirs, inputs), expected, atol=1e-5)
    some = replace(loss, top_k=5)
    kept = some.kept(some.keep(theirs, inputs), ours)
    assert torch.allclose(some.distance(ours, kept, inputs), some.distance(ours, theirs, inputs))
    assert (some.distance(ours, theirs, inputs) <= expected + 1e-6).all()


def test_an_untrained_network_would_find_all_tokens_equally_likely(model: Any) -> None:
    loss = MaskedToken()
    inputs = loss.prepare(BATCH, Rng(0, "test"))
    trivial = loss.loss(loss.trivial(loss.predict(model, inputs), inputs), inputs)
    assert torch.allclose(trivial, torch.tensor(float(VOCABULARY)).log().expand(3))


def test_the_head_is_run_for_the_masked_tokens_alone(model: Any) -> None:
    sizes: list[int] = []
    model.cls.register_forward_hook(lambda _m, _args, out: sizes.append(out.shape[0] * out.shape[1]))
    loss = MaskedToken()
    inputs = loss.prepare(BATCH, Rng(0, "test"))
    loss.losses(model, inputs)
    assert sizes == [3, 6]  # one token of each text; then 2 of 12 of each


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalised", [True, False])
def test_embeddings_are_pooled_from_a_texts_own_tokens(pooling: Any, normalised: bool) -> None:
    network, loss = TextEncoder.tiny().build(), SentenceEmbedding(pooling=pooling, normalised=normalised)
    inputs = loss.prepare(BATCH, Rng(0, "test"))
    found, target = loss.predict(network, inputs), BATCH["embedding"]
    expected = []
    for row, length in enumerate((12, 9, 5)):
        states = network(input_ids=TOKENS[row : row + 1, :length]).last_hidden_state[0]
        expected.append(states.mean(0) if pooling == "mean" else states[0])
    whole = torch.stack(expected)
    if normalised:
        whole, target = whole / whole.norm(dim=1, keepdim=True), target / target.norm(dim=1, keepdim=True)
        cos = F.cosine_similarity(found, BATCH["embedding"])
        assert torch.allclose(loss.loss(found, inputs), 2 - 2 * cos, atol=1e-5)
    assert torch.allclose(found, whole, atol=1e-5)
    assert torch.allclose(loss.loss(found, inputs), (whole - target).square().sum(1), rtol=1e-4)
    assert torch.equal(loss.distance(found, found, inputs), torch.zeros(3))


def padded(tmp_path: Path, **more: Any) -> PaddedText:
    words = tokenizer(tmp_path / "words")
    files = [str(texts(tmp_path / "texts.jsonl"))]
    return PaddedText(tokenizer=str(words), files=files, context=10, cache=str(tmp_path / "cache"), **more)


def test_a_long_document_is_several_samples_each_with_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in range(10, 30)))
    (tmp_path / "b.txt").write_text("w5 w6")
    data = padded(tmp_path)
    data = replace(data, files=[str(tmp_path / "a.txt")], held_out_files=[str(tmp_path / "b.txt")])
    batch = data.held_out().__getitems__([0])
    assert batch["tokens"].tolist() == [[1, 5, 6, 2, 0, 0, 0, 0, 0, 0]]
    assert batch["attention"].tolist() == [[1] * 4 + [0] * 6]
    assert batch["labels"].tolist() == [[IGNORED, 5, 6] + [IGNORED] * 7]
    assert (batch["mask_token"].tolist(), batch["last_token"].tolist()) == ([MASK], [VOCABULARY - 1])
    long = data.train()
    assert len(long) == 3
    found = long.__getitems__([0, 1, 2])
    assert found["tokens"].tolist() == [
        [1, *range(10, 18), 2],
        [1, *range(18, 26), 2],
        [1, *range(26, 30), 2, 0, 0, 0, 0],
    ]


def test_targets_are_a_teachers_embeddings_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = sentence_folder(tmp_path / "teacher")
    files = [str(texts(tmp_path / "texts.jsonl"))]
    data = EmbeddedText(tokenizer=str(teacher), files=files, context=10, cache=str(tmp_path / "cache"), max_held_out=3)
    rows = data.train()
    assert (len(rows), len(data.held_out())) == (11, 1)
    batch = rows.__getitems__([4, 0])
    network = TextEncoder(model=str(teacher), context=10).build()
    for row in range(2):
        length = int(batch["attention"][row].sum())
        states = network(input_ids=batch["tokens"][row : row + 1, :length]).last_hidden_state
        assert torch.allclose(batch["embedding"][row], states[0].mean(0), atol=1e-5)
    loss = SentenceEmbedding()
    assert loss.losses(network, loss.prepare(batch, Rng(0, "test"))).max() < 1e-9
    monkeypatch.setattr(TextEncoder, "build", None)  # nothing is made again
    again = replace(data).train().__getitems__([4, 0])
    assert torch.equal(again["embedding"], batch["embedding"])


def test_a_teacher_reads_the_texts_with_its_own_tokenizer(tmp_path: Path) -> None:
    teacher = sentence_folder(tmp_path / "teacher")
    words = tokenizer(tmp_path / "words", eos_token="</s>")
    (tmp_path / "texts.txt").write_text("w7 w8 w9")
    (tmp_path / "more.txt").write_text("w10")
    data = EmbeddedText(
        tokenizer=str(words), teacher=str(teacher), files=[str(tmp_path / "texts.txt")],
        held_out_files=[str(tmp_path / "more.txt")], context=8, cache=str(tmp_path / "cache"),
    )  # fmt: skip
    network = TextEncoder(model=str(teacher), context=8).build()
    for rows, ids in ((data.train(), [1, 7, 8, 9, 2]), (data.held_out(), [1, 10, 2])):
        expected = network(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        assert torch.allclose(rows.__getitems__([0])["embedding"][0], expected, atol=1e-5)


def measured(metric: tiny.Metric, task: tiny.Task, models: dict[str, Any]) -> dict[str, float | None]:
    (found,) = metric(task, models, tiny.Trainer(precision="fp32", batch_size=2))
    return found.values


def test_accuracy_counts_masked_tokens_that_are_the_most_probable(tmp_path: Path, model: Any) -> None:
    rows = padded(tmp_path).train()
    network = replace(MaskedLM.tiny(), context=10)
    task = tiny.Task(backbone=network, loss=MaskedToken(), train=rows, held_out=rows)
    found = measured(MaskedAccuracy(batch_size=4), task, {"teacher": model})
    hits = total = 0
    for i in range(len(rows)):
        inputs = MaskedToken().prepare(rows.__getitems__([i]), Rng(0, "held out", 0, i, strata=len(rows)))
        logits = model(input_ids=inputs["tokens"], attention_mask=inputs["attention"]).logits[0]
        right = logits.argmax(-1)[inputs["places"][0]] == inputs["targets"][0]
        hits, total = hits + int(right.sum()), total + int((inputs["targets"] != IGNORED).sum())
    assert found == {"teacher": hits / total}


def test_similarities_are_ranked_as_the_targets_rank_them(tmp_path: Path) -> None:
    network, rows = TextEncoder.tiny().build(), {k: v.repeat(3, 1) for k, v in BATCH.items() if v.ndim > 1}
    rows["tokens"] = torch.randint(4, VOCABULARY, (9, 12), generator=torch.Generator().manual_seed(2))
    rows["embedding"] = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    data = tiny.Tensors(rows)
    task = tiny.Task(backbone=TextEncoder.tiny(), loss=SentenceEmbedding(), train=data, held_out=data)
    found = measured(SimilarityRank(samples=7, batch_size=2), task, {"teacher": network})

    def pairs(embeddings: Tensor) -> list[float]:
        return [float(F.cosine_similarity(embeddings[i], embeddings[j], dim=0)) for i in range(7) for j in range(i)]

    ours = SentenceEmbedding().predict(network, task.loss.prepare(rows, Rng(0, "test")))
    expected = spearmanr(pairs(ours.double()), pairs(rows["embedding"].double())).statistic
    assert found["teacher"] == pytest.approx(expected, abs=0.02)  # of 21 pairs some are nearly as similar
    with torch.no_grad():
        rows["embedding"].copy_(ours)
    assert measured(SimilarityRank(samples=7), task, {"teacher": network})["teacher"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: MaskedToken(fraction=0), r"fraction is 0; expected a share above 0"),
        (lambda path: SentenceEmbedding(pooling="max"), r"pooling \(of SentenceEmbedding\) is 'max'"),
        (lambda path: padded(path, held_out_fraction=1.0), r"held_out_fraction is 1.0"),
        (lambda path: replace(padded(path), context=2).train(), r"context is 2; beside the special tokens"),
        (
            lambda path: replace(padded(path), tokenizer=str(tokenizer(path / "b", mask_token=None))).train(),
            r"tokenizer: '.*' has no mask token",
        ),
        (
            lambda path: EmbeddedText(
                tokenizer=str(sentence_folder(path / "m")), files=[str(texts(path / "t.jsonl"))], pooling="cls",
                cache=str(path / "cache"),
            ).train(),
            r"pooling is 'cls', and .*1_Pooling/config.json says 'mean'",
        ),
        (
            lambda path: EmbeddedText(
                tokenizer=str(tokenizer(path / "w")), teacher=str(path / "none"), files=[str(texts(path / "t.jsonl"))],
                cache=str(path / "cache"),
            ).train(),
            r"teacher: no folder '.*none'",
        ),
        (lambda path: SimilarityRank(samples=2), r"SimilarityRank.samples is 2; expected at least 3"),
        (lambda path: SimilarityRank().check(padded(path)), r"SimilarityRank needs the data EmbeddedText"),
    ],
)  # fmt: skip
def test_what_does_not_go_is_said(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match=message):
        make(tmp_path)
