"""Where the layers of a transformers decoder are, and what is inside of them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from tinyfusion_core.errors import UserError
from tinyfusion_core.protocols.blocks.branches import Branch, Removed, removed_branches


def find_layers(model: nn.Module) -> str:
    """Return the path of the decoder's `ModuleList` of `num_hidden_layers` blocks.

    Raises:
        UserError: there is none, or more than one.
    """
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    if not next(decoder.children(), None):  # a head of that name
        decoder = model.base_model
    depth = text_config(model).num_hidden_layers
    start = path_of(model, decoder)
    lists = [
        f"{start}.{name}".strip(".")
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    # A layer may hold lists too, of experts say: those inside of another list are not meant.
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    # And a decoder may hold towers for images or sounds, deeper inside.
    outer = [path for path in outer if path.count(".") == min(other.count(".") for other in outer)]
    if len(outer) != 1:
        found = ", ".join(outer) or "none"
        raise UserError(
            f"backbone: expected one list of {depth} layers in {type(model).__name__} (its num_hidden_layers), "
            f"found: {found}; depth pruning needs one ModuleList of blocks, each with weights of its own"
        )
    return outer[0]


def around_layers(model: Any) -> list[nn.Module]:
    """Return the modules around the layers, one of which the model calls before its head; the outermost first.

    Of an encoder-decoder those around the decoder's layers.
    """
    if model.config.is_encoder_decoder:
        parents = path_of(model, model.get_decoder()).split(".")
    else:
        *parents, _ = find_layers(model).split(".")
    return [model.get_submodule(".".join(parents[: i + 1])) for i in range(len(parents))]


def vocabulary_of(model: Any) -> int:
    """Return how many tokens a model knows: those that it reads, of an encoder-decoder those that it writes.

    Raises:
        UserError: it writes no tokens, or several at a time.
    """
    if not model.config.is_encoder_decoder:
        return int(model.get_input_embeddings().num_embeddings)
    if (head := model.get_output_embeddings()) is None:
        raise UserError(
            f"backbone.model: the decoder of a '{model.config.model_type}' has no head for tokens; expected a network "
            "that writes text"
        )
    return int(head.weight.shape[0])


def path_of(model: nn.Module, inside: nn.Module) -> str:
    """Return the path of a module of a network."""
    found: str = next(name for name, module in model.named_modules() if module is inside)
    return found


def text_config(model: nn.Module) -> Any:
    """Return the part of a model's config that its decoder was built from."""
    return model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def num_fed(model: nn.Module) -> int:
    """Return how many of the first layers are given features from inside of a tower for images, by their positions.

    DeepStack (Meng et al., 2024) adds them to what a layer returns. Configs list the tower's layers that they come
    from, or pairs of one of these and a layer of the decoder.
    """
    known = model.config.to_dict()  # type: ignore[union-attr, operator]
    for part in (known, *(value for value in known.values() if isinstance(value, dict))):
        for key, sources in part.items():
            if str(key).startswith("deepstack") and isinstance(sources, (list, tuple)):
                pairs = [source for source in sources if isinstance(source, (list, tuple))]
                return max((into + 1 for _, into in pairs), default=len(sources))
    return 0


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


SLOTS = {"layer_idx", "layer_id", "layer_number"}
"""Names under which modules keep their slot in the key-value cache."""
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
            for name in SLOTS & vars(inner).keys():
                setattr(inner, name, slot)
