"""Reads recipes: from YAML and command-line overrides to the objects of a run."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..comparison.study import Audit, Compare
from ..errors import MissingFileError, UserError, about_a_recipe
from ..evaluation.metrics import Metric
from ..parsing.records import beside, read_text
from ..parsing.yaml12 import dump_yaml, load_yaml
from ..protocols.backbone import Backbone
from ..protocols.columns import check_sample_size
from ..protocols.data import DataSource
from ..protocols.loss import LossAdapter
from ..registry.registry import load_plugin
from ..registry.sources import PluginFile
from ..runtime.files import write_atomic, write_text
from ..runtime.stages import Stage, stages_of
from ..selection.base import Selector
from ..training.recover import Recover
from ..training.trainer import Trainer
from .misfits import REFUSALS, refusals, root_message
from .planning.on_meta import build_on_meta
from .schema import KEYS, SECTIONS, Round, checked, follow_recovery, schema, yaml12_numbers

RESERVED = ("teacher", "student", "figures", "checkpoints", "evaluation")
"""Names in a run folder that no round can have."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe.

    Attributes:
        backbone: the model family.
        loss: the objective.
        data: the data set.
        trainer: how every stage trains.
        train: trains the network from random weights first; without it the backbone has a checkpoint.
        search: decides which blocks are kept; without it nothing is pruned.
        recover: trains the pruned network.
        rounds: progressive pruning, instead of search and recover: rounds by name.
        evaluate: what to measure besides sizes.
        compare: settings of `tinyfusion compare`; a run ignores them.
        audit: settings of `tinyfusion audit`; a run ignores them.
        settings: the resolved YAML, with all defaults.
        plugins: the plugin files that the recipe names.
    """

    backbone: Backbone
    loss: LossAdapter
    data: DataSource
    trainer: Trainer
    train: Recover | None = None
    search: Selector | None = None
    recover: Recover | None = None
    rounds: Mapping[str, Round] | None = None
    evaluate: Sequence[Metric] = ()
    compare: Compare | None = None
    audit: Audit | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    plugins: Sequence[PluginFile] = ()

    @cached_property
    def on_meta(self) -> nn.Module:
        """The network on the meta device, without memory; whoever changes it takes a copy."""
        check_sample_size(self.backbone)
        return build_on_meta(self.backbone)

    def save(self, folder: Path) -> None:
        """Write the resolved `recipe.yaml`, and beside it the plugin files that it needs.

        Raises:
            UserError: the folder is not writable.
        """
        write_text(folder / "recipe.yaml", dump_yaml(dict(self.settings)))
        for file in self.plugins:
            write_atomic(folder / file.name, lambda out, file=file: out.write(file.content))  # type: ignore[misc]

    def with_horizon(self, stage: Stage, horizon: int) -> Recipe:
        """Return the recipe with another `horizon` of one of its recoveries."""
        settings = copy.deepcopy(dict(self.settings))
        (settings["rounds"][stage.round] if stage.round else settings)["recover"]["horizon"] = horizon
        how = replace(stage.settings, horizon=horizon)
        if not stage.round:
            return replace(self, settings=settings, recover=how)
        rounds = self.each_round()
        rounds[stage.round] = replace(rounds[stage.round], recover=how)
        return replace(self, settings=settings, rounds=rounds)

    def each_round(self) -> dict[str, Round]:
        """Return the rounds by name; a single search is one round with an empty name."""
        if self.search is None:
            return dict(self.rounds or {})
        return {"": Round(search=self.search, recover=self.recover)}

    def stages(self) -> list[Stage]:
        """Return the stages of the run in order; the settings of each are the object that runs it."""
        return stages_of({**vars(self), "rounds": {name: vars(step) for name, step in (self.rounds or {}).items()}})


@about_a_recipe()
def load_recipe(path: Path | str, flags: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML 1.2 file, in UTF-8.
        flags: overrides as on the command line: `--search.steps 600` or `--search.steps=600`; values are YAML 1.2.

    Raises:
        UserError: the first error, with its key, what was expected and the nearest known name.
    """
    path = Path(path)
    raw = _read(path)
    for key, value in _overrides(flags):
        _override(raw, key.split("."), value)
    raw = {key: value for key, value in raw.items() if value is not None}
    files = _load_plugins(path, raw.pop("plugins", []))
    _check_rounds(path, raw)
    problems: list[str] = []
    sections = checked(raw, problems)
    follow_recovery(sections)
    known = not problems  # a section with another name may be the one that is missing
    problems += [f"the key '{key}' is missing" for key in ("backbone", "loss", "data") if known and key not in raw]
    objects, settings = _parsed(sections, problems)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in dict.fromkeys(problems)))
    if files:
        settings = {"plugins": [file.name for file in files], **settings}
    return Recipe(**{name: getattr(objects, name) for name in SECTIONS}, settings=settings, plugins=files)


