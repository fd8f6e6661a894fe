"""Make transformers shallower: learn which blocks can go, remove them, recover the quality.

Use it as `import tinyfusion_core as tiny`. The public names are listed in `__init__.pyi`; each is imported on first
use, which keeps the command line fast.
"""

import importlib
import warnings
from typing import Any

import lazy_loader

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_MOVED = {
    "Fidelity": ("tinyfusion_images.fidelity", "Fidelity"),
    "Findings": ("tinyfusion_core", "ComparisonResults"),
    "write_samples": ("tinyfusion_images.samples", "write_samples"),
}
"""Public names that have moved or were renamed, as (module, name). They are kept here for one release."""


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        return _lazy(name)
    module, now = _MOVED[name]
    warnings.warn(f"{__name__}.{name} is now {module}.{now}", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module(module), now)
