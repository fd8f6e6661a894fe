"""What other tools make of a decision: what they derive from a layer's position has to be what the layer is.

Pruning moves layers to other positions. Whether a layer sees a window or everything, has rotary embeddings or not, the
student's config says in lists with an entry for each layer; other tools keep lists of the whole model, or count.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from tinyfusion_llm.layers.finding import find_layers, text_config
from tinyfusion_llm.pretrained.reading import as_json

WINDOW, WHOLE = "sliding_attention", "full_attention"
MERGEKIT = (
    {"afmoe", "apertus", "arcee", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "glm4", "glm4_moe"}
    | {"gpt2", "gpt_bigcode", "granite", "granitemoehybrid", "lfm2", "llama", "mamba", "mistral", "mixtral", "olmo2"}
    | {"phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm", "starcoder2"}
)
"""Types of models that mergekit 0.1.5 has a definition for; it guesses the others and gets the depth wrong."""
REPEATED: Mapping[str, Mapping[str, Sequence[Any]]] = {
    "afmoe": {"layer_types": [WINDOW] * 3 + [WHOLE]},
    "cohere2": {"layer_types": [WINDOW] * 3 + [WHOLE]},
    "exaone4": {"layer_types": [WINDOW] * 3 + [WHOLE]},
    "gemma2": {"layer_types": [WINDOW, WHOLE]},
    "gemma3_text": {"layer_types": [WINDOW] * 5 + [WHOLE]},
    "gpt_oss": {"layer_types": [WINDOW, WHOLE]},
    "llama4_text": {"layer_types": ["chunked_attention"] * 3 + [WHOLE], "no_rope_layers": [1, 1, 1, 0]},
    "olmo3": {"layer_types": [WINDOW] * 3 + [WHOLE]},
    "qwen3_next": {"layer_types": ["linear_attention"] * 3 + [WHOLE]},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
}
"""What llama.cpp takes its layers for, by type of model and key of the config: repeated from the first layer on."""
COUNTED = {"first_k_dense_replace", "num_dense_layers"}
"""Numbers of dense layers before those of experts, which llama.cpp's converter writes to a GGUF file."""
WRITTEN: Mapping[str, Sequence[str]] = {"lfm2": ["layer_types", "full_attn_idxs"]}
"""Lists that llama.cpp's converter writes to a GGUF file entry by entry, by type of model."""

CLIENTS = ("mergekit", "peft", "llama.cpp", "gguf")
"""Tools that take a decision or a student."""

Settings = Mapping[str, Any]


def clients(model: nn.Module, student: nn.Module, kept: Sequence[int]) -> dict[str, str]:
    """Return the tools that take a decision or a student, and why the result would be wrong; empty if it is right.

    Args:
        model: the whole network, on any device.
        student: it without the other layers.
        kept: indices of the kept layers.
    """
    if text_config(model) is not model.config:
        return dict.fromkeys(CLIENTS, "not tried on a decoder beside which there are other networks, as for images")
    before, after = (_settings(network) for network in (model, student))
    depth = len(student.get_submodule(find_layers(student)))  # type: ignore[arg-type]
    lists = _lists(before, after, len(model.get_submodule(find_layers(model))), kept)  # type: ignore[arg-type]
    counts = [key for key, value in after.items() if before.get(key) != value and key not in lists]
    gguf = _llama_cpp(str(before["model_type"]), lists) or _unexplained(student, before, lists)
    reasons = (
        _mergekit(str(before["model_type"]), before, [*lists, *counts]),
        _peft(model, before, lists, depth),
        _pruned_file(str(before["model_type"]), lists, counts) or gguf,
        gguf,
    )
    return dict(zip(CLIENTS, reasons, strict=True))


def _settings(model: nn.Module) -> Settings:
    """The config of the decoder, but for its depth, its dtype, and the names of classes."""
    config = text_config(model)
    left_out = {"num_hidden_layers", config.attribute_map.get("num_hidden_layers"), "dtype", "architectures"}
    return {key: value for key, value in as_json(config).items() if key not in left_out}


def _lists(before: Settings, after: Settings, depth: int, kept: Sequence[int]) -> dict[str, list[Any]]:
    """What the student's config says of each layer, by key: entries of a list, or whether a list names the layer."""
    found: dict[str, list[Any]] = {}
    for key, whole in before.items():
        left = after.get(key)
        if not isinstance(whole, list) or not isinstance(left, list):
            continue
        if len(whole) == depth and left == [whole[i] for i in kept]:
            found[key] = left
        elif left == [j for j, i in enumerate(kept) if i in whole] and re.search("layer|idx|indices", key):
            found[key] = [j in left for j in range(len(kept))]
    return found


def _mergekit(kind: str, before: Settings, changed: Sequence[str]) -> str:
    if kind not in MERGEKIT:
        return f"it has no definition of a '{kind}', and does not find its depth"
    if changed:
        return f"it corrects the number of layers in the config and leaves {changed[0]} as it is"
    return ""


def _peft(model: nn.Module, before: Settings, lists: Mapping[str, Sequence[Any]], depth: int) -> str:
    path = find_layers(model)
    if not re.fullmatch(r"(model\.)*(layers|h|encoder\.layer)", path):
        return f"it does not find the layers at {path}"
    for key in _read_by_position(model):
        if key in lists and list(before[key][:depth]) != list(lists[key]):
            return f"it moves the layers, and the model goes on reading {key} of the whole config by position"
    return ""


def _read_by_position(model: nn.Module) -> Iterator[str]:
    """Keys of the config that the decoder itself reads for each layer while it runs; the layers keep what they read."""
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    yield from re.findall(r"config\.(\w+)\[", inspect.getsource(inspect.unwrap(type(decoder).forward)))


def _llama_cpp(kind: str, lists: Mapping[str, Sequence[Any]]) -> str:
    for key, found in lists.items():
        if key in WRITTEN.get(kind, ()):
            continue
        cycle = REPEATED.get(kind, {}).get(key)
        if cycle is None:
            if any(value != found[0] for value in found):
                return f"it is not known to tell the layers of a '{kind}' apart by {key}"
            continue
        for position, value in enumerate(found):
            if value != (expected := cycle[position % len(cycle)]):
                return (
                    f"it takes layer {position} for {_said(key, expected)} and it is {_said(key, value)}: it counts "
                    f"in periods of {len(cycle)}, {', '.join(map(str, cycle))} (see constraints.period)"
                )
    return ""


def _unexplained(student: nn.Module, before: Settings, lists: Mapping[str, Sequence[Any]]) -> str:
    """Why layers of several kinds are not known to be told apart: no list and no count of the config does it."""
    layers = student.get_submodule(find_layers(student)).children()
    kinds = {tuple((name, tuple(t.shape)) for name, t in layer.state_dict().items()) for layer in layers}
    told = any(value != found[0] for found in lists.values() for value in found) or not COUNTED.isdisjoint(before)
    if len(kinds) < 2 or told:
        return ""
    return f"it is not known to tell the layers of a '{before['model_type']}' apart, which are of {len(kinds)} kinds"


def _pruned_file(kind: str, lists: Mapping[str, Sequence[Any]], counts: Sequence[str]) -> str:
    """Why a GGUF file of the whole model that loses layers is wrong: it keeps what it says of them."""
    for key in chain(counts, (key for key in lists if key in WRITTEN.get(kind, ()))):
        return f"it leaves what the file says of the whole model's {key}; convert the student instead"
    return ""


def _said(key: str, value: Any) -> str:
    return str(value) if isinstance(value, str) else f"{key} {value}"
