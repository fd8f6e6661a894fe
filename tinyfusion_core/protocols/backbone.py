"""The interface of a model family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ..errors import UserError
from ..parsing.settings import Settings
from ..parsing.weights import load_strict, read_weights
from ..runtime.files import save_tensors
from .data import Lookup

Batch = Mapping[str, Tensor]
"""Columns of the data by name, each (batch, ...)."""
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Stream:
    """One residual stream of a block: the tensor that a skipped block returns unchanged.

    Args:
        argument: name or position of the block's argument that carries the stream; `state.x` is the entry `x` of an
            argument `state` that is a mapping.
        output: index or key in the block's output; None if the output is the stream itself, or its first item.
    """

    argument: str | int = 0
    output: int | str | None = None

    @property
    def item(self) -> int | str:
        """Index or key of the stream in a block's output."""
        return 0 if self.output is None else self.output

    def of(self, output: Any) -> Tensor:
        """Return the stream, (batch, ...), from a block's output: a tensor, or a tuple or mapping that contains it."""
        found: Tensor = output if isinstance(output, Tensor) else output[self.item]
        return found


Streams = Sequence[Stream] | Mapping[str, Sequence[Stream]]
"""The residual streams of all blocks, or of every block list by its path."""

FIRST: Streams = (Stream(),)
"""One stream: the first argument of a block, and its output."""


def streams_of(streams: Streams, path: str) -> Sequence[Stream]:
    """Return the streams of the block at a path.

    Raises:
        UserError: none are declared for its block list.
    """
    if not isinstance(streams, Mapping):
        return streams
    name = path.rpartition(".")[0]
    if name not in streams:
        raise UserError(f"no streams are declared for the block list '{name}'; name them in 'streams'")
    return streams[name]


