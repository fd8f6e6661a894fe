"""Creates a new plugin: a small package that installs and passes its own tests."""

from __future__ import annotations

import keyword
import re
from importlib.util import find_spec
from pathlib import Path

from ..errors import UserError
from ..runtime.files import write_text

TEMPLATE = Path(__file__).parent / "template"
FILES = {
    "pyproject.toml": "pyproject.toml",
    "my_backbone.py": "my_backbone.py",
    "digits.yaml": "digits.yaml",
    "README.md": "README.md",
    "test_my_backbone.py": "tests/test_my_backbone.py",
    "ci.yml": ".github/workflows/test.yml",
}
"""Files of the template, and their paths in the package."""


def new_plugin(name: str, parent: Path | str = ".") -> Path:
    """Write the package.

    Args:
        name: name of the package and its entry point, like `my-backbone`; the module is called `my_backbone`.
        parent: the folder in which its own folder is created.

    Returns:
        The new folder.

    Raises:
        UserError: the name is not valid, or the folder exists.
    """
    module = name.replace("-", "_")
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name) or keyword.iskeyword(module):
        raise UserError(f"'{name}' cannot be the name of a package; use small letters, digits and -, like my-backbone")
    if find_spec(module) is not None:
        raise UserError(f"a module '{module}' is installed already; choose another name than '{name}'")
    folder = Path(parent) / name
    if folder.exists():
        raise UserError(f"{folder} exists; choose another name, or another place with --into")
    words = {
        "my_backbone": module,
        "my-backbone": name,
        "MyBackbone": "".join(part.capitalize() for part in module.split("_")),
    }
    for source, target in FILES.items():
        text = (TEMPLATE / source).read_text()
        for old, new in words.items():
            text, target = text.replace(old, new), target.replace(old, new)
        write_text(folder / target, text)
    return folder