def _parsed(sections: Mapping[str, Any], problems: list[str]) -> tuple[Any, dict[str, Any]]:
    """The objects that sections of a recipe stand for, and the resolved settings; what is wrong becomes problems."""
    parser = schema()
    with yaml12_numbers():
        try:
            config = parser.parse_object(copy.deepcopy(dict(sections)))  # the parser changes what it is given
            objects = parser.instantiate(config)
        except REFUSALS as e:
            each = [problem for name in sections for problem in refusals(parser, {name: sections[name]})]
            problems += each or [root_message(e)[1]]
            return None, {}
    return objects, json.loads(json.dumps(config.as_dict()))  # tuples as the lists that YAML has


def _read(path: Path) -> dict[str, Any]:
    """The content of a recipe file. Raises UserError if it is missing or not a mapping."""
    try:
        raw = load_yaml(read_text(path))
    except MissingFileError:
        raise MissingFileError(
            f"{path}: no such recipe (it comes first: tinyfusion run RECIPE --key value){beside(path)}"
        ) from None
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not readable as YAML: {e}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(KEYS)}")
    return raw


def _load_plugins(path: Path, names: Any) -> list[PluginFile]:
    """Load the plugin files that a recipe names."""
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: plugins: expected a list of Python files beside the recipe: [my_backbone.py]")
    if len({Path(name).name for name in names}) < len(names):
        raise UserError(f"{path}: plugins: two files have the same name; rename one")
    try:
        return [load_plugin(path.parent / name) for name in names]
    except UserError as e:
        raise type(e)(f"{path}: {e}") from e


def _check_rounds(path: Path, raw: Mapping[str, Any]) -> None:
    rounds = raw.get("rounds")
    if rounds is None:
        return
    if both := sorted({"search", "recover"} & set(raw)):
        raise UserError(f"{path}: {both[0]} stands beside rounds; move it into one of them")
    if not isinstance(rounds, dict) or not rounds:
        raise UserError(f"{path}: rounds: expected a mapping of round names to search and recover")
    for name in rounds:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in RESERVED:
            raise UserError(
                f"{path}: rounds: {name!r} becomes a folder of the run; use a name of letters, digits, - and _ "
                f"(a number in quotes), and none of {', '.join(RESERVED)}"
            )


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted keys; class names and arguments are under the key they belong to."""
    if isinstance(settings, Mapping) and "class_path" in settings:
        name = settings["class_path"].rpartition(".")[2]
        return {prefix: name, **flatten(settings.get("init_args") or {}, prefix)}
    if isinstance(settings, Mapping) and settings:
        parts = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in settings.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: settings}


def _overrides(flags: Sequence[str]) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        key, equals, text = flag.partition("=")
        if not key.removeprefix("--") or not key.startswith("--"):
            raise UserError(f"'{flag:.60}': expected --section.key value, as in --search.steps 600")
        if not equals:
            if not rest:
                raise UserError(f"{key}: a value is missing")
            text = rest.pop(0)
        try:
            value = load_yaml(text)
        except yaml.YAMLError as e:
            raise UserError(f"{key}: '{text}' is not readable as YAML: {' '.join(str(e).split())}") from None
        if gone := next((name for name, to in out if to is None and key.startswith(f"--{name}.")), None):
            raise UserError(f"{key}: --{gone} null, before it, takes {gone} out; leave one of the two out")
        out.append((key[2:], value))
    return out


def _override(config: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a dotted key; the arguments of a class are under `init_args`, which the key leaves out."""
    *parents, last = path
    for name in parents:
        inner = config.get(name)
        if isinstance(inner, str):
            inner = {"class_path": inner}
        inner = dict(inner) if isinstance(inner, dict) else {}
        config[name] = inner
        if "class_path" in inner:
            inner["init_args"] = dict(inner.get("init_args") or {})
            inner = inner["init_args"]
        config = inner
    config[last] = value
