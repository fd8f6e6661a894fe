"""Amounts of memory, as people write them."""

from __future__ import annotations

import re

from ...errors import UserError


def parse_bytes(text: str) -> float:
    """Parse `24GB` or `40 GiB`.

    Raises:
        UserError: it is no amount, or has no unit.
    """
    units = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}
    found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*([A-Za-z]*)\s*", text)
    if found is not None and not found[2]:
        raise UserError(f"--memory: '{text}' lacks a unit; {found[1]}GB? (known: {', '.join(units)})")
    if found is None or found[2] not in units or float(found[1]) <= 0:
        raise UserError(f"--memory: '{text}' is no amount of memory; expected one as 24GB or 40GiB")
    return float(found[1]) * units[found[2]]


def gigabytes(size: float) -> str:
    """Format bytes for people: `1.94 GB`, `23.1 MB`."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"
