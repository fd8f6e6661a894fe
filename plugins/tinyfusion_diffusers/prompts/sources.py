"""Reads prompts from files of text."""

from __future__ import annotations

from pathlib import Path

from tinyfusion_core.errors import UserError
from tinyfusion_core.parsing.records import parse_json, read_text


def read_prompts(path: Path, field: str) -> list[str]:
    """Read prompts, one from each line.

    Args:
        path: a text file, whose lines are the prompts, or a .jsonl file of mappings.
        field: of a .jsonl file, the entry that is the prompt.

    Raises:
        UserError: the file is missing or holds no prompts; names the line.
    """
    lines = read_text(path).removesuffix("\n").split("\n")  # other line breaks of Unicode may be in a prompt
    prompts = [line.removesuffix("\r") for line in lines]
    if path.suffix == ".jsonl":
        prompts = [_prompt(line, field, f"{path}: line {number}") for number, line in enumerate(prompts, 1)]
    if not any(prompts):
        raise UserError(f"{path}: holds no prompts; expected one on each line")
    return prompts


def _prompt(line: str, field: str, where: str) -> str:
    try:
        value = parse_json(line)
    except ValueError as e:
        raise UserError(f"{where}: not readable as JSON ({e}); expected a mapping on each line") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        known = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: has no text '{field}' (there is: {known:.200}); name the entry with --field")
    prompt: str = value[field]
    return prompt
