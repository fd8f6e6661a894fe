"""Configs and weights of pretrained models of transformers, with error messages that say what to do."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tinyfusion_core.errors import MissingFileError, UserError, first_line, need
from tinyfusion_core.parsing.records import beside, check_folder
from tinyfusion_core.parsing.weights import open_tensors
from tinyfusion_core.pipeline.planning.amounts import gigabytes


def transformers(key: str = "backbone: CausalLM") -> Any:
    """Return the library.

    Args:
        key: what needs it, to begin the message with.

    Raises:
        UserError: it is not installed.
    """
    return need("transformers", "tinyfusion[llm]", key)


def check_path(name: str, key: str) -> None:
    """Check that a name is no path to nothing, which would be looked for on the hub, several times.

    It is a path if it begins with `.`, `~` or `/`, has more than one `/`, or lies in a folder that there is.

    Args:
        name: folder or hub id.
        key: the setting that names it, to begin the message with.

    Raises:
        MissingFileError: there is no such folder.
    """
    path = Path(name)
    nested = "/" in name and path.parent.is_dir()
    if (nested or name.startswith((".", "~", "/")) or name.count("/") > 1) and not path.is_dir():
        raise MissingFileError(f"{key}: no folder '{name}'{beside(path)}")


class explained:  # noqa: N801  # a context, like those of contextlib
    """Turn errors of transformers about a model into messages that say what to do."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __enter__(self) -> None:
        check_path(self.model, "backbone.model")
        folder = Path(self.model)
        if folder.is_dir():
            check_folder(folder)
        if (folder / "adapter_config.json").is_file():
            raise UserError(
                f"backbone.model: '{self.model}' is an adapter of peft; merge it into its model first: "
                "`PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(folder)`"
            )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, UserError) or not isinstance(error, Exception):
            return
        local = Path(self.model).is_dir()
        if isinstance(error, OSError) and not local:
            raise MissingFileError(
                f"backbone.model: '{self.model}' is no folder, and the Hugging Face hub does not give it "
                f"({first_line(error)}). Give a folder, or an id that you have access to (`hf auth login`)"
            ) from None
        if isinstance(error, SafetensorError):  # which names no file
            for path in sorted(Path(self.model).glob("*.safetensors")):
                open_tensors(path)
        expected = "expected config.json and model.safetensors as save_pretrained of transformers writes them"
        raise UserError(f"backbone.model: '{self.model}' cannot be read ({first_line(error)}); {expected}") from None


Autos = tuple[str, ...]
"""Names of those classes of transformers that load one kind of network, such as AutoModelForCausalLM."""


def check_kind(config: Any, name: str, autos: Autos, kind: str) -> None:
    """Check that a config is that of one kind of network, and that it names no code to fetch and run.

    Args:
        config: of transformers.
        name: folder or hub id, for messages.
        autos: the classes of transformers that load such networks.
        kind: what such a network is called, for messages.

    Raises:
        UserError: it is not, or does.
    """
    if kernels := list(_kernels(config)):
        raise UserError(
            f"backbone.model: the config of '{name}' names a kernel of the hub, '{kernels[0]}', whose code would be "
            "run; remove it from config.json"
        )
    if auto_class(config, autos) is None:
        neither = (
            f"neither {' nor '.join(autos)} of transformers has"
            if len(autos) > 1
            else f"{autos[0]} of transformers does not have"
        )
        raise UserError(f"backbone.model: '{name}' ({config.model_type}) is not {kind}; {neither} one for it")


def auto_class(config: Any, autos: Autos) -> Any:
    """Return the class of transformers that loads the network of a config.

    Where several do, as for Llama 4, it is the one of the network that `architectures` names; else the first.
    None if there is none.

    Args:
        config: of transformers.
        autos: the names of the classes to choose from.
    """
    known = [getattr(transformers(), name) for name in autos]
    made = {auto: auto._model_mapping[type(config)].__name__ for auto in known if type(config) in auto._model_mapping}
    named = (auto for auto, name in made.items() if name in (config.architectures or ()))
    return next(named, next(iter(made), None))


