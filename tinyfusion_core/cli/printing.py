"""Prints results: tables for people, tab-separated lines for what reads a pipe, JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from ..comparison.results import ComparisonResults
from ..comparison.tables import tables
from ..runtime.progress import plain_console


def print_table(table: Table) -> None:
    """Print a table of texts. Nothing in it is cut off.

    A terminal gets it wrapped at spaces; if it is too narrow for the longest words, one line for each cell. A pipe or a
    file gets the title, then lines whose cells are separated by tabs.
    """
    console = plain_console()
    names = [str(column.header) for column in table.columns]
    rows = [[str(cell) for cell in row] for row in zip(*(column.cells for column in table.columns), strict=True)]
    if not console.is_terminal:
        lines = [names, *rows] if table.show_header else rows
        texts = ["\t".join(" ".join(cell.split()) for cell in line) for line in lines]
        texts = [str(table.title)] * bool(table.title) + texts + [str(table.caption)] * bool(table.caption)
        print(*texts, sep="\n")
    elif _needed_width(table, names, rows) <= console.width:
        for column, width in zip(table.columns, _longest_words(names, rows), strict=True):
            column.min_width = width
        console.print(table)
    else:
        _print_upright(console, table, names, rows)


def print_tables(results: ComparisonResults) -> None:
    """Print the tables of a comparison."""
    for text in tables(results):
        table = Table(title=text.title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
        for i, name in enumerate(text.columns):
            table.add_column(name, justify="left" if i == 0 or name == "kept blocks" else "right")
        for row in text.rows:
            table.add_row(*(cell.replace("± ", "±") for cell in row))
        print_table(table)
        print()


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2))


def _longest_words(names: list[str], rows: list[list[str]]) -> list[int]:
    """The width of the longest word of every column."""
    columns = zip(names, *rows, strict=True)
    return [max((cell_len(word) for cell in column for word in cell.split()), default=0) for column in columns]


def _needed_width(table: Table, names: list[str], rows: list[list[str]]) -> int:
    padding = (table.padding[1] + table.padding[3] + (table.box is not None)) * len(names)
    return sum(_longest_words(names, rows)) + padding + (table.box is not None)


def _print_upright(console: Console, table: Table, names: list[str], rows: list[list[str]]) -> None:
    """Print one line for each cell, those of a row under its first one."""
    if table.title:
        console.print(table.title, style="bold")
    for first, *rest in rows:
        console.print(first or names[0], style="bold")
        for name, cell in zip(names[1:], rest, strict=True):
            if cell:
                text = " ".join(cell.split())
                console.print(Padding(f"{name}: {text}" if name else text, (0, 0, 0, 2)))
    if table.caption:
        console.print(table.caption)
