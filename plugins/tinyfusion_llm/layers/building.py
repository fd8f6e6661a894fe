"""Networks of transformers from their configs: untrained, random, or with weights that were encoded otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tinyfusion_llm.pretrained.reading import Autos, as_json, auto_class, transformers

Settings = Mapping[str, Any]


def construct(config: Settings, autos: Autos, device: str = "meta") -> Any:
    """Build the untrained network of a config given as a dict, by one of some auto classes."""
    made = config_of(config)
    with torch.device(device):
        return auto_class(made, autos).from_config(made, dtype=made.dtype)


def class_of(config: Settings, autos: Autos) -> Any:
    """Return the class of the network of a config given as a dict, by one of some auto classes."""
    made = config_of(config)
    return auto_class(made, autos)._model_mapping[type(made)]


def construct_as(kind: type[Any], config: Settings) -> Any:
    """Build the untrained network of a class and of a config given as a dict, on the meta device."""
    made = config_of(config)
    with torch.device("meta"):
        return kind._from_config(made, dtype=made.dtype)


def randomised(config: Settings, autos: Autos, rng: torch.Generator) -> Any:
    """Build the network of a config given as a dict, all weights random, none zero."""
    model = construct(config, autos).to_empty(device="cpu")
    model.tie_weights()  # which moving has untied
    fresh = construct(config, autos, "cpu")  # for the tables that are no parameters
    model.load_state_dict(fresh.state_dict())
    for (_, buffer), (_, made) in zip(model.named_buffers(), fresh.named_buffers(), strict=True):
        buffer.copy_(made)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2, generator=rng)
    return model


def as_plain(model: Any, dtype: torch.dtype) -> Any:
    """Return a model whose weights were encoded in its files as a plain one, which can be trained and saved."""
    plain = construct_as(type(model), as_json(model.config))
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
    return steady(transformers().AutoConfig.for_model(**found))


def steady(config: Any) -> Any:
    """Turn off what a network does to its layers by itself while it runs, by their positions or at random.

    RWKV changes weights for float16; others skip layers in training (LayerDrop, arXiv:1909.11556), unknown to gates.
    """
    if hasattr(config, "rescale_every"):
        config.rescale_every = 0
    for key, value in vars(config).items():
        if key.endswith("layerdrop"):
            setattr(config, key, 0.0)
        elif hasattr(value, "model_type"):
            steady(value)
    return config


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return float(value["__float__"]) if "__float__" in value else {k: _numbers(v) for k, v in value.items()}
    return [_numbers(item) for item in value] if isinstance(value, list) else value
