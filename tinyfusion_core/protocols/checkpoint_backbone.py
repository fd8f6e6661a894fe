"""Backbones built from constructor keywords, with weights in a file or folder."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from ..errors import MissingFileError, UserError, nearest, require
from ..parsing.records import beside, read_json
from ..parsing.state_dicts import unwrapped, without_ignored
from ..parsing.weights import load_strict, open_tensors, read_weights, weight_files
from ..runtime.files import NEUTRAL, digest, sha256
from ..runtime.seeding import generator
from .backbone import Backbone, constructed, owner
from .label_table import with_label_table


@dataclass(frozen=True, kw_only=True)
class CheckpointBackbone(Backbone):
    """A network of known sizes, and where its weights are.

    A subclass adds one field per keyword of the network's constructor, with None as default. A keyword that is left out
    is taken from the checkpoint folder, else from `variant`, else from the constructor's default. The network keeps its
    keywords in an attribute `config`, which `after_prune` corrects.

    Args:
        variant: name of a published size.
        checkpoint: a folder with config.json and model.safetensors, the name of one that comes with the package,
            a .pt, .pth or .safetensors file, or a folder of several with their index. Of a file that holds more than
            one network, averages are preferred; `{file: ..., key: model}` chooses, dots lead into nested ones.
        licence: licence of the checkpoint, for the model card.
        ignore: names of weights to leave out, with `*`: heads that inference does not use.
        new_labels: begin the label table anew, for labels of one's own, of which there may be another number than the
            checkpoint has.
    """

    #: Constructor keywords of the published sizes, by name.
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: Keywords without which a recipe that has neither a variant nor a checkpoint folder names no network.
    needed: ClassVar[Sequence[str]] = ()
    #: Where the checkpoint folders are that come with the package.
    shipped: ClassVar[Path | None] = None
    #: The entry to take of a file that holds several state dicts, best first.
    containers: ClassVar[Sequence[str]] = ("ema", "model_ema", "ema_model", "model", "state_dict", "model_state_dict")
    #: Weights that the network's constructor computes, which a checkpoint may lack.
    computed: ClassVar[Sequence[str]] = ()

    #: The keyword with the number of labels, and the weight with a row for each; further rows are for other things.
    labels: ClassVar[tuple[str, str] | None] = None

    variant: str | None = None
    checkpoint: str | dict[str, str] | None = None
    licence: str = "unknown"
    ignore: Sequence[str] = field(default=(), metadata={NEUTRAL: []})
    new_labels: bool = field(default=False, metadata={NEUTRAL: False})
    _random_seed: int | None = None  # set by `tiny`, which has no checkpoint

    @classmethod
    @abstractmethod
    def network(cls) -> type[nn.Module]:
        """Return the network's class; import it here, so that listing plugins stays fast."""

    def official(self) -> str | None:
        """Return the name and location of published weights that fit, for messages; None if there are none."""
        return None

    @override
    def build(self) -> nn.Module:
        """Build the network and load its weights. Draws nothing from the global generator.

        Raises:
            UserError: the checkpoint is missing, damaged or of another architecture.
        """
        path = self._weights() if self._random_seed is None else None
        config = self.config()
        with torch.device("meta"):  # the initial values would only cost time
            model = constructed(self, config, self.origin or owner(self))
        if next(model.buffers(), None) is None:
            model = model.to_empty(device="cpu").eval()
        else:  # buffers need theirs
            with torch.random.fork_rng():
                model = constructed(self, config, self.origin or owner(self)).eval()
        if path is None:
            randomise(model, generator(self._random_seed, type(self).__name__))
        else:
            load_strict(model, self._read(path, model.state_dict()), path)
        return model

    def _read(self, path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a checkpoint under the network's names."""
        weights = unwrapped(read_weights(path, self.containers, self._place[1]), own)
        weights = without_ignored(weights, self.ignore, own, "backbone.ignore")
        if not own.keys().isdisjoint(weights) and (missing := [name for name in self.computed if name not in weights]):
            with torch.random.fork_rng():
                made = constructed(self, self.config(), str(path)).state_dict()
            weights |= {name: made[name] for name in missing}
        more = [name for name in weights if name not in own]
        heads = sorted({f"{name.partition('.')[0]}.*" for name in more})
        if own.keys() <= weights.keys() and not any(fnmatchcase(name, head) for name in own for head in heads) and more:
            raise UserError(
                f"{path}: has {len(more)} weights that {self.network().__name__} has no place for, such as {more[0]}; "
                f"if it can do without them, set backbone.ignore: [{', '.join(heads)}]"
            )
        if self.labels is not None:
            count, table = self.labels
            return with_label_table(weights, own, table, (count, self.config()[count]), self.new_labels, path)
        require(not self.new_labels, "backbone.new_labels", True, f"false: {type(self).__name__} has no label table")
        return weights

    @property
    def _place(self) -> tuple[str | None, str | None]:
        """The file or folder of the checkpoint, and which of its entries is the network."""
        if self.checkpoint is None or isinstance(self.checkpoint, str):
            return self.checkpoint, None
        given = self.checkpoint
        if unknown := sorted(given.keys() - {"file", "key"}):
            raise UserError(f"backbone.checkpoint.{unknown[0]}: unknown key{nearest(unknown[0], ('file', 'key'))}")
        if "file" not in given:
            raise UserError("backbone.checkpoint: has a key, but no file")
        return given["file"], given.get("key")

    @override
    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return the constructor keywords of a network, or of the one that `build` would return.

        Raises:
            UserError: neither a checkpoint folder, a variant nor the sizes say what the network is.
        """
        if model is not None:
            return dict(settings(model))
        given = self._given()
        folder = self._folder()
        if folder is not None:
            saved, count = self._defaults() | self._saved(folder, "network"), self.labels and self.labels[0]
            if self.new_labels and count in given:
                saved[count] = given[count]
            return _agree(saved, given, folder / "config.json", count)
        if missing := [k for k in self.needed if k not in given]:
            raise UserError(
                f"backbone: {', '.join(missing)} not known; set backbone.variant ({', '.join(self.variants)}), "
                "the sizes themselves, or a backbone.checkpoint folder that holds a config.json"
            )
        return self._defaults() | given

    @classmethod
    @override
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        """Build the untrained network of a `config`.

        Raises:
            UserError: the network has no such setting.
        """
        defaults = cls._defaults()
        if unknown := set(config) - set(defaults):
            word = min(unknown)
            raise UserError(f"{cls.__name__} has no network setting '{word}'{nearest(word, defaults)}")
        return cls.network()(**config)

    @property
    @override
    def origin(self) -> str | None:
        folder = self._folder()
        return None if folder is None else str(folder / "config.json")

    @override
    def source(self) -> dict[str, Any]:
        if self.checkpoint is None:
            return {"licence": self.licence}
        folder, licence = self._folder(), self.licence
        if folder is not None:
            saved = self._saved(folder, "source").get("licence", "unknown")
            if "unknown" not in (saved, licence) and saved != licence:
                raise UserError(f"backbone.licence is '{licence}', but {folder / 'config.json'} says '{saved}'")
            licence = saved if licence == "unknown" else licence
        name, key = self._place
        files = weight_files(self._weights())
        content = sha256(files[0]) if len(files) == 1 else digest([sha256(file) for file in files])
        more: dict[str, Any] = {"key": key} if key else {}
        if self.new_labels:
            more["new_labels"] = True
        return {"checkpoint": name, **more, "sha256": content, "licence": licence}

    @override
    def check_weights(self) -> None:
        """Read the headers of files of safetensors."""
        for path in weight_files(self._weights()):
            if path.suffix == ".safetensors":
                open_tensors(path)

    @classmethod
    def random(cls, **sizes: Any) -> Self:
        """Return a backbone whose network has random non-zero weights; for `tiny`."""
        return cls(**sizes, _random_seed=0)

    @classmethod
    @override
    def tiny(cls) -> Self:
        """Return the network with its constructor's defaults. Override it where those are not small."""
        return cls.random()

    def _given(self) -> dict[str, Any]:
        """The network settings in the recipe, given directly or through the variant."""
        if self.variant is not None and self.variant not in self.variants:
            raise UserError(f"backbone.variant: no '{self.variant}'{nearest(self.variant, self.variants)}")
        sizes: dict[str, Any] = dict(self.variants[self.variant]) if self.variant else {}
        defaults = self._defaults()
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name in defaults}
        for name, value in named.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                least = 1 if isinstance(value, int) and defaults[name] else 0
                require(value >= least, f"backbone.{name}", value, f"at least {least}")
        return sizes | {k: v for k, v in named.items() if v is not None}

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {name: p.default for name, p in inspect.signature(cls.network()).parameters.items()}

    def _folder(self) -> Path | None:
        """The checkpoint folder that says what its network is. A bare name is a shipped folder before a local one."""
        name = self._place[0]
        if name is None:
            return None
        if Path(name).name == name and self.shipped and (self.shipped / name / "config.json").is_file():
            return self.shipped / name
        # Of a folder without a config the recipe has the sizes.
        return Path(name) if Path(name).is_dir() and not _of_others(Path(name)) else None

    def _weights(self) -> Path:
        """The file that holds the weights, or the index of several."""
        folder, name = self._folder(), self._place[0]
        if folder is not None:
            path = folder / "model.safetensors"
            if not path.is_file() and (folder / "config.json").is_file():
                raise MissingFileError(f"{path}: no such file; copy the whole folder again")
            return path
        if name is not None and Path(name).is_dir():
            return _of_others(Path(name))[0]
        if name is not None and Path(name).is_file():
            return Path(name)
        problem = "not set. Name" if name is None else f"'{name}' does not exist{beside(Path(name)) or '.'} Put there"
        official = f"{self.official()}, or any other" if self.official() else "a"
        names = ", ".join(sorted(p.parent.name for p in self.shipped.glob("*/config.json"))) if self.shipped else ""
        raise MissingFileError(
            f"backbone.checkpoint: {problem} {official} .pt, .pth or .safetensors file, or a folder with config.json "
            f"and model.safetensors.{f' Included here: {names}.' if names else ''}"
        )

    def _saved(self, folder: Path, key: str) -> dict[str, Any]:
        content = read_json(folder / "config.json")
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, dict):
            raise UserError(f"{folder / 'config.json'}: no mapping '{key}'; expected a folder written by this package")
        return value


