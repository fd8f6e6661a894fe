"""Builds the transformers of diffusers, finds their blocks, and corrects the network after pruning."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from tinyfusion_core.errors import UserError, nearest
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_diffusers.blocks.lists import BlockList, block_lists, module_lists, shortened
from tinyfusion_diffusers.blocks.streams import streams_in, streams_of_block
from tinyfusion_diffusers.library import diffusers


def lists_of(config: Mapping[str, Any], names: Sequence[str] = ()) -> dict[str, BlockList]:
    """Return the block lists of which single blocks can go, by path, in the order in which a network declares them.

    Args:
        config: config of the whole network.
        names: paths of the lists to look at; by default those that the network holds itself.

    Raises:
        UserError: there is none, or not all of those named are; or blocks are joined by long skips.
    """
    full = completed(config)
    name = full["_class_name"]
    with torch.device("meta"):
        model = construct(full)
    for path in names:
        if not isinstance(dict(model.named_modules()).get(path), nn.ModuleList):
            raise UserError(
                f"backbone.lists: {name} has no list of modules '{path}'{nearest(path, module_lists(model))}"
            )
    if any("skip" in inspect.signature(blocks[0].forward).parameters for blocks in module_lists(model).values()):
        raise UserError(
            f"backbone: {name} joins the blocks of its first half to those of the second by long skips: a block "
            "cannot go without its partner, which gates that decide on single blocks cannot say. "
            "Choose a model without long skips"
        )
    seen = block_lists(construct, full, names)
    found = {path: told for path, told in seen.items() if told.free}
    if not found or len(found) < len(names):
        whys = "; ".join(f"'{path}': {told.why}" for path, told in seen.items() if not told.free) or "there is none"
        raise UserError(f"backbone: {name} has no list whose config can say it one block shorter ({whys})")
    return found


def streams_by_list(config: Mapping[str, Any], named: Mapping[str, Sequence[str]]) -> dict[str, tuple[Stream, ...]]:
    """Return the residual streams of every block list.

    Args:
        config: config of the whole network.
        named: paths of the lists, and the arguments that their blocks return, in this order; empty: both are found.

    Raises:
        UserError: the network has no such lists, or what their blocks hand on is not known.
    """
    found = lists_of(config, tuple(named))
    with torch.device("meta"):
        model = construct(config)
    streams = {}
    for path, told in found.items():
        blocks = [model.get_submodule(f"{path}.{i}") for i in told.free]
        takes = inspect.signature(blocks[0].forward).parameters
        for name in (name for name in named.get(path, ()) if name not in takes):
            raise UserError(f"backbone.lists: the blocks in '{path}' take no '{name}'{nearest(name, list(takes))}")
        kinds = {streams_in(named[path]) if named.get(path) else streams_of_block(block) for block in blocks}
        if len(kinds) > 1:
            raise UserError(
                f"backbone: the blocks in '{path}' of {type(model).__name__} hand on different things; they cannot be "
                "gated alike"
            )
        (streams[path],) = kinds
    return streams


def shorten(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Correct the config after pruning; the lists themselves are already short.

    Raises:
        UserError: the config cannot express what is left.
    """
    config = settings(model)
    keys = {path: found.key for path, found in lists_of(config, tuple(kept)).items()}
    fewer, edits = shortened(config, kept, keys)
    model.register_to_config(**edits)  # type: ignore[operator]
    with torch.device("meta"):
        fresh = construct(fewer)
    ours, theirs = ({name: t.shape for name, t in m.state_dict().items()} for m in (model, fresh))
    if ours != theirs:
        different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise UserError(
            f"backbone: the config of {type(model).__name__} cannot express these blocks: with {edits} it builds "
            f"another '{different[0]}'"
        )


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a config with the defaults of the network's class, and drop what the class does not take.

    Published configs may hold more than their class takes, and older ones name the class that DiT's and
    PixArt's came from.

    Raises:
        UserError: diffusers has no such class.
    """
    cls = network_class(config)
    defaults = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items() if k != "self"}
    return {"_class_name": cls.__name__, **{key: config.get(key, value) for key, value in defaults.items()}}


def network_class(config: Mapping[str, Any]) -> type[nn.Module]:
    """Return the class of a config.

    Raises:
        UserError: diffusers has no model of that name.
    """
    library, name = diffusers(), str(config.get("_class_name"))
    cls: Any = getattr(library, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, library.ModelMixin)):
        known = [n for n in dir(library) if "Transformer" in n and n.endswith("Model")]
        raise UserError(f"backbone: diffusers {library.__version__} has no model '{name}'{nearest(name, known)}")
    from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
    from diffusers.models.modeling_utils import LegacyModelMixin

    if issubclass(cls, LegacyModelMixin):
        cls = _fetch_remapped_cls_from_config({"norm_type": None, **config}, cls)  # type: ignore[no-untyped-call]
    return cast(type[nn.Module], cls)


def construct(config: Mapping[str, Any]) -> nn.Module:
    """Build the untrained transformer of a diffusers config.

    Raises:
        UserError: diffusers has no such network.
    """
    cls, full = network_class(config), completed(config)
    try:
        model: nn.Module = cls.from_config(full)  # type: ignore[attr-defined]
    except (TypeError, ValueError, NotImplementedError) as e:
        raise UserError(
            f"backbone: {cls.__name__} of diffusers {diffusers().__version__} refuses its config: {e}"
        ) from None
    return prepared(model)


def prepared(model: nn.Module) -> nn.Module:
    """Remove historical differences, so that any block can be removed; returns the network.

    Each of DiT's blocks has its own copy of the time and label embedder, and the head reads that of the first block:
    here they share one. Label dropout in the network is turned off: objectives draw it.
    """
    from diffusers.models.embeddings import LabelEmbedding

    for blocks in module_lists(model).values():
        if (shared := _conditioner(blocks)) is not None:
            for block in blocks:
                block.norm1.emb = shared
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model


def check_copies(model: nn.Module, where: str) -> None:
    """Check that the embedders that blocks will share are equal.

    Raises:
        UserError: they differ.
    """
    for path, blocks in module_lists(model).items():
        if (first := _conditioner(blocks)) is None:
            continue
        expected = first.state_dict()
        for i, block in enumerate(blocks):
            for name, value in block.norm1.emb.state_dict().items():
                if not torch.equal(value, expected[name]):
                    raise UserError(
                        f"{where}: the embedders of '{path}.0' and '{path}.{i}' differ in '{name}'. The head reads "
                        "the first block's, so that a network without that block would be another one; expected "
                        "equal copies, as in the published checkpoints"
                    )


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the diffusers class of a network; sharding puts a class of its own before it."""
    return next(cls for cls in type(model).__mro__ if cls.__module__.startswith("diffusers."))


def settings(model: nn.Module) -> dict[str, Any]:
    """Return a transformer's config: its class and constructor keywords."""
    config: Mapping[str, Any] = model.config  # type: ignore[assignment]
    return {"_class_name": class_of(model).__name__, **{k: v for k, v in config.items() if not k.startswith("_")}}


def _conditioner(blocks: Any) -> Any:
    """The embedder of the first of some blocks, if they have one."""
    embedder = getattr(getattr(blocks[0], "norm1", None), "emb", None)
    return embedder if isinstance(embedder, nn.Module) else None
