"""From YAML and flags to the objects of a run. The schema is the signatures of the classes themselves."""

from __future__ import annotations

import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from ..comparison.study import Audit, Compare
from ..errors import MissingFileError, UserError, nearest
from ..evaluation import frechet, latency  # noqa: F401  # bring the names of their classes
from ..evaluation.metrics import Metric
from ..protocols.backbone import Backbone
from ..protocols.data import DataSource
from ..protocols.loss import LossAdapter
from ..protocols.registry import PluginFile, load_plugin, registry
from ..pruning.weight_update import WeightUpdate
from ..runtime.files import write_atomic, write_text
from ..runtime.stages import Stage, stages_of
from ..samplers.constraints import Rules
from ..samplers.grouped import BlockSampler
from ..selection import criteria, successive_halving  # noqa: F401  # bring the names of their classes
from ..selection.search import Search, Selector
from ..training.distillation import OutputKD
from ..training.recover import Recover
from ..training.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class Round:
    """One step of progressive pruning; its student is the next round's teacher and source.

    Args:
        search: decides which blocks stay.
        recover: trains the pruned network.
    """

    search: Selector
    recover: Recover | None = None


SECTIONS: dict[str, Any] = {
    "backbone": Backbone,
    "loss": LossAdapter,
    "data": DataSource,
    "trainer": Trainer,
    "train": Recover,
    "search": Selector,
    "recover": Recover,
    "rounds": dict[str, Round],
    "evaluate": list[Metric],
    "compare": Compare,
    "audit": Audit,
}
KEYS = ("plugins", *SECTIONS)
BROUGHT = {"backbone": Backbone, "loss": LossAdapter, "data": DataSource, "metric": Metric}
"""Kinds that plugins register. The core has metrics of its own besides."""
POLYMORPHIC = (Backbone, LossAdapter, DataSource, Selector, Search, Metric, WeightUpdate, BlockSampler, OutputKD)
PLAIN = (Trainer, Recover, Round, Rules, Compare, Audit)
"""Classes that a section is made of without saying so."""
OPTIONAL = ("train", "search", "recover", "rounds", "compare", "audit")
RESERVED = ("teacher", "student", "figures", "checkpoints", "evaluation")
"""Names of a run folder that no round can have."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, ready to go.

    Attributes:
        backbone: the model family.
        loss: the objective.
        data: where examples come from.
        trainer: how every stage trains.
        train: trains the network from random weights first; without it the backbone brings a checkpoint.
        search: decides which blocks stay; without it nothing is pruned.
        recover: trains the pruned network.
        rounds: progressive pruning, in the place of search and recover: rounds by name.
        evaluate: what to measure besides sizes.
        compare: how `tinyfusion compare` sets criteria beside each other; a run does not read it.
        audit: how `tinyfusion audit` does.
        settings: the resolved YAML, every default filled in.
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

    def save(self, folder: Path) -> None:
        """Write the resolved `recipe.yaml`, and beside it the plugin files that it names, which it needs to be read."""
        write_text(folder / "recipe.yaml", yaml.safe_dump(dict(self.settings), sort_keys=False))
        for file in self.plugins:
            write_atomic(folder / file.name, lambda out, file=file: out.write(file.content))  # type: ignore[misc]

    def each_round(self) -> dict[str, Round]:
        """The rounds by name. A search of its own is one round without a name; no search, no round."""
        if self.search is None:
            return dict(self.rounds or {})
        return {"": Round(search=self.search, recover=self.recover)}

    def stages(self) -> list[Stage]:
        """The stages of the run in their order; the settings of each are the object that does its work."""
        return stages_of({**vars(self), "rounds": {name: vars(step) for name, step in (self.rounds or {}).items()}})


def load_recipe(path: Path | str, flags: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: the YAML file.
        flags: overrides as on the command line: `--search.steps 600` or `--search.steps=600`; values are YAML.

    Raises:
        UserError: the first thing wrong, with its key, what was expected and the nearest known name.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such recipe (it comes first: tinyfusion run RECIPE --key value)") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not readable as YAML: {e}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a recipe is a mapping with the keys {', '.join(KEYS)}")
    for key, value in _overrides(flags):
        _override(raw, key.split("."), value)
    raw = {key: value for key, value in raw.items() if value is not None}
    files = _load_plugins(path, raw.pop("plugins", []))
    for key in ("backbone", "loss", "data"):
        if key not in raw:
            raise UserError(f"{path}: the key '{key}' is missing")
    _check_rounds(path, raw)
    try:
        checked = {
            name: _checked(name, value, SECTIONS[name]) if name in SECTIONS else _unknown(name, KEYS)
            for name, value in raw.items()
        }
        parser = schema()
        config = parser.parse_object(checked)
        objects = parser.instantiate(config)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    except (ArgumentError, ValueError, TypeError) as e:
        raise UserError(f"{path}: {_root_message(e)}") from e
    settings = json.loads(json.dumps(config.as_dict()))  # tuples as the lists that YAML has
    for key, value in flatten(settings).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: {key} is {value}; expected a finite number")
    if files:
        settings = {"plugins": [file.name for file in files], **settings}
    return Recipe(**{name: getattr(objects, name) for name in SECTIONS}, settings=settings, plugins=files)


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


def schema() -> ArgumentParser:
    """The parser of a recipe, made from the signatures of its classes."""
    set_parsing_settings(subclasses_enabled=list(POLYMORPHIC))
    parser = ArgumentParser(prog="tinyfusion run RECIPE", exit_on_error=False)
    for name, kind in SECTIONS.items():
        optional = kind | None if name in OPTIONAL else kind
        default: Any = Trainer() if kind is Trainer else [] if name == "evaluate" else None
        parser.add_argument(f"--{name}", type=optional, default=default)
    return parser


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, class names and arguments under the key they belong to."""
    if isinstance(settings, Mapping) and "class_path" in settings:
        name = settings["class_path"].rpartition(".")[2]
        return {prefix: name, **flatten(settings.get("init_args") or {}, prefix)}
    if isinstance(settings, Mapping) and settings:
        parts = [flatten(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in settings.items()]
        return {key: value for part in parts for key, value in part.items()}
    return {prefix: settings}


def describe_keys() -> str:
    """Every key of a recipe with its default and meaning, from the signatures and docstrings of the classes."""
    lines = [
        "plugins: Python files beside the recipe that bring backbones, losses, data or metrics; their code is run",
    ]
    for section, kind in SECTIONS.items():
        base = typing.get_args(kind)[-1] if typing.get_origin(kind) in (list, dict) else kind
        lines.append(f"{section}:")
        for name, cls in (_known(base) if base in POLYMORPHIC else {base.__name__: base}).items():
            lines += _describe_class(name, cls)
    for base in (WeightUpdate, BlockSampler, OutputKD):
        lines.append(f"values of the type {base.__name__}:")
        for name, cls in _known(base).items():
            lines += _describe_class(name, cls)
    return "\n".join(lines) + "\n"


def _describe_class(name: str, cls: type[Any]) -> list[str]:
    # Inherited options are explained where they are declared.
    texts = [docstring_parser.parse(part.__doc__ or "") for part in cls.__mro__[-2::-1]]
    meaning = {p.arg_name: " ".join((p.description or "").split()) for text in texts for p in text.params}
    lines = [f"  {name}: {texts[-1].short_description or ''}"]
    for key, parameter in inspect.signature(cls).parameters.items():
        if not key.startswith("_") and key != "lists":
            default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
            lines.append(f"    {key}{default}: {meaning.get(key, '')}")
    return lines


def _overrides(flags: Sequence[str]) -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    rest = list(flags)
    while rest:
        flag = rest.pop(0)
        key, equals, text = flag.partition("=")
        if not key.startswith("--"):
            raise UserError(f"'{flag}': expected --section.key value, as in --search.steps 600")
        if not equals:
            if not rest:
                raise UserError(f"{key}: a value is missing")
            text = rest.pop(0)
        try:
            out.append((key[2:], yaml.safe_load(text)))
        except yaml.YAMLError as e:
            raise UserError(f"{key}: '{text}' is not readable as YAML: {' '.join(str(e).split())}") from None
    return out


def _override(config: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a dotted key; the arguments of a class stand under `init_args` without being named so."""
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


def _checked(key: str, value: Any, kind: Any, default: Any = None) -> Any:
    """The value with class names made full; raises UserError at the first unknown name."""
    kind = _without_none(kind)
    if typing.get_origin(kind) in (list, Sequence) and isinstance(value, list):
        return [_checked(f"{key}[{i}]", v, typing.get_args(kind)[0]) for i, v in enumerate(value)]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {k: _checked(f"{key}.{k}", v, typing.get_args(kind)[1]) for k, v in value.items()}
    if value is None or not inspect.isclass(kind):
        return value
    if kind in PLAIN:
        if not isinstance(value, dict):
            keys = ", ".join(inspect.signature(kind).parameters)
            raise UserError(f"{key}: got {value!r}; expected a mapping with keys among {keys}")
        return _checked_arguments(key, value, kind)
    if kind not in POLYMORPHIC:
        return value
    if isinstance(value, str):
        value = {"class_path": value}
    usual = "Search" if kind in (Selector, Search) else type(default).__name__ if isinstance(default, kind) else None
    if isinstance(value, dict) and "class_path" not in value and usual:
        value = {"class_path": usual, "init_args": value}
    if not isinstance(value, dict) or not isinstance(value.get("class_path"), str):
        raise UserError(f"{key}: give the name of a class, or class_path and init_args{nearest('', _known(kind))}")
    extra = set(value) - {"class_path", "init_args"}
    if extra:
        raise UserError(f"{key}: '{sorted(extra)[0]}' stands beside class_path; arguments go under init_args")
    known = _known(kind)
    name = value["class_path"].rpartition(".")[2]
    # A full path may go through a package's own front door; it must be the package of the class all the same.
    package = known[name].__module__.partition(".")[0] if name in known else ""
    if name not in known or value["class_path"].partition(".")[0] not in (name, package):
        raise UserError(f"{key}: unknown class '{value['class_path']}'{nearest(name, known)}")
    arguments = _checked_arguments(key, value.get("init_args") or {}, known[name])
    return {"class_path": _full(known[name]), "init_args": arguments}


def _checked_arguments(key: str, arguments: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    known = {name: p for name, p in inspect.signature(cls).parameters.items() if not name.startswith("_")}
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in arguments and cls in PLAIN:
            raise UserError(f"{key}.{name}: missing")
    hints = typing.get_type_hints(cls.__init__)
    out = {}
    for name, value in arguments.items():
        if name not in known:
            raise UserError(f"{key}.{name}: unknown key{nearest(str(name), known)}")
        hint = hints.get(name, Any)
        if value is None and hint is not Any and type(None) not in typing.get_args(hint):
            raise UserError(f"{key}.{name}: null is not allowed; expected {getattr(hint, '__name__', hint)}")
        out[name] = _checked(f"{key}.{name}", value, hint, known[name].default)
    return out


def _unknown(name: str, known: Iterable[str]) -> typing.NoReturn:
    raise UserError(f"{name}: unknown key{nearest(str(name), known)}")


def _known(base: type[Any]) -> dict[str, type[Any]]:
    """Every class of a kind, by name: what plugins bring, or what the core has."""
    kind = next((kind for kind, brought in BROUGHT.items() if base is brought), "")
    if kind and base is not Metric:
        return registry().classes[kind]
    found = {} if inspect.isabstract(base) else {base.__name__: base}
    for cls in base.__subclasses__():
        found.update(_known(cls))
    return {**found, **registry().classes[kind]} if kind else found


def _full(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _without_none(kind: Any) -> Any:
    """The class behind `X | None`, and behind a factory `Callable[[...], X]`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        kind = kinds[0] if len(kinds) == 1 else Any
    if typing.get_origin(kind) is Callable and typing.get_args(kind)[-1] in POLYMORPHIC:
        return typing.get_args(kind)[-1]
    return kind


def _root_message(error: BaseException) -> str:
    """What went wrong underneath: our own message if a class raised one, else the parser's, on one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    # The parser nests its messages; the innermost one names the value, the outer ones the way to it.
    *_, message = re.split(r'Parser key "[^"]+":', str(error))
    key = ".".join(re.findall(r'Parser key "([^"]+)":', str(error)))
    line = next(line.strip() for line in [*message.splitlines(), "not valid"] if line.strip())
    union = re.search(r"Subtypes: (.*)(?s:.*?)Given value: (.*)", message)
    line = f"Expected one of {union[1]}. Got value: {union[2]}" if union else line
    line = line.replace("a <class 'tuple'>", "a list")
    return f"{key}: {line}" if key else line
