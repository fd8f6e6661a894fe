"""Depth surgery on a transformers decoder: corrects config and weights once layers are gone."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from tinyfusion_core.errors import UserError, first_line
from tinyfusion_core.protocols.blocks.branches import remove_branches, removed_branches
from tinyfusion_core.protocols.undisturbed import evaluating
from tinyfusion_llm.layers.building import construct_as
from tinyfusion_llm.layers.edits import edits, is_int
from tinyfusion_llm.layers.finding import SLOTS, close_ranks, num_fed, text_config
from tinyfusion_llm.layers.inputs import short_inputs
from tinyfusion_llm.layers.stacks import Stack, find_stacks
from tinyfusion_llm.pretrained.reading import transformers


def shorten(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
    """Correct what a network knows of its layers after pruning, see `corrected`.

    Args:
        model: the network.
        kept: the paths of its lists of layers, which are already short, and the indices of the kept layers of each.

    Raises:
        UserError: the config cannot express the remaining layers.
    """
    stacks = {stack: kept[stack.path] for stack in find_stacks(model)}
    depths = {stack: stack.depth(model) for stack in stacks}
    if problem := corrected(model, stacks):
        settings: dict[str, Any] = {}
        for stack in stacks:
            settings |= stack.config(model).to_dict()
        rules = [key for key, value in settings.items() if is_int(value) and re.search(_RULE, key)]
        named = f"; the rule is among {', '.join(rules)}" if rules else ""
        left = " and ".join(f"{list(indices)} of {depths[stack]}" for stack, indices in stacks.items())
        raise UserError(
            f"backbone: the config of a '{text_config(model).model_type}' cannot express the layers {left}: "
            f"{problem}{named}. Its kinds of layers follow from their positions; keep whole periods, or other layers"
        )
    close_ranks(model)


def corrected(model: nn.Module, kept: Mapping[Stack, Sequence[int]]) -> str:
    """Correct config, layers and packed weights once lists of layers are short.

    Lists in the config with one entry per layer are filtered, and lists and tables of layer indices renumbered. Weights
    outside of the layers that hold a part for each are sliced. Then the layers are compared with those that the config
    builds.

    Args:
        model: the network.
        kept: its lists of layers that are short, and the indices of the kept layers of each.

    Returns:
        What the config cannot express; empty if it can.
    """
    depths, fed, changed = {stack: stack.depth(model) for stack in kept}, num_fed(model), []
    for stack, indices in kept.items():
        if list(indices[:fed]) != list(range(fed)):
            return f"features of images are given to the layers before {fed}, which must stay"
        for position, layer in enumerate(model.get_submodule(stack.path).children()):
            for module in layer.modules():
                for name in SLOTS & vars(module).keys():
                    setattr(module, name, position)
        config = stack.config(model)
        listed = edits(config.to_dict(), depths[stack], indices) if stack.listed else {}
        changed += [(config, key, value) for key, value in {stack.key: len(indices), **listed}.items()]
    for config, key, value in changed:
        setattr(config, key, value)
    return _disagreement(model, kept, depths) and _count_anew(model, kept, depths)


def try_out(model: Any, kept: Mapping[str, Sequence[int]]) -> None:
    """Run a pruned network once, and once with a cache; warn if it runs without one only.

    Hybrid ones that have lost all attention cannot generate, nor can a T5 whose encoder has fewer layers than its
    decoder: `generate` counts those of the first. On the meta device nothing is run, see `limits`.

    Args:
        model: the network.
        kept: the paths of its lists of layers, and the indices of each one's layers in the whole network.

    Raises:
        UserError: it does not run: something in it still counts on other layers.
    """
    if next(model.parameters()).is_meta:
        return
    inputs, left = short_inputs(model), " and ".join(str(list(indices)) for indices in kept.values())
    kind = f"a '{text_config(model).model_type}' of the layers {left} alone"
    cached, remedy = partial(model, use_cache=True), "protect a layer with attention to keep one"
    if model.config.is_encoder_decoder:  # whose own cache may have another length than that of `generate`
        cached = partial(transformers().GenerationMixin.generate, model, max_new_tokens=1, decoder_start_token_id=0)
        remedy = "keep as many layers in the encoder as in the decoder"
    for run in (partial(model, use_cache=False), cached):
        try:
            with torch.random.fork_rng(), torch.no_grad(), evaluating(model):
                run(**inputs)
        except (LookupError, TypeError, ValueError) as e:
            reason = f"{type(e).__name__}: {e}"
            if run is not cached:
                raise UserError(f"backbone: {kind} does not run ({reason}); keep other layers") from e
            warnings.warn(
                f"backbone: {kind} cannot generate, it runs with use_cache=False only ({reason}); {remedy}",
                stacklevel=2,
            )


def _count_anew(model: nn.Module, kept: Mapping[Stack, Sequence[int]], depths: Mapping[Stack, int]) -> str:
    """Find the setting that counts special first layers, such as `first_k_dense_replace`, or last ones, and correct it.

    Returns:
        What still differs; empty if nothing does.
    """
    for stack, indices in kept.items():
        config, depth = stack.config(model), depths[stack]
        for key, value in config.to_dict().items():
            counts = is_int(value) and 0 < value <= depth and re.search(_COUNTS, key) and not re.search(_RULE, key)
            if counts and key != config.attribute_map.get(stack.key, stack.key):
                for left in {sum(i < value for i in indices), sum(i >= depth - value for i in indices)}:
                    setattr(config, key, left)
                    if not _disagreement(model, kept, depths):
                        return ""
                setattr(config, key, value)
    return _disagreement(model, kept, depths)


def _disagreement(model: nn.Module, kept: Mapping[Stack, Sequence[int]], depths: Mapping[Stack, int]) -> str:
    """Slice packed weights, and say what still differs from the network of the config; empty if nothing does."""
    fresh, paths = _fresh(model), [stack.path for stack in kept]
    if not isinstance(fresh, str):
        for stack, indices in kept.items():
            _slice(model, fresh, paths, depths[stack], indices)
    return _difference(model, paths, fresh)


_RULE = r"period|offset|interval|step|freq|pattern|every"
_COUNTS = r"first|dense|layer|blocks"


def _slice(model: nn.Module, fresh: nn.Module, paths: Sequence[str], depth: int, kept: Sequence[int]) -> None:
    """Cut the parts of removed layers out of weights that hold one for each layer, such as per-layer embeddings.

    They are known by their shape, which the shortened config makes smaller in one dimension, by these parts.
    """
    built, layers = dict(fresh.named_parameters()), tuple(f"{path}." for path in paths)
    for name, weight in list(model.named_parameters()):
        wanted = built[name].shape if name in built and not name.startswith(layers) else weight.shape
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


def _difference(model: nn.Module, paths: Sequence[str], fresh: Any) -> str:
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
    for path in paths:
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
