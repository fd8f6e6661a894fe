"""Folders of sentence-transformers: what lies in them beside a network of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NotRequired, TypedDict

from tinyfusion_core.errors import UserError
from tinyfusion_core.parsing.records import check_inside, read_as

_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
_KINDS = (".json", ".safetensors", ".bin", ".txt")
_FIX = "take the file of the original model"


class _Module(TypedDict):
    path: str
    type: str


class _Pooling(TypedDict):
    pooling_mode_cls_token: NotRequired[bool]
    pooling_mode_mean_tokens: NotRequired[bool]
    pooling_mode: NotRequired[str]


def _modules(folder: Path) -> list[_Module]:
    """The modules of a model of sentence-transformers; none if the folder is none of its own."""
    path = folder / _FILES[0]
    found = read_as(path, list[_Module], _FIX) if path.is_file() else []
    check_inside([module["path"] for module in found if module["path"]], path)
    return found


def copy_modules(model: Path, folder: Path) -> list[str]:
    """Copy what sentence-transformers needs of a model besides the network, unless it is none of its folders.

    Args:
        model: the model's folder.
        folder: where to.

    Returns:
        Names of the files, relative to `folder`.

    Raises:
        UserError: the files that say what they are cannot be read.
    """
    modules = [model / module["path"] for module in _modules(model) if module["path"]]
    inside = [path for module in modules for path in sorted(module.rglob("*")) if path.suffix in _KINDS]
    found = [path for path in (*(model / name for name in _FILES), *inside) if modules and path.is_file()]
    names = [path.relative_to(model).as_posix() for path in found]
    for path, name in zip(found, names, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    return names


def check_pooling(folder: Path, pooling: str, key: str) -> None:
    """Check how a model pools, if its folder says so.

    Args:
        folder: the model's folder.
        pooling: how it shall.
        key: the setting that says so, to begin the message with.

    Raises:
        UserError: it pools otherwise.
    """
    for module in _of_kind(folder, "Pooling"):
        path = folder / module["path"] / "config.json"
        if not path.is_file():
            continue
        told = read_as(path, _Pooling, _FIX)
        modes = {"cls": told.get("pooling_mode_cls_token"), "mean": told.get("pooling_mode_mean_tokens")}
        said = told.get("pooling_mode") or next((name for name, on in modes.items() if on), "otherwise")
        if said != pooling:
            raise UserError(f"{key} is '{pooling}', and {path} says '{said}'; the two must agree")


def normalises(folder: Path) -> bool:
    """Return whether a model's folder says that its embeddings have the length 1."""
    return bool(_of_kind(folder, "Normalize"))


def _of_kind(folder: Path, kind: str) -> list[_Module]:
    return [module for module in _modules(folder) if module["type"].rpartition(".")[2] == kind]
