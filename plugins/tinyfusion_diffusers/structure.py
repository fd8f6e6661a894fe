"""Finds the blocks of a diffusers transformer and their streams, and corrects the network after pruning."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from tinyfusion_core.errors import UserError, nearest
from tinyfusion_core.protocols.blocks.streams import Stream
from tinyfusion_diffusers.library import diffusers

DEPTHS: Mapping[str, Sequence[str]] = {
    "transformer_blocks": ("num_layers",),
    "joint_transformer_blocks": ("num_mmdit_layers",),
    "single_transformer_blocks": ("num_single_layers", "num_single_dit_layers"),
    "blocks": ("num_layers",),
    "layers": ("num_layers", "n_layers"),
}
"""Names of block lists, and the config keys for their length. Other lists (refiners, connectors) are never pruned:
Lumina 2 has one depth for both of its refiners.
"""

DECLARED: Mapping[str, tuple[Stream, ...]] = {
    "AuraFlowJointTransformerBlock": (Stream("hidden_states", 1), Stream("encoder_hidden_states", 0)),
}
"""Streams of blocks that diffusers' registry does not know and that return several tensors."""


def block_lists(model: nn.Module) -> dict[str, list[Any]]:
    """Return the lists of blocks by path, in the order in which a network declares them."""
    found = {path: child for path, child in model.named_children() if path in DEPTHS}
    return {path: list(child) for path, child in found.items() if isinstance(child, nn.ModuleList) and len(child)}


def free_blocks(model: nn.Module) -> list[str]:
    """Return the paths of the blocks that can be removed: all but the last one of SD3, which drops the text stream.

    No other block could take its place.
    """
    return [
        f"{path}.{i}"
        for path, blocks in block_lists(model).items()
        for i, block in enumerate(blocks)
        if not getattr(block, "context_pre_only", False)
    ]


def streams_by_list(model: nn.Module) -> dict[str, tuple[Stream, ...]]:
    """Return the residual streams of every block list.

    Raises:
        UserError: the network has no block list, or its config cannot express the removal of a block.
    """
    name, config = type(model).__name__, settings(model)
    streams = {}
    for path, blocks in block_lists(model).items():
        key = depth_key(path, config)
        if key is None or config[key] != len(blocks):
            raise UserError(
                f"backbone: {name} has {len(blocks)} blocks in '{path}', and no entry of its config says so "
                f"(looked for {', '.join(DEPTHS[path])}); its depth cannot be changed"
            )
        if len({type(block) for block in blocks}) > 1:
            raise UserError(f"backbone: '{path}' of {name} holds blocks of several classes; they cannot be gated alike")
        if "skip" in inspect.signature(blocks[0].forward).parameters:
            raise UserError(
                f"backbone: {name} joins the blocks of its first half to those of the second by long skips: a block "
                "cannot go without its partner, which gates that decide on single blocks cannot say. "
                "Choose a model without long skips"
            )
        streams[path] = streams_of_block(blocks[0])
    if not streams:
        raise UserError(f"backbone: {name} has no block list of a known name ({', '.join(DEPTHS)})")
    return streams


def streams_of_block(block: nn.Module) -> tuple[Stream, ...]:
    """Return the residual streams of a block: from diffusers' own registry, else `DECLARED`, else its single tensor.

    Raises:
        UserError: it returns several tensors, and neither names its streams.
    """
    # Private, and pinned by a test: what diffusers' own caching hooks go by.
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()  # type: ignore[no-untyped-call]
    kind = type(block)
    known = TransformerBlockRegistry._registry.get(kind)
    if known is not None:
        hidden = Stream(known.hidden_states_argument_name, known.return_hidden_states_index)
        if known.return_encoder_hidden_states_index is None:
            return (hidden,)
        return hidden, Stream(known.encoder_hidden_states_argument_name, known.return_encoder_hidden_states_index)
    if kind.__name__ in DECLARED:
        return DECLARED[kind.__name__]
    signature = inspect.signature(kind.forward)
    if "hidden_states" not in signature.parameters or "tuple" in str(signature.return_annotation).lower():
        raise UserError(
            f"backbone: diffusers {diffusers().__version__} does not register {kind.__name__}, and it is no block "
            "that takes `hidden_states` and gives one tensor; its streams are not known"
        )
    return (Stream("hidden_states"),)


def depth_key(path: str, config: Mapping[str, Any]) -> str | None:
    """Return the config key that holds the length of a block list."""
    return next((key for key in DEPTHS[path] if key in config), None)


def shorten(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Correct the config after pruning; the lists themselves are already short.

    Raises:
        UserError: the config cannot express what is left.
    """
    config = settings(model)
    edits: dict[str, Any] = {}
    for path, indices in kept.items():
        key = depth_key(path, config)
        assert key is not None  # streams_by_list has seen it
        edits[key] = len(indices)
        for name, value in config.items():
            # Layers named by their index, such as SD3.5's dual_attention_layers.
            if name.endswith("_layers") and isinstance(value, (list, tuple)):
                edits[name] = type(value)(j for j, i in enumerate(indices) if i in value)
    model.register_to_config(**edits)  # type: ignore[operator]
    with torch.device("meta"):
        fresh = construct(settings(model))
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
        UserError: diffusers has no such network, or its blocks cannot be removed.
    """
    cls, full = network_class(config), completed(config)
    try:
        model: nn.Module = cls.from_config(full)  # type: ignore[attr-defined]
    except (TypeError, ValueError, NotImplementedError) as e:
        raise UserError(
            f"backbone: {cls.__name__} of diffusers {diffusers().__version__} refuses its config: {e}"
        ) from None
    streams_by_list(model)
    return prepared(model)


def prepared(model: nn.Module) -> nn.Module:
    """Remove historical differences, so that any block can be removed; returns the network.

    Each of DiT's blocks has its own copy of the time and label embedder, and the head reads that of the first block:
    here they share one. Label dropout in the network is turned off: objectives draw it.
    """
    from diffusers.models.embeddings import LabelEmbedding

    for blocks in block_lists(model).values():
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
    for path, blocks in block_lists(model).items():
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


def _conditioner(blocks: Sequence[Any]) -> Any:
    """The embedder of the first of some blocks, if they have one."""
    embedder = getattr(getattr(blocks[0], "norm1", None), "emb", None)
    return embedder if isinstance(embedder, nn.Module) else None
