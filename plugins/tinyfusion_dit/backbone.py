"""DiT (arXiv 2212.09748) as a backbone: checkpoints, sizes, prunable blocks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tinyfusion_core.backbone import Backbone
from tinyfusion_core.errors import MissingFileError, UserError, nearest
from tinyfusion_core.files import load_strict, read_json, read_weights, sha256
from tinyfusion_core.randomness import generator

_SHIPPED = Path(__file__).parent / "checkpoints"
_OFFICIAL = "https://dl.fbaipublicfiles.com/DiT/models/"


@dataclass(frozen=True, kw_only=True)
class DiT(Backbone):
    """The diffusion transformer of arXiv 2212.09748.

    A size left out is that of the checkpoint folder, else of `variant`, else the published default. One that
    is given overrides the variant (a pruned XL/2: `variant: XL/2`, `depth: 14`) and must agree with the folder.

    Args:
        variant: a published size, "S/2" to "XL/8": width and patch size.
        checkpoint: a folder with config.json and model.safetensors, the name of one that comes with this
            package, or a .pt, .pth or .safetensors file (EMA weights are preferred to the raw ones).
        input_size: side of the latent: an eighth of the image's.
        patch_size: side of a patch.
        in_channels: channels of the latent.
        hidden_size: width.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs, relative to the width.
        class_dropout_prob: when positive, the label table has one more row, for dropped labels.
        num_classes: number of labels.
        learn_sigma: whether the network predicts a variance too.
        mlp_act: activation of the MLPs, "gelu_tanh" or "silu".
        licence: licence of the checkpoint, for the model card.
    """

    variant: str | None = None
    checkpoint: str | None = None
    input_size: int | None = None
    patch_size: int | None = None
    in_channels: int | None = None
    hidden_size: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    class_dropout_prob: float | None = None
    num_classes: int | None = None
    learn_sigma: bool | None = None
    mlp_act: str | None = None
    licence: str = "unknown"
    _random_seed: int | None = None  # set by `tiny`, which has no checkpoint

    def build(self) -> nn.Module:
        """Draws nothing from the global generator."""
        path = self._weights() if self._random_seed is None else None
        with torch.device("meta"):  # the initial values would only cost time
            model = self.construct(self.config())
        model = model.to_empty(device="cpu").eval()
        if path is None:
            _randomise(model, generator(self._random_seed, "tiny DiT"))
        else:
            load_strict(model, read_weights(path), path)
        return model

    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Raises UserError when neither a checkpoint folder nor a variant nor the sizes say what the network is."""
        if model is not None:
            return dict(_settings(model))
        given = self._given()
        folder = self._folder()
        if folder is not None:
            return _agree(self._saved(folder, "network"), given, folder / "config.json")
        if missing := [k for k in ("hidden_size", "depth", "num_heads", "patch_size") if k not in given]:
            raise UserError(
                f"backbone: {', '.join(missing)} not known; set backbone.variant (such as XL/2), the sizes "
                "themselves, or a backbone.checkpoint folder that holds a config.json"
            )
        return _network_defaults() | given

    @classmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        """Raises UserError when `config` is that of another network."""
        from .model import DiT as Network

        if unknown := set(config) - set(_network_defaults()):
            word = min(unknown)
            raise UserError(f"DiT has no network setting '{word}'{nearest(word, _network_defaults())}")
        return Network(**config)

    def blocks(self, model: nn.Module) -> Sequence[str]:
        return ["blocks.*"]

    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        _settings(model)["depth"] = len(kept["blocks"])

    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Clean latents `x` (num_rows, C, S, S) and labels `y` (num_rows,)."""
        config = self.config()
        side = config["input_size"]
        return {
            "x": torch.zeros(num_rows, config["in_channels"], side, side),
            "y": torch.arange(num_rows) % config["num_classes"],
        }

    @classmethod
    def tiny(cls) -> DiT:
        return cls(
            input_size=8, patch_size=2, hidden_size=16, depth=4, num_heads=2, mlp_ratio=2.0, num_classes=10,
            _random_seed=0,
        )  # fmt: skip

    def source(self) -> dict[str, Any]:
        if self.checkpoint is None:
            return {"licence": self.licence}
        folder, licence = self._folder(), self.licence
        if folder is not None:
            saved = self._saved(folder, "source").get("licence", "unknown")
            if "unknown" not in (saved, licence) and saved != licence:
                raise UserError(f"backbone.licence is '{licence}', but {folder / 'config.json'} says '{saved}'")
            licence = saved if licence == "unknown" else licence
        return {"checkpoint": self.checkpoint, "sha256": sha256(self._weights()), "licence": licence}

    def export(self, model: nn.Module, library: str, folder: Path) -> None:
        if library != "diffusers":
            super().export(model, library, folder)
        from .convert import to_diffusers

        to_diffusers(model, _settings(model)).save_pretrained(folder)

    def _given(self) -> dict[str, Any]:
        """The network settings that the recipe names, directly or through the variant."""
        from .model import VARIANTS

        if self.variant is not None and self.variant not in VARIANTS:
            raise UserError(f"backbone.variant: no '{self.variant}'{nearest(self.variant, VARIANTS)}")
        sizes: dict[str, Any] = dict(VARIANTS[self.variant]) if self.variant else {}
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _network_defaults()}
        return sizes | {k: v for k, v in named.items() if v is not None}

    def _folder(self) -> Path | None:
        """The checkpoint folder, if the checkpoint is one. A bare name means a shipped folder before a local one."""
        name = self.checkpoint
        if name is None:
            return None
        if Path(name).name == name and (_SHIPPED / name / "config.json").is_file():
            return _SHIPPED / name
        return Path(name) if Path(name).is_dir() else None

    def _weights(self) -> Path:
        """The file that holds the weights."""
        folder = self._folder()
        if folder is not None:
            return folder / "model.safetensors"
        if self.checkpoint is not None and Path(self.checkpoint).is_file():
            return Path(self.checkpoint)
        problem = "not set" if self.checkpoint is None else f"'{self.checkpoint}' does not exist"
        side = {None: "256x256", 32: "256x256", 64: "512x512"}.get(self.input_size)
        official = (
            f" The official weights are the file DiT-XL-2-{side}.pt from {_OFFICIAL}."
            if self.variant == "XL/2" and side
            else f" Official weights exist for XL/2 alone (DiT-XL-2-256x256.pt from {_OFFICIAL})."
        )
        shipped = sorted(p.parent.name for p in _SHIPPED.glob("*/config.json"))
        known = f" Included here: {', '.join(shipped)}." if shipped else ""
        raise MissingFileError(
            f"backbone.checkpoint: {problem}. Expected a .pt, .pth or .safetensors file, or a folder with "
            f"config.json and model.safetensors.{official}{known}"
        )

    def _saved(self, folder: Path, key: str) -> dict[str, Any]:
        content = read_json(folder / "config.json")
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, dict):
            raise UserError(f"{folder / 'config.json'}: no mapping '{key}'; expected a folder written by this package")
        return value


def _settings(model: nn.Module) -> dict[str, Any]:
    return cast(dict[str, Any], model.config)


def _randomise(model: nn.Module, rng: torch.Generator) -> None:
    """Values of a size that keeps every term of the forward visible; none is zero, as adaLN would start with."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.2, generator=rng)


def _network_defaults() -> dict[str, Any]:
    from .model import DiT as Network

    return {name: p.default for name, p in inspect.signature(Network).parameters.items()}


def _agree(saved: dict[str, Any], given: dict[str, Any], path: Path) -> dict[str, Any]:
    """The saved settings, which every given one must equal."""
    whole = _network_defaults() | saved
    for key, value in given.items():
        if whole[key] != value:
            raise UserError(
                f"backbone.{key} is {value!r} in the recipe (or its variant), but {whole[key]!r} in {path}; "
                "leave it out, or choose another checkpoint"
            )
    return whole
