"""Conversations: written by the tokenizer's template, and learned from where the assistant speaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import llm_toys
import tinyfusion_core as tiny
from tinyfusion_llm import TextTokens
from tinyfusion_llm.hidden import IGNORED

PLAIN = (
    "{% for m in messages %}{{ '<s> ' + ('w10 ' if m.role == 'user' else 'w11 ') + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> w11 ' }}{% endif %}"
)
"""Every turn begins with <s> and who speaks, and ends with </s>."""
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<s> w11 ' }}{% generation %}{{ m.content + ' </s>' }}"
    "{% endgeneration %}{{ ' ' }}{% else %}{{ '<s> w10 ' + m.content + ' </s> ' }}{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}{{ '<s> w11 ' if m.role == 'assistant' else '<s> w10 ' }}"
    "{{ 'w12 ' if m.role == 'assistant' and loop.last else '' }}{{ m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> w11 ' }}{% endif %}"
)
"""The last turn has a thought, which is left out once others follow."""
TALK = [
    {"role": "user", "content": "w4 w5"},
    {"role": "assistant", "content": "w6 w7 w8"},
    {"role": "user", "content": "w5"},
    {"role": "assistant", "content": "w9"},
]
TOKENS = [1, 10, 4, 5, 2, 1, 11, 6, 7, 8, 2, 1, 10, 5, 2, 1, 11, 9, 2]
SAID = [False] * 7 + [True] * 4 + [False] * 6 + [True] * 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llm_toys.tokenizer(llm_toys.folder(tmp_path / "model", "llama"))


def data(model: Path, rows: list[Any], template: str | None = PLAIN, **options: Any) -> TextTokens:
    path = model.parent / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    if template is not None:
        (model / "chat_template.jinja").write_text(template)
    settings = {"files": [str(path)], "held_out_files": [str(path)], "context": 24, "pack": False, **options}
    return TextTokens(tokenizer=str(model), chat_field="messages", cache=str(model.parent / "cache"), **settings)


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_the_assistant_says_counts(template: str, model: Path) -> None:
    row = data(model, [{"messages": TALK, "id": 3}], template).held_out().__getitems__([0])
    assert row["tokens"][0, : len(TOKENS)].tolist() == TOKENS
    counted = (row["labels"][0, : len(TOKENS)] != IGNORED).tolist()
    assert counted == SAID
    assert (row["labels"][0, len(TOKENS) :] == IGNORED).all()


def test_chats_are_packed_one_after_the_other(model: Path) -> None:
    other = [{"role": "system", "content": "w3"}, *TALK[:2]]
    rows = data(model, [{"messages": TALK}, {"messages": other}], pack=True, context=12).held_out()
    both = rows.__getitems__([0, 1])["tokens"].flatten().tolist()
    assert both == [*TOKENS, 1, 11, 3, 2, 1][:24]


def test_a_model_learns_from_a_chat(model: Path, tmp_path: Path) -> None:
    recipe = {
        "backbone": {"class_path": "CausalLM", "init_args": {"model": str(model), "context": 24, "dtype": "float32"}},
        "loss": "NextToken",
        "search": {"class_path": "Keep", "init_args": {"blocks": [0, 1]}},
        "trainer": {"batch_size": 2, "precision": "fp32"},
        "recover": {"steps": 2},
    }
    made = data(model, [{"messages": TALK}] * 8)
    given = {"tokenizer": str(model), "files": made.files, "held_out_files": made.files, "chat_field": "messages"}
    given |= {"context": 24, "pack": False, "cache": str(tmp_path / "cache")}
    path = tmp_path / "chat.yaml"
    path.write_text(json.dumps({**recipe, "data": {"class_path": "TextTokens", "init_args": given}}))
    task = tiny.load_recipe(path)
    student = tiny.Recover(steps=2)(
        tiny.Task(backbone=task.backbone, loss=task.loss, train=made.train(), held_out=made.held_out()),
        task.backbone.build(),
        None,
        tiny.Trainer(batch_size=2, precision="fp32"),
    )
    assert next(student.parameters()).isfinite().all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w4"}, "row 1: 'messages' is no conversation: expected a list of turns"),
        ({"messages": "w4"}, "is no conversation"),
        ({"messages": [{"content": "w4"}]}, "each with a 'role'"),
        ({"messages": []}, "is no conversation"),
        ({"messages": TALK[:1]}, "no turn has the role 'assistant'"),
        ({"messages": [{"role": "assistant", "content": "\ud83d"}]}, "half of a character"),
        ({"messages": [*TALK, {"role": "assistant"}]}, "row 1: the tokenizer's chat template refuses it"),
    ],
)
def test_rows_that_are_no_conversation(row: Any, message: str, model: Path) -> None:
    with pytest.raises(tiny.UserError, match=f"chat.jsonl: {message}|{message}"):
        data(model, [row]).train()


def test_what_cannot_be_told_apart(model: Path, tmp_path: Path) -> None:
    with pytest.raises(tiny.UserError, match="writes turn 2 otherwise when others follow"):
        data(model, [{"messages": TALK}], THINKING).train()
    assert len(data(model, [{"messages": TALK[:2]}], THINKING).train()) == 1  # one turn has none that follow
    (model / "chat_template.jinja").unlink()
    with pytest.raises(tiny.UserError, match="has no chat template"):
        data(model, [{"messages": TALK}], None).train()
    with pytest.raises(tiny.UserError, match="give it or chat_field, not both"):
        data(model, [{"messages": TALK}], prompt_field="q")
    (tmp_path / "plain.txt").write_text("w4 w5")
    with pytest.raises(tiny.UserError, match=r"plain.txt: text is no conversation"):
        data(model, [{"messages": TALK}], files=[str(tmp_path / "plain.txt")]).train()
