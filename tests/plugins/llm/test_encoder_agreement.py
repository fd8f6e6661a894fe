"""What a loss, data and folders of sentence encoders say of embeddings has to be the same; decoders make none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llm_toys
import tinyfusion_core as tiny
from encoder_toys import folder, recipe_of, sentence_folder, texts, tokenizer
from tinyfusion_core.errors import about_a_recipe
from tinyfusion_core.pipeline.planning.plan import make_plan
from tinyfusion_llm import EmbeddedText, MaskedLM, SentenceEmbedding, TextEncoder

pytestmark = pytest.mark.filterwarnings("ignore:.*SwigPy.*")


def pools_by(path: Path, **modes: bool) -> Path:
    (path / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{k}": on for k, on in modes.items()}))
    return path


@pytest.mark.parametrize(
    ("data", "loss", "message"),
    [
        ({}, {}, ""),
        ({"pooling": "cls"}, {}, r"loss.pooling is 'mean' and data.pooling 'cls'; the two must agree"),
        ({}, {"pooling": "cls"}, r"loss.pooling is 'cls' and data.pooling 'mean'; the two must agree"),
        ({"pooling": "cls"}, {"pooling": "cls"}, r"loss.pooling is 'cls', and .*teacher/1_Pooling/config.json says"),
        ({}, {"normalised": False}, r"loss.normalised is False, and the model in .*teacher normalises; set it to true"),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_loss_data_and_teacher_agree(
    data: dict[str, str], loss: dict[str, object], message: str, mixed: bool, tmp_path: Path
) -> None:
    teacher = sentence_folder(tmp_path / "teacher")
    source: tiny.DataSource = EmbeddedText(tokenizer="words", teacher=str(teacher), files=["none"], **data)  # type: ignore[arg-type]
    if mixed:
        source = tiny.Mixture(parts={"only": source})
    objective = SentenceEmbedding(**loss)  # type: ignore[arg-type]
    if not message:
        source.check_fits(TextEncoder.tiny(), objective)
        return
    with about_a_recipe(), pytest.raises(tiny.UserError, match=message):
        source.check_fits(TextEncoder.tiny(), objective)


def test_the_network_agrees_too_and_all_is_said_in_the_plan(tmp_path: Path) -> None:
    model = pools_by(sentence_folder(tmp_path / "full"), cls_token=True, mean_tokens=False)
    (problem,) = make_plan(tiny.load_recipe(recipe_of(model, tmp_path, head=False))).problems
    assert "loss.pooling is 'mean', and" in problem and "full/1_Pooling/config.json says 'cls'" in problem
    assert not (tmp_path / "cache").exists()


def test_a_decoder_is_no_encoder(tmp_path: Path) -> None:
    decoder = llm_toys.folder(tmp_path / "decoder", "llama")
    with pytest.raises(tiny.UserError, match="no token of LlamaModel sees a later one, as in a decoder; expected an"):
        TextEncoder(model=str(decoder), context=12).build()
    experts = llm_toys.folder(tmp_path / "experts", "mixtral")  # whose rounding depends on all tokens
    with pytest.raises(tiny.UserError, match="no token of MixtralModel sees a later one"):
        TextEncoder(model=str(experts), context=12).build()
    masked = folder(tmp_path / "masked", "bert", is_decoder=True)
    with pytest.raises(tiny.UserError, match="no token of BertForMaskedLM sees a later one"):
        MaskedLM(model=str(masked), context=12).build()
    words, file = tokenizer(tmp_path / "words"), str(texts(tmp_path / "texts.jsonl"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (decoder / name).write_bytes((words / name).read_bytes())
    data = EmbeddedText(
        tokenizer=str(words), teacher=str(decoder), files=[file], context=8, cache=str(tmp_path / "cache")
    )
    with pytest.raises(tiny.UserError, match=r"^teacher: no token of LlamaModel sees a later one"):
        data.train().__getitems__([0])
