"""Depth surgery on a transformers decoder: finds its layers, and corrects the config after pruning."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.blocks.branches import Branch, Removed, remove_branches, removed_branches
from tinyfusion_core.protocols.undisturbed import evaluating
from tinyfusion_llm.pretrained import as_json, transformers

Settings = Mapping[str, Any]


def find_layers(model: nn.Module) -> str:
    """Return the path of the decoder's `ModuleList` of `num_hidden_layers` blocks.

    Raises:
        UserError: there is none, or more than one.
    """
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    depth = text_config(model).num_hidden_layers
    start = next(name for name, module in model.named_modules() if module is decoder)
    lists = [
        f"{start}.{name}".strip(".")
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    # A layer may hold lists too, of experts say: those inside of another list are not meant.
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        found = ", ".join(outer) or "none"
        raise UserError(
            f"backbone: expected one list of {depth} layers in {type(model).__name__} (its num_hidden_layers), "
            f"found: {found}; depth pruning needs a decoder whose blocks are one ModuleList"
        )
    return outer[0]


def text_config(model: nn.Module) -> Any:
    """Return the part of a model's config that its decoder was built from."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def shorten(model: nn.Module, path: str, kept: Sequence[int]) -> None:
    """Correct config and layers after pruning; the list itself is already short.

    Lists in the config with one entry per layer are filtered, and lists of layer indices renumbered. Then the config
    is compared with the layers, see `verify`.

    Args:
        model: the network.
        path: path of the list of layers.
        kept: indices of the kept layers.

    Raises:
        UserError: the config cannot express the remaining layers.
    """
    layers, config = model.get_submodule(path), text_config(model)
    depth = config.num_hidden_layers
    for position, layer in enumerate(layers.children()):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the slot in the key-value cache
                module.layer_idx = position  # type: ignore[assignment]
    edits = _edits(config.to_dict(), depth, kept)
    config.num_hidden_layers = len(kept)
    for key, value in edits.items():
        setattr(config, key, value)
    problem = verify(model, path) and _count_anew(model, path, depth, kept)
    if problem:
        rules = [key for key, value in config.to_dict().items() if _is_int(value) and re.search(_RULE, key)]
        named = f"; the rule is among {', '.join(rules)}" if rules else ""
        raise UserError(
            f"backbone: the config of a '{config.model_type}' cannot express the layers {list(kept)} of {depth}: "
            f"{problem}{named}. Its kinds of layers follow from their positions; keep whole periods, or other layers"
        )
    close_ranks(model)


def find_branches(model: nn.Module) -> dict[str, Branch]:
    """Return the attention and the feed-forward network of a layer, by the names that transformers gives them.

    None where a norm comes behind them (Gemma 2, OLMo 2, GLM 4), which would hide from gradients how much they matter,
    and where one of the two is no module of its own (OPT).
    """
    names = {name for layer in model.get_submodule(find_layers(model)).children() for name, _ in layer.named_children()}
    if any(re.match(r"post_(feedforward|mlp)_\w*norm", name) for name in names):
        return {}
    found = {
        "attention": next((Branch(name, outputs=2) for name in _ATTENTION if name in names), None),
        "mlp": next((Branch(name) for name in _MLP if name in names), None),
    }
    known = {name: branch for name, branch in found.items() if branch is not None}
    return known if known.keys() == found.keys() else {}


_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")


def close_ranks(model: nn.Module) -> None:
    """Number the slots in the key-value cache by the layers that still have attention: its length is that of the first.

    Args:
        model: the network.

    Raises:
        UserError: slots are not alike, so that they cannot move.
    """
    if not (removed := removed_branches(model)):
        return
    attention = find_branches(model).get("attention")
    if attention is None or attention not in removed.values():
        return
    config = text_config(model)
    if len(kinds := set(getattr(config, "layer_types", None) or ())) > 1:
        raise UserError(
            f"backbone.units: the layers of a '{config.model_type}' are {' and '.join(sorted(kinds))}; "
            "their cache counts on where each stands. Search [mlp] or whole layers"
        )
    layers = model.get_submodule(find_layers(model)).children()
    having = [layer.get_submodule(attention.path) for layer in layers]
    for slot, module in enumerate(module for module in having if not isinstance(module, Removed)):
        for inner in module.modules():
            if hasattr(inner, "layer_idx"):
                inner.layer_idx = slot  # type: ignore[assignment]


