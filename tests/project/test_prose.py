"""What is written to be read is plain: short sentences, one word for one thing, and paths that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from places import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LONGEST = 35
"""Words of a sentence at most."""
WORDS = {
    "recover": r"heal(?:s|ed|ing)?|re-?train\w*",
    "fine-tune": r"finetun\w*",
    "teacher": r"(?:original|unpruned|dense|full) (?:model|network)|teacher (?:model|network)",
    "student": r"student (?:model|network)",
    "data set": r"datasets?",
}
"""The word for a thing, and others that people use for it."""


def sentences(markdown: str) -> Iterator[str]:
    """The sentences of a page, without its code and its tables; code within a line is one word."""
    inside = 0
    for token in MarkdownIt().enable("table").parse(markdown):
        inside += {"table_open": 1, "table_close": -1}.get(token.type, 0)
        if token.type == "inline" and not inside:
            written = [part for part in token.children or [] if part.type != "image"]
            code = {"code_inline": "`code`", "softbreak": " ", "hardbreak": " "}
            text = "".join(code.get(part.type, part.content) for part in written)
            yield from re.split(r"(?<=[.!?])[\")]*\s+", text)


def length(sentence: str) -> int:
    return len([word for word in sentence.split() if re.search(r"\w", word)])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short_and_words_are_ours(page: Path) -> None:
    said = list(sentences(page.read_text()))
    assert [sentence for sentence in said if length(sentence) > LONGEST] == []
    for word, others in WORDS.items():
        found = [sentence for sentence in said if re.search(rf"\b(?:{others})\b", sentence, re.IGNORECASE)]
        assert found == [], f"say {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    tops = "tests|benchmarks|recipes|docs|plugins|tinyfusion_core"
    for path in re.findall(rf"`((?:{tops})/[a-z_./-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_what_counts_as_a_sentence() -> None:
    page = """# A heading

    One that `spans two` lines
    (and ends). Another?

    - an item
    - a second one, [linked](there.md)

    ```python
    code. is. none
    ```

    | a table | is. none |
    |---|---|
    """.replace("\n    ", "\n")
    found = ["A heading", "One that `code` lines (and ends).", "Another?", "an item", "a second one, linked"]
    assert list(sentences(page)) == found
    assert [length(sentence) for sentence in found] == [2, 6, 1, 2, 4]
