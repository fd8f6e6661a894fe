"""Optional packages."""

from __future__ import annotations

import importlib
from typing import Any

from tinyfusion_core.errors import UserError


def need(module: str, package: str, key: str) -> Any:
    """Import a module of an optional package.

    Raises:
        UserError: it is not installed; names what needs it and the package to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise UserError(f"{key} needs the package '{package}' ({e}): pip install '{package}'") from None
