"""Depth surgery on a transformers decoder: corrects config and weights once layers are gone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tinyfusion_core.errors import UserError, first_line
from tinyfusion_core.protocols.blocks.branches import remove_branches, removed_branches
from tinyfusion_core.protocols.undisturbed import evaluating
from tinyfusion_llm.layers.building import Settings, construct_as
from tinyfusion_llm.layers.finding import SLOTS, close_ranks, num_fed, text_config


def shorten(model: nn.Module, path: str, kept: Sequence[int]) -> None:
    """Correct what a network knows of its layers after pruning, see `corrected`.

    Args:
        model: the network.
        path: path of the list of layers, which is already short.
        kept: indices of the kept layers.

    Raises:
        UserError: the config cannot express the remaining layers.
    """
    config = text_config(model)
    depth = config.num_hidden_layers
    if problem := corrected(model, path, kept):
        rules = [key for key, value in config.to_dict().items() if _is_int(value) and re.search(_RULE, key)]
        named = f"; the rule is among {', '.join(rules)}" if rules else ""
        raise UserError(
            f"backbone: the config of a '{config.model_type}' cannot express the layers {list(kept)} of {depth}: "
            f"{problem}{named}. Its kinds of layers follow from their positions; keep whole periods, or other layers"
        )
    close_ranks(model)


def corrected(model: nn.Module, path: str, kept: Sequence[int]) -> str:
    """Correct config, layers and packed weights once the list of layers is short.

    Lists in the config with one entry per layer are filtered, and lists and tables of layer indices renumbered. Weights
    outside of the layers that hold a part for each are sliced. Then the layers are compared with those that the config
    builds.

    Args:
        model: the network.
        path: path of the list of layers.
        kept: indices of the kept layers.

    Returns:
        What the config cannot express; empty if it can.
    """
    layers, config = model.get_submodule(path), text_config(model)
    depth = config.num_hidden_layers
    if list(kept[: (fed := num_fed(model))]) != list(range(fed)):
        return f"features of images are given to the layers before {fed}, which must stay"
    for position, layer in enumerate(layers.children()):
        for module in layer.modules():
            for name in SLOTS & vars(module).keys():
                setattr(module, name, position)
    edits = _edits(config.to_dict(), depth, kept)
    config.num_hidden_layers = len(kept)
    for key, value in edits.items():
        setattr(config, key, value)
    fresh = _fresh(model)
    if not isinstance(fresh, str):
        _slice(model, fresh, path, depth, kept)
    return _difference(model, path, fresh) and _count_anew(model, path, depth, kept)


def try_out(model: nn.Module, kept: Sequence[int]) -> None:
    """Run a pruned network once, and once with a cache; warn if it runs without one only.

    Hybrid ones that have lost all attention cannot generate. On the meta device nothing is run, see `limits`.

    Args:
        model: the network.
        kept: indices of its layers in the whole one.

    Raises:
        UserError: it does not run: something in it still counts on other layers.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    if tokens.is_meta:
        return
    kind = f"a '{text_config(model).model_type}' of the layers {list(kept)} alone"
    for cached in (False, True):
        try:
            with torch.random.fork_rng(), torch.no_grad(), evaluating(model):
                model(input_ids=tokens, use_cache=cached)
        except (LookupError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {e}"
            if not cached:
                raise UserError(f"backbone: {kind} does not run ({reason}); keep other layers") from e
            warnings.warn(
                f"backbone: {kind} cannot generate, it runs with use_cache=False only ({reason}); protect a layer with "
                "attention to keep one",
                stacklevel=2,
            )


def _count_anew(model: nn.Module, path: str, depth: int, kept: Sequence[int]) -> str:
    """Find the setting that counts special first layers, such as `first_k_dense_replace`, or last ones, and correct it.

    Returns:
        What still differs; empty if nothing does.
    """
    config = text_config(model)
    for key, value in config.to_dict().items():
        counts = _is_int(value) and 0 < value <= depth and re.search(_COUNTS, key) and not re.search(_RULE, key)
        if counts and key != config.attribute_map.get("num_hidden_layers", "num_hidden_layers"):
            for left in {sum(i < value for i in kept), sum(i >= depth - value for i in kept)}:
                setattr(config, key, left)
                if not _difference(model, path, _fresh(model)):
                    return ""
            setattr(config, key, value)
    return _difference(model, path, _fresh(model))


_RULE = r"period|offset|interval|step|freq|pattern|every"
_COUNTS = r"first|dense|layer|blocks"
_NO_LAYERS = r"token_ids?$|^architectures$|label"
_INDICES = r"layer|idx|indices"


def _edits(config: Settings, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """New values for everything in a config that has an entry per layer, or names layers by index."""
    values = {key: value for key, value in config.items() if not re.search(_NO_LAYERS, key)}
    found = {key: _edited(key, value, depth, kept) for key, value in values.items()}
    edits = {key: value for key, value in found.items() if value is not None}
    if (step := config.get("decoder_sparse_step", 1)) > 1 and (dense := config.get("mlp_only_layers")) is not None:
        # A rule that counts, beside a list of exceptions from it, which can say all.
        edits["decoder_sparse_step"] = 1
        edits["mlp_only_layers"] = [j for j, i in enumerate(kept) if i in dense or (i + 1) % step]
    if "attention_types" in config and "attention_layers" in edits:  # GPT-Neo makes the second of the first
        edits["attention_types"] = [[edits["attention_layers"], 1]]
    return edits


def _edited(key: str, value: Any, depth: int, kept: Sequence[int]) -> Any:
    """What a setting becomes that says something of each layer, or names some; None if it does not."""
    if isinstance(value, Mapping):
        return _renumbered(value, depth, kept)
    if not isinstance(value, (list, tuple)) or not value:
        return None
    indices = _are_indices(value, depth)
    if len(value) == depth and not (indices and depth > 2):
        return type(value)(value[i] for i in kept)
    if indices and re.search(_INDICES, key):
        return type(value)(j for j, i in enumerate(kept) if i in value)
    return None


def _renumbered(table: Mapping[Any, Any], depth: int, kept: Sequence[int]) -> dict[int, Any] | None:
    """A table by layer for those that are kept; None if it is none."""
    if not table or not all(str(name).isdecimal() and int(name) < depth for name in table):
        return None
    by_index = {int(name): entry for name, entry in table.items()}
    return {j: by_index[i] for j, i in enumerate(kept) if i in by_index}


def _are_indices(value: Sequence[Any], depth: int) -> bool:
    return all(map(_is_int, value)) and sorted(set(value)) == list(value) and 0 <= value[0] <= value[-1] < depth


def _slice(model: nn.Module, fresh: nn.Module, path: str, depth: int, kept: Sequence[int]) -> None:
    """Cut the parts of removed layers out of weights that hold one for each layer, such as per-layer embeddings.

    They are known by their shape, which the shortened config makes smaller in one dimension, by these parts.
    """
    built = dict(fresh.named_parameters())
    for name, weight in list(model.named_parameters()):
        wanted = built[name].shape if name in built and not name.startswith(f"{path}.") else weight.shape
        dims = [d for d, (a, b) in enumerate(zip(weight.shape, wanted, strict=True)) if a != b]
        if len(dims) == 1 and weight.shape[d := dims[0]] * len(kept) == wanted[d] * depth:
            split = torch.unflatten(weight.detach(), d, (depth, -1))
            parts = split.index_select(d, torch.tensor(kept, device=weight.device))
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(parts.flatten(d, d + 1), weight.requires_grad))
            for key in vars(module).keys() & {"in_features", "out_features", "num_embeddings", "embedding_dim"}:
                setattr(module, key, getattr(fresh.get_submodule(owner), key))


def _fresh(model: nn.Module) -> Any:
    """The untrained network of a model's config on the meta device: no memory, no random numbers.

    If transformers refuses the config, why.
    """
    try:
        return construct_as(type(model), model.config.to_dict())  # type: ignore[union-attr, operator]
    except Exception as e:  # of any family's constructor
        return f"transformers refuses it ({type(e).__name__}: {first_line(e)})"


def _difference(model: nn.Module, path: str, fresh: Any) -> str:
    """What differs between a model's layers and those of a fresh one of its config; empty if nothing does.

    It compares the shapes of all weights, and for the layers the types of their modules and every plain setting in
    them, such as windows, rotary switches and scales.
    """
    if isinstance(fresh, str):
        return fresh
    remove_branches(fresh, removed_branches(model))
    shapes, built = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, fresh))
    for key in [*shapes, *built]:
        if shapes.get(key) != built.get(key):
            return f"{key} has the shape {shapes.get(key)}, the config makes it {built.get(key)}"
    layers: Any = zip(model.get_submodule(path).children(), fresh.get_submodule(path).children(), strict=True)
    for position, (ours, theirs) in enumerate(layers):
        have, would = described(ours), described(theirs)
        for key in [*have, *would]:
            if have.get(key) != would.get(key):
                return f"layer {position} has {key} = {have.get(key)}, the config makes it {would.get(key)}"
    return ""


def described(layer: nn.Module) -> dict[str, Any]:
    """Return the kinds of a layer's modules and their plain settings, but for the layer's position."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[f"the kind of '{name}'"] = type(module).__name__
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            if plain and not key.startswith("_") and key not in SLOTS | {"training"}:
                found[f"{name}.{key}".lstrip(".")] = value
    return found


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