def try_out(model: nn.Module, kept: Sequence[int]) -> None:
    """Run a pruned network once, on any device, and once with a cache; warn if it runs without one only.

    Hybrid ones that have lost all attention cannot generate.

    Args:
        model: the network.
        kept: indices of its layers in the whole one.

    Raises:
        UserError: it does not run: something in it still counts on other layers.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
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
        except (NotImplementedError, RuntimeError):
            return  # an operation that the meta device does not have


def _count_anew(model: nn.Module, path: str, depth: int, kept: Sequence[int]) -> str:
    """Find the setting that counts the special first layers, such as `first_k_dense_replace`, and correct it.

    Returns:
        What still differs; empty if nothing does.
    """
    config = text_config(model)
    for key, value in config.to_dict().items():
        counts = _is_int(value) and 0 < value <= depth and re.search(_COUNTS, key) and not re.search(_RULE, key)
        if counts and key != config.attribute_map.get("num_hidden_layers", "num_hidden_layers"):
            setattr(config, key, sum(i < value for i in kept))
            if not verify(model, path):
                return ""
            setattr(config, key, value)
    return verify(model, path)


_RULE = r"period|offset|interval|step|freq|pattern|every"
_COUNTS = r"first|dense|layer"
_NO_LAYERS = r"token_ids?$|^architectures$"
_INDICES = r"layer|idx|indices"


def _edits(config: Settings, depth: int, kept: Sequence[int]) -> dict[str, Any]:
    """New values for everything in a config that has an entry per layer, or names layers by index."""
    edits: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(value, (list, tuple)) or not value or re.search(_NO_LAYERS, key):
            continue
        indices = all(map(_is_int, value)) and sorted(set(value)) == list(value) and 0 <= value[0] <= value[-1] < depth
        if len(value) == depth and not (indices and depth > 2):
            edits[key] = type(value)(value[i] for i in kept)
        elif indices and re.search(_INDICES, key):
            edits[key] = type(value)(j for j, i in enumerate(kept) if i in value)
    return edits


def verify(model: nn.Module, path: str) -> str:
    """Return what differs between a model's layers and those that its config builds; empty if nothing does.

    Built on the meta device: no memory, no random numbers. It compares the shapes of all weights, and for the
    layers the types of their modules and every plain setting in them, such as windows, rotary switches and scales.
    """
    try:
        fresh = construct(model.config.to_dict())  # type: ignore[union-attr, operator]
    except (ValueError, IndexError, KeyError) as e:
        return f"transformers refuses it ({e})"
    remove_branches(fresh, removed_branches(model))
    shapes, built = ({name: tuple(t.shape) for name, t in m.state_dict().items()} for m in (model, fresh))
    for key in [*shapes, *built]:
        if shapes.get(key) != built.get(key):
            return f"{key} has the shape {shapes.get(key)}, the config makes it {built.get(key)}"
    layers: Any = zip(model.get_submodule(path).children(), fresh.get_submodule(path).children(), strict=True)
    for position, described in enumerate(map(_described, pair) for pair in layers):
        have, would = described
        for key in [*have, *would]:
            if have.get(key) != would.get(key):
                return f"layer {position} has {key} = {have.get(key)}, the config makes it {would.get(key)}"
    return ""


def construct(config: Settings, device: str = "meta") -> Any:
    """Build the untrained network of a config given as a dict."""
    from transformers import AutoModelForCausalLM

    made = config_of(config)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(made, dtype=made.dtype)  # type: ignore[no-untyped-call]


def randomised(config: Settings, rng: torch.Generator) -> Any:
    """Build the network of a config given as a dict, all weights random, none zero."""
    model = construct(config).to_empty(device="cpu")
    fresh = construct(config, "cpu")  # for the tables that are no parameters
    model.load_state_dict(fresh.state_dict())
    for (_, buffer), (_, made) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
        buffer.copy_(made)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2, generator=rng)
    return model


def as_plain(model: Any, dtype: torch.dtype) -> Any:
    """Return a model whose weights were encoded in its files as a plain one, which can be trained and saved."""
    plain = construct(as_json(model.config))
    state = model.state_dict()
    whole = model._get_dtype_plan(dtype)  # some stay in float32
    for key, tensor in state.items():
        if tensor.is_floating_point():
            state[key] = tensor.to(torch.float32 if any(part in key for part in whole) else dtype)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    for name, buffer in model.named_buffers():
        if name not in state:  # made by the constructor
            owner, _, leaf = name.rpartition(".")
            plain.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    plain.config.dtype = dtype
    plain.generation_config = model.generation_config
    return plain


def config_of(settings: Settings) -> Any:
    """Return the transformers config of its settings, in which infinity may be written as transformers does in JSON."""
    found = {key: _numbers(value) for key, value in settings.items() if key != "transformers_version"}
    return transformers().AutoConfig.for_model(**found)


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return float(value["__float__"]) if "__float__" in value else {k: _numbers(v) for k, v in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def _described(layer: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        found[f"the kind of '{name}'"] = type(module).__name__
        for key, value in vars(module).items():
            plain = value is None or isinstance(value, (bool, int, float, str))
            if plain and not key.startswith("_") and key not in ("training", "layer_idx"):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