class Backbone(Settings, ABC):
    """A model family: how to build the network, and which of its blocks can be removed.

    Subclasses are frozen dataclasses; their fields are the options of the recipe. Import heavy libraries inside the
    methods.
    """

    #: Residual streams of a block, in no particular order; by block list where lists differ.
    streams: ClassVar[Streams] = FIRST
    #: Outputs of a block, by index or key, that are no stream and that nobody needs, such as attention weights.
    #: They are None while blocks are gated: a block then runs for some of the samples only.
    unneeded: ClassVar[Sequence[int | str]] = ()
    #: Block arguments that carry the batch, as name -> batch dimension. None: found by comparing two batch sizes.
    batched: ClassVar[Mapping[str, int] | None] = None
    #: For the model card of a saved folder: the library that reads it, and how.
    library: ClassVar[str] = "tinyfusion"
    loading: ClassVar[str] = 'import tinyfusion_core as tiny\n\nmodel = tiny.load_pretrained("path/to/this/folder")'

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the full-depth network with its pretrained weights, in eval mode.

        Raises:
            UserError: the checkpoint is missing, damaged or of another architecture.
        """

    @property
    def origin(self) -> str | None:
        """The file, folder or id that the sizes of the network come from, for messages; None: the recipe."""
        return None

    @abstractmethod
    def config(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Return JSON-able keywords from which `construct` rebuilds `model` as it is, pruned or not.

        Without a model: the keywords of the network that `build` would return. Reads no weights.
        """

    @classmethod
    @abstractmethod
    def construct(cls, config: Mapping[str, Any]) -> nn.Module:
        """Build the untrained network of a `config`. Must work under `torch.device("meta")`."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> Sequence[str]:
        """Return the paths of the blocks in execution order; `"blocks.*"` stands for all children of `blocks`."""

    @abstractmethod
    def after_prune(self, model: nn.Module, kept: Mapping[str, Sequence[int]]) -> None:
        """Repair in place what the module lists cannot express (depth in a config, layer indices).

        Args:
            model: the network, its lists already shortened.
            kept: for every block list, the indices of the children that were kept.
        """

    @abstractmethod
    def example(self, num_rows: int) -> dict[str, Tensor]:
        """Return a batch with the shapes of real data and arbitrary values, for probing and counting.

        Args:
            num_rows: batch size.

        Returns:
            Tensors by name, each (batch, ...).
        """

    def num_labels(self, model: nn.Module) -> int | None:
        """Return the number of class labels the network can generate for; None if it does not say.

        By default, `num_classes` of its configuration. Labels run from 0 to one below it.
        """
        return self.config(model).get("num_classes")

    def lookups(self, model: nn.Module) -> Mapping[str, Lookup]:
        """Return the tables in which the network looks up the values of columns of the data, by column.

        Data outside of them are refused. By default none, besides `num_labels` for the labels.
        """
        return {}

    def clients(self, model: nn.Module, student: nn.Module, kept: Sequence[int]) -> Mapping[str, str]:
        """Return the tools that take a decision or a student, and why what they make of it would be wrong.

        A reason by tool, empty where the result is right. `export` refuses a tool of the name of its form that has a
        reason. By default nothing is known of any.

        Args:
            model: the whole network, on any device, `meta` too.
            student: it without the other blocks.
            kept: indices of the kept blocks.
        """
        return {}

    @classmethod
    @abstractmethod
    def tiny(cls) -> Backbone:
        """Return an instance that runs in milliseconds, with random non-zero weights, for the conformance checks."""

    def block_paths(self, model: nn.Module) -> list[str]:
        """Return the paths of all blocks in execution order: `blocks`, expanded and checked.

        Raises:
            UserError: a path does not exist, is named twice or lies inside another.
        """
        try:
            return expand(model, self.blocks(model))
        except UserError as e:
            raise UserError(f"{owner(self)}: blocks: {e}") from None

    def source(self) -> dict[str, Any]:
        """Return the source of the weights for the record: `checkpoint`, `sha256`, `licence`; `weights`, if decoded."""
        return {}

    def save(self, model: nn.Module, folder: Path) -> list[str]:
        """Write a network to an empty folder and return the file names, which `load` reads and the core verifies.

        By default `model.safetensors`. A family that other software reads should write that software's files; if
        `config.json` is one of them, the core's record of the folder is `tinyfusion.json`.
        """
        save_tensors(folder / WEIGHTS, model.state_dict())
        return [WEIGHTS]

    def export(self, model: nn.Module, library: str, folder: Path) -> None:
        """Write a network as a folder of another library, `transformers` or `diffusers`.

        By default what `save` writes, if `library` can read it.

        Raises:
            UserError: that library has no such network.
        """
        if library != self.library:
            raise UserError(f"--to {library}: {type(self).__name__} has no form in {library}")
        self.save(model, folder)

    @classmethod
    def load(cls, folder: Path, config: Mapping[str, Any]) -> nn.Module:
        """Load a network that `save` wrote, as anybody would who has the files: saving compares the two bit by bit.

        By default in the dtypes in which it was saved.

        Args:
            folder: where the files are.
            config: what `config` returned for it.

        Raises:
            UserError: the weights do not fit such a network, none missing and none left over.
        """
        tensors = read_weights(folder / WEIGHTS)
        model = constructed(cls, config, str(folder))
        load_strict(model, tensors, folder / WEIGHTS)
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.data = tensor.data.to(tensors[name].dtype)
        return model


def constructed(backbone: Backbone | type[Backbone], config: Mapping[str, Any], whose: str) -> nn.Module:
    """Build the untrained network of a config that may come from anywhere.

    Args:
        backbone: the model family.
        config: what it builds the network from.
        whose: where the sizes come from, to begin a message with.

    Raises:
        UserError: the sizes make no network.
    """
    try:
        return backbone.construct(config)
    except UserError as e:
        raise e if whose in str(e) else UserError(f"{whose}: {e}") from e
    except Exception as e:  # of any library's constructor
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"
        raise UserError(f"{whose}: its sizes make no network ({reason}); correct them") from e


def owner(thing: object) -> str:
    """Name a backbone or loss, to begin a message with: by its class and module, or as its `called` says."""
    return getattr(thing, "called", f"{type(thing).__name__} (of {type(thing).__module__})")


def expand(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Replace every `"list.*"` by the paths of the list's children and check that each path leads to a module.

    Raises:
        UserError: a path does not exist, a block is named twice, or one lies inside another.
    """
    out: list[str] = []
    for path in paths:
        parent, star, rest = path.partition(".*")
        if rest:
            raise UserError(
                f"block path '{path}': '*' stands for all children of a list, and nothing follows it; "
                f"name '{parent}.*', or every block by itself"
            )
        try:
            module = model.get_submodule(parent)
        except AttributeError as e:
            raise UserError(
                f"block path '{path}': {type(model).__name__} has no module '{parent}' ({e}); name one that it has"
            ) from None
        out += [f"{parent}.{name}" for name, _ in module.named_children()] if star else [parent]
    if len(set(out)) != len(out):
        twice = sorted({p for p in out if out.count(p) > 1})
        raise UserError(f"block path(s) named twice: {', '.join(twice)}; name every block once")
    for path in out:
        if inside := [other for other in out if other.startswith(f"{path}.")]:
            raise UserError(f"block path '{inside[0]}' lies inside of '{path}'; name one of the two")
    return out


def block_lists(blocks: Sequence[str]) -> dict[str, list[int]]:
    """Group expanded block paths by block list: list path -> positions in `blocks`."""
    lists: dict[str, list[int]] = {}
    for i, path in enumerate(blocks):
        lists.setdefault(path.rpartition(".")[0], []).append(i)
    return lists


def list_lengths(blocks: Sequence[str]) -> dict[str, int]:
    """Count expanded block paths by block list: list path -> number."""
    return {name: len(members) for name, members in block_lists(blocks).items()}
