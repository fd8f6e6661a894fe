"""Packages that only some users need."""

from __future__ import annotations

import importlib
from typing import Any

from tinyfusion_core.errors import UserError


def need(module: str, package: str, key: str) -> Any:
    """Import a module, or raise UserError that names what needs it and the package to install."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{key} needs the package '{package}' ({e}): pip install '{package}'") from None
