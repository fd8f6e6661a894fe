"""What the index of a pipeline's folder says of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfusion_core.errors import MissingFileError, UserError, first_line, need
from tinyfusion_core.parsing.records import check_folder
from tinyfusion_diffusers.library import diffusers


@dataclass(frozen=True)
class Index:
    """The parts of a pipeline.

    Attributes:
        where: its folder, or its id on the Hugging Face hub.
        cls: its class.
        parts: library and class of its parts, by name; None where there is none.
    """

    where: str
    cls: Any
    parts: Mapping[str, tuple[str | None, str | None]]

    @property
    def network(self) -> str | None:
        """Class of the transformer; None if it has none of diffusers."""
        library, name = self.parts.get("transformer", (None, None))
        return name if library == "diffusers" else None

    def check_known(self, *kinds: str) -> None:
        """Check that the parts whose names begin so are of known libraries.

        Raises:
            UserError: one is not.
        """
        for name, (library, _) in self.parts.items():
            if name.startswith(kinds) and library not in (None, "diffusers", "transformers"):
                raise UserError(
                    f"{self.where}: {name} comes from '{library}'; parts of diffusers and transformers are read, and "
                    "no others, which may be code"
                )


def read_index(where: str, key: str) -> Index:
    """Read the index of a pipeline.

    Args:
        where: the pipeline's folder, or its id on the Hugging Face hub.
        key: what needs it, for messages.

    Raises:
        UserError: there is no pipeline, or it is none of diffusers.
    """
    library = diffusers(key)
    need("transformers", "tinyfusion[diffusers]", key)
    if Path(where).is_dir():
        for folder in (Path(where), *sorted(path for path in Path(where).iterdir() if path.is_dir())):
            check_folder(folder)
    try:
        index: Mapping[str, Any] = library.DiffusionPipeline.load_config(where)
    except (OSError, ValueError) as e:
        raise MissingFileError(
            f"{where}: no pipeline there ({first_line(e)}); expected a folder with model_index.json, or an id on the "
            "Hugging Face hub"
        ) from None
    name = index.get("_class_name")
    cls: Any = getattr(library, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, library.DiffusionPipeline)):
        raise UserError(f"{where}: diffusers {library.__version__} has no pipeline {name}; expected one of its own")
    pairs = {name: value for name, value in index.items() if isinstance(value, (list, tuple)) and len(value) == 2}
    return Index(where, cls, {name: (value[0], value[1]) for name, value in pairs.items()})


def loggers() -> list[Any]:
    """Return what shows bars of loading, and warnings such as a line for every prompt that is cut; see `quietly`."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    return [of_diffusers, of_transformers]