def _of_others(folder: Path) -> list[Path]:
    """The index of the weights in a folder that others have written, or their only file; empty if it has neither."""
    if (folder / "config.json").is_file():
        return []
    indices, files = sorted(folder.glob("*.index.json")), sorted(folder.glob("*.safetensors"))
    return indices[:1] or (files if len(files) == 1 else [])


def settings(model: nn.Module) -> dict[str, Any]:
    """Return the constructor keywords of a network, for `after_prune` to correct in place."""
    return cast(dict[str, Any], model.config)


def randomise(model: nn.Module, rng: torch.Generator) -> None:
    """Fill a network with random weights, scaled so that every term of the forward pass matters.

    None is zero, unlike the initial values of adaLN.
    """
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.2, generator=rng)


def _agree(saved: dict[str, Any], given: dict[str, Any], path: Path, count: str | None) -> dict[str, Any]:
    """The saved settings, which every given one must equal; `count` is that of the number of labels."""
    for key, value in given.items():
        if saved[key] != value:
            way = (
                "set backbone.new_labels: true to begin a label table" if key == count else "choose another checkpoint"
            )
            raise UserError(
                f"backbone.{key} is {value!r} in the recipe (or its variant), but {saved[key]!r} in {path}; "
                f"leave it out, or {way}"
            )
    return saved