def _kernels(config: Any) -> Iterator[str]:
    """The attention and other implementations in a config, and in those inside of it, that lie in a repository."""
    for key, value in vars(config).items():
        if hasattr(value, "model_type"):
            yield from _kernels(value)
        elif "implementation" in key:
            given = value.values() if isinstance(value, Mapping) else [value]
            yield from (name for name in given if isinstance(name, str) and "/" in name)


def ask_to_dequantise(config: Any, name: str) -> None:
    """Make transformers dequantise the weights of a model while it reads them, if they are quantised.

    Quantised weights can be neither trained nor saved without a layer.

    Args:
        config: the model's config; it is changed.
        name: folder or hub id, for messages.

    Raises:
        UserError: they are, and transformers cannot do that.
        ImportError: it needs a further package for it.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoQuantizationConfig

    if (given := getattr(config, "quantization_config", None)) is None:
        return
    method = given.get("quant_method")
    kind = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    if kind is None or "dequantize" not in inspect.signature(kind).parameters:
        raise UserError(
            f"backbone.model: the weights in '{name}' are quantised ({method or 'by a method that is not named'}) and "
            "cannot be dequantised while they are read; give the model that they were made from, or load them with "
            "transformers, call its `dequantize()`, and give the folder that `save_pretrained` writes"
        )
    config.quantization_config = {**given, "dequantize": True}
    AutoQuantizationConfig.from_dict(config.quantization_config)


def encoding_of(config: Any, dtype: str) -> str:
    """Say how the weights of a model are quantised, and to which dtype they are dequantised; empty if they are not.

    Args:
        config: the model's config.
        dtype: the dtype asked for; `auto` is the config's.
    """
    if (given := getattr(config, "quantization_config", None)) is None:
        return ""
    return f"{given['quant_method']}, dequantised to {str(config.dtype if dtype == 'auto' else dtype).split('.')[-1]}"


def check_keys(model: Any, loading: Mapping[str, Any], name: str, strict: bool) -> None:
    """Check that weights fit their config: none is missing, has another shape, or is a part of a module without such.

    Args:
        model: the model that was loaded.
        loading: what `from_pretrained` tells of the keys, by kind.
        name: folder or hub id, for messages.
        strict: refuse whatever else is left over too, such as further heads.

    Raises:
        UserError: they do not; names the first keys, of other shapes with both.
    """
    leaves = {path for path, module in model.named_modules() if next(module.children(), None) is None}
    further = [k for k in loading["unexpected_keys"] if strict or k.rpartition(".")[0] in leaves]
    keys = [[k] if isinstance(k, str) else k for k in (*loading["missing_keys"], *loading["mismatched_keys"], *further)]
    if keys:
        named = ", ".join(sorted(" ".join(map(str, key)) for key in keys)[:4])
        raise UserError(f"backbone.model: the weights in {name} do not fit its config: {named}")


_OF_A_FILE = ("_name_or_path", "transformers_version", "quantization_config")


def as_json(config: Any) -> dict[str, Any]:
    """Return a transformers config as JSON, without what depends on location, version or the weights' encoding."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in found.items() if key not in _OF_A_FILE}


def vocabulary_size(config: Mapping[str, Any]) -> int:
    """Return the number of tokens; 100 if a config does not say."""
    sizes = [config, config.get("text_config") or {}]
    return int(next((part["vocab_size"] for part in sizes if "vocab_size" in part), 100))


def tell_size(model: Any, name: str, encoding: str) -> None:
    """Warn how large the weights of a model are, whose files hold them encoded.

    Args:
        model: the model, dequantised.
        name: its folder or hub id.
        encoding: what its files hold.
    """
    files = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
    size = gigabytes(model.num_parameters() * model.dtype.itemsize) + (f" from {gigabytes(files)}" if files else "")
    warnings.warn(
        f"backbone.model: the weights in {name} are {encoding}: {size}; students are saved in that dtype",
        stacklevel=4,
    )
