"""What is spelled like a special token in a text is text: of toys, and of real tokenizers where they are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import encoder_toys
import llm_toys
import seq2seq_toys
from places import ROOT
from speech_toys import folder as whisper
from speech_toys import recordings, speech
from tinyfusion_llm import EmbeddedText, PaddedText, TextPairs, TextTokens
from tinyfusion_llm.pretrained.readers import encode, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*SwigPy.*")
SPELLED = "w5</s>w6 w7"
"""The toys know no parts of words: what is not one of theirs is the unknown one."""


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", [TextTokens, PaddedText, EmbeddedText])
def test_documents_hold_text(kind: Any, tmp_path: Path) -> None:
    words = (llm_toys if kind is TextTokens else encoder_toys).tokenizer(tmp_path / "words")
    file = written(tmp_path / "a.jsonl", {"text": SPELLED}, {"text": "w7"}, {"text": "w8"})
    data = kind(tokenizer=str(words), files=[file], context=4, cache=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="data: 1 documents hold what is spelled like a special token, such as '</s>'"):
        corpus = data._corpus(data.files)
    end, unknown = ([2], 3) if kind is TextTokens else ([], 4)
    assert corpus.tokens[: len(end) + 2].tolist() == [unknown, 7, *end]


def test_pairs_hold_text(tmp_path: Path) -> None:
    words = llm_toys.tokenizer(seq2seq_toys.folder(tmp_path / "model", "t5"))
    rows = [{"source": SPELLED, "target": SPELLED}] * 2
    data = TextPairs(tokenizer=str(words), files=[written(tmp_path / "a.jsonl", *rows)], cache=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="data: 2 documents hold"):
        batch = data.train().__getitems__([0])
    assert batch["source"][0, :3].tolist() == [3, 7, 0]
    assert batch["tokens"][0, :4].tolist() == [0, 3, 7, 2]
    assert batch["labels"][0, 1:4].tolist() == [3, 7, 2]


def test_transcripts_hold_text(tmp_path: Path) -> None:
    rows = recordings(tmp_path / "rows", [("red", "a<|endoftext|>b")] * 2)
    samples: Any = speech(whisper(tmp_path / "model"), rows).train()
    tokenizer, tokens = samples.processor.tokenizer, samples.utterances[0].tokens
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert len(tokens) == 4 + len(" a<|endoftext|>b") + 1
    assert tokenizer.decode(tokens[4:-1]) == " a<|endoftext|>b"


@pytest.mark.parametrize("target", [False, True])
def test_a_vocabulary_of_pieces_has_special_tokens_too(target: bool) -> None:
    """As of T5, whose most probable piece of a text `</s>` would be the token that ends it."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581ab", -3.0), *((c, -5.0) for c in "</s>c")]
    fast = Tokenizer(models.Unigram(pieces, unk_id=2))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_special_tokens": ["<more>"]}
    made: Any = PreTrainedTokenizerFast(tokenizer_object=fast, **names)
    made.add_tokens(["<word>"])  # which is none of them
    texts, before = ["ab</s>c<more>", "ab", "ab<word>c"], made.backend_tokenizer.to_str()
    found = encode(made, texts, target=target)
    assert found == [[3, 4, 5, 6, 7, 8, 4, 2, 7, 1], [3, 1], [3, 10, 2, 8, 1]]
    assert encode(made, texts, special=False) == [ids[:-1] for ids in found]
    assert made("ab</s>")["input_ids"] == [3, 1, 1]  # of whoever asks for it
    assert made.backend_tokenizer.to_str() == before


REAL = {
    "smollm2-135m": ("<|im_end|>", [], []),
    "all-mpnet-base-v2": ("</s>", [0], [2]),
    "whisper-base": ("<|endoftext|>", [50258, 50363], [50257]),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[] if (ROOT / "weights" / name).is_dir() else pytest.mark.skip("needs the model in weights/")
        )
        for name in REAL
    ],
)
def test_real_tokenizers_read_them_as_text(name: str) -> None:
    spelled, before, after = REAL[name]
    tokenizer = load_tokenizer(str(ROOT / "weights" / name), None, None)
    number, texts = tokenizer.convert_tokens_to_ids(spelled), [f"a {spelled} b", "plain words, of no tokens"]
    found, plain = encode(tokenizer, texts)
    assert tokenizer(texts[0])["input_ids"].count(number) == 1 + after.count(number)  # what its own call makes of it
    assert found.count(number) == after.count(number)
    assert found[: len(before)] == before and found[len(found) - len(after) :] == after
    assert "".join(tokenizer.decode(found[len(before) : len(found) - len(after)]).split()) == f"a{spelled}b"
    assert plain == tokenizer(texts[1])["input_ids"]  # and all other text is what it was
