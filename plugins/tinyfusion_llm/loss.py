"""Next-token prediction, in chunks of the text: the logits of a whole batch are never in memory at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_core.protocols.loss import LossAdapter, has_values
from tinyfusion_core.runtime.files import NEUTRAL
from tinyfusion_core.runtime.seeding import Rng
from tinyfusion_llm.generation.continuing import continued, drawn, prompt_lengths
from tinyfusion_llm.images.columns import model_inputs
from tinyfusion_llm.layers.finding import find_layers

IGNORED = -100
"""The label of tokens that no loss counts."""


class Hidden(NamedTuple):
    """The prediction of a language model, before its head.

    Attributes:
        states: (batch, tokens, channels) final hidden states.
        head: the model's own map from hidden states (batch, tokens, channels) to logits (batch, tokens, vocabulary).
    """

    states: Tensor
    head: Callable[[Tensor], Tensor]


class MostProbable(NamedTuple):
    """The most probable next tokens of a language model.

    Attributes:
        log_p: (batch, tokens - 1, k) their log-probabilities at the temperature of the distance, in nats.
        tokens: (batch, tokens - 1, k) their ids.
    """

    log_p: Tensor
    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class NextToken(LossAdapter):
    """Cross-entropy of the next token in nats, averaged over a sample's counted tokens.

    The distance for distillation is the forward KL divergence KL(teacher || student) at a temperature, times its
    square, averaged over the same tokens.

    Args:
        temperature: temperature of both distributions in the distance.
        top_k: compare the teacher's most probable tokens and the rest as one, instead of the whole vocabulary: a lower
            bound of the divergence that keeps k numbers per token for the backward pass; null compares all.
        chunk: tokens whose logits are in memory at a time, over all samples of the batch.
        prompt_tokens: tokens of a text without a prompt that `tinyfusion generate-data` keeps, and continues.
        sampling_temperature: temperature of the continuation's tokens.
        top_p: they are drawn from the most probable ones that have this probability together.
    """

    temperature: float = 1.0
    top_k: int | None = None
    chunk: int = 1024
    prompt_tokens: int = field(default=16, metadata={NEUTRAL: 16})
    sampling_temperature: float = field(default=1.0, metadata={NEUTRAL: 1.0})
    top_p: float = field(default=1.0, metadata={NEUTRAL: 1.0})

    def __post_init__(self) -> None:
        require(self.temperature > 0, "loss.temperature", self.temperature, "a number above 0")
        require(self.top_k is None or self.top_k >= 1, "loss.top_k", self.top_k, "at least 1, or null")
        require(self.chunk >= 1, "loss.chunk", self.chunk, "at least 1 token")
        require(self.prompt_tokens >= 1, "loss.prompt_tokens", self.prompt_tokens, "at least 1 token")
        sampling = self.sampling_temperature
        require(sampling > 0, "loss.sampling_temperature", sampling, "a number above 0")
        require(0 < self.top_p <= 1, "loss.top_p", self.top_p, "a probability above 0")

    @override
    def sampling_options(self) -> frozenset[str]:
        return frozenset({"prompt_tokens", "sampling_temperature", "top_p"})

    @override
    def prepare(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        """Shift the labels; nothing here is random.

        Args:
            batch: `tokens` (batch, tokens) and `labels` (batch, tokens): the token itself where it counts, else -100;
                of separate documents also `positions` (batch, tokens), and with images what `ImageText` has of them.
            rng: not drawn from.

        Returns:
            `tokens` (batch, tokens), and `targets` (batch, tokens - 1): the label of the token that follows; and all
            others as they are.
        """
        others = {name: column for name, column in batch.items() if name != "labels"}
        return {**others, "targets": batch["labels"][:, 1:]}

    @override
    def prepare_clean(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        return self.prepare(batch, rng)

    @override
    def predict(self, model: nn.Module, inputs: Batch) -> Hidden:
        """Return the final hidden states, (batch, tokens, channels); the head is run for the last token only.

        Raises:
            UserError: a token id of the data is outside the model's vocabulary.
        """
        tokens = inputs["tokens"]
        if not model.training and has_values(tokens):  # once the teacher has been checked, the data are known to fit
            size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
            require(
                int(tokens.max()) < size, "data.tokenizer: a token", int(tokens.max()), f"below {size}, the model's"
            )
        if has_values(tokens):
            given = model_inputs(inputs, next(model.parameters()).dtype)
        else:  # Transformers looks at values to find a mask, so it is given; so do towers, and images are left out.
            size = tokens.shape[1]
            given = {"attention_mask": tokens.new_ones(len(tokens), 1, size, size, dtype=torch.bool)}
        if "positions" in inputs:  # where they begin anew, transformers keeps what is before out of sight
            given["position_ids"] = inputs["positions"]
        try:
            with _watched(model) as outputs, nullcontext() if has_values(tokens) else _OneProduct():
                model(input_ids=tokens, use_cache=False, logits_to_keep=1, **given)
        except (RuntimeError, ValueError, TypeError) as e:
            if has_values(tokens):
                raise
            raise NotImplementedError(f"{type(model).__name__}: {e}") from e
        # The outermost one that ends before the head returns last.
        below, output = next(found for found in reversed(outputs) if "last_hidden_state" in found[1])
        return Hidden(output[0], lambda states: _head(model, below, type(output), states))

    @override
    def loss(self, prediction: Hidden, inputs: Batch) -> Tensor:
        def piece(targets: Tensor, states: Tensor) -> Tensor:
            logits = prediction.head(states).float()
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)

        return self._mean(piece, inputs["targets"], prediction.states[:, :-1])

    @override
    def distance(self, student: Hidden, teacher: Hidden | MostProbable, inputs: Batch) -> Tensor:
        def piece(targets: Tensor, ours: Tensor, *theirs: Tensor) -> Tensor:
            found, chosen = self._log_p(student, ours), None
            with torch.no_grad():
                if isinstance(teacher, MostProbable):
                    target, chosen = theirs
                else:
                    target = self._log_p(teacher, *theirs)
                    if self.top_k is not None and self.top_k < target.shape[-1]:
                        target, chosen = target.topk(self.top_k)
            if chosen is not None:
                target, found = _with_rest(target), _with_rest(found.gather(-1, chosen.long()))
            kl = (target.exp() * (target - found)).sum(-1)
            return self.temperature**2 * kl.masked_fill(targets == IGNORED, 0)

        told = teacher if isinstance(teacher, MostProbable) else (teacher.states[:, :-1],)
        return self._mean(piece, inputs["targets"], student.states[:, :-1], *told)

    @override
    def keep(self, teacher: Hidden, inputs: Batch) -> dict[str, Tensor]:
        """Return the log-probabilities and ids of the `top_k` most probable tokens, both (batch, tokens - 1, k).

        Raises:
            UserError: `top_k` is null: the probabilities of a whole vocabulary would fill any disk.
        """
        if self.top_k is None:
            raise UserError(
                "loss.top_k: null compares the whole vocabulary, of which a cache keeps a part; set 64, say"
            )
        width, found = max(1, self.chunk // len(teacher.states)), []
        for states in torch.split(teacher.states[:, :-1], width, dim=1):
            log_p = self._log_p(teacher, states)
            found.append(log_p.topk(min(self.top_k, log_p.shape[-1])))
        log_p, tokens = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return {"log_p": log_p, "tokens": tokens.int()}

    @override
    def kept(self, columns: Batch, like: Hidden) -> MostProbable:
        return MostProbable(columns["log_p"], columns["tokens"])

    @override
    def generated(self, model: Any, batch: Batch, conditions: str, rng: Rng) -> dict[str, Tensor]:
        """Return the texts of a batch, continued by a network up to its end-of-text token or the end of the sample.

        The tokens that no loss counts at the beginning of a text are its prompt; where all count, `prompt_tokens` are.

        Args:
            model: the network, in eval mode.
            batch: `tokens` and `labels`, (batch, tokens); of separate documents also `positions`, (batch, tokens).
            conditions: not looked at.
            rng: streams "token <number>", for each of the new ones.

        Returns:
            The same tensors of the same shape; behind the end of a text no loss counts.

        Raises:
            UserError: there are other columns, as those of images.
        """
        tokens, labels = batch["tokens"], batch["labels"]
        kept = prompt_lengths(batch, labels != IGNORED, self.prompt_tokens)

        def draw(number: int, logits: Tensor) -> Tensor:
            u = rng.uniform(f"token {number}", len(logits)).to(logits.device)
            return drawn(logits / self.sampling_temperature, u, self.top_p)

        made, written = continued(model, tokens, kept, draw)
        places = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
        labels = labels.where(places < kept[:, None], made.masked_fill(~written, IGNORED))
        return {"tokens": made, "labels": labels, **({"positions": places} if "positions" in batch else {})}

    def _log_p(self, hidden: Hidden, states: Tensor) -> Tensor:
        """(B, t, vocabulary) log-probabilities of the next tokens at the temperature, of states (B, t, D)."""
        return (hidden.head(states).float() / self.temperature).log_softmax(-1)

    def _mean(self, piece: Callable[..., Tensor], targets: Tensor, *columns: Tensor) -> Tensor:
        """Average a quantity over the counted tokens; it is computed in chunks, and recomputed for the gradient.

        Args:
            piece: (B, t) targets and (B, t, ...) columns, one or several -> a number per token, 0 if not counted.
            targets: (B, T - 1).
            columns: (B, T - 1, ...) each.

        Returns:
            (B,); 0 for a sample without counted tokens.
        """
        num_rows = len(targets)
        width = max(1, self.chunk // num_rows)
        total = columns[0].new_zeros(num_rows, dtype=torch.float32)
        for first in range(0, targets.shape[1], width):
            some = slice(first, first + width)
            inner = [targets[:, some], *(x[:, some] for x in columns)]
            if torch.is_grad_enabled() and width < targets.shape[1]:  # one piece is held anyway
                # Nothing in a head is random, and no state needs saving for it.
                values = checkpoint(piece, *inner, use_reentrant=False, preserve_rng_state=False)
            else:
                values = piece(*inner)
            total = total + values.view(num_rows, -1).sum(1)
        return total / (targets != IGNORED).sum(1).clamp(min=1)


def _with_rest(log_p: Tensor) -> Tensor:
    """Append the remaining probability of a distribution to the log-probabilities of some of its outcomes."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([log_p, rest.log()], dim=-1)


def _below(model: nn.Module) -> list[nn.Module]:
    """The modules around the layers, one of which the model calls before its head."""
    *parents, _ = find_layers(model).split(".")
    return [model.get_submodule(".".join(parents[: i + 1])) for i in range(len(parents))]


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[nn.Module, Any]]]:
    """The outputs of these modules, in the order in which they return."""
    outputs: list[tuple[nn.Module, Any]] = []
    with ExitStack() as hooks:
        for module in _below(model):
            handle = module.register_forward_hook(lambda m, _args, output: outputs.append((m, output)))
            hooks.callback(handle.remove)
        yield outputs


def _head(model: nn.Module, below: nn.Module, kind: type[Any], states: Tensor) -> Tensor:
    """Run the model with `below` returning these states: its own head, with all caps and scales it applies."""
    before = below.__dict__.get("forward")
    below.forward = lambda *args, **kwargs: kind(last_hidden_state=states)
    try:
        tokens = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        if before is None:
            del below.__dict__["forward"]
        else:
            below.__dict__["forward"] = before
    return logits


class _OneProduct(TorchFunctionMode):
    """Where there are no values, products of rows with their experts' weights as a product with one expert's.

    It has as many operations and saves as much. Those of the experts are not counted, nor made in every dtype.
    """

    @override
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "_grouped_mm":
            rows, weights = args  # (rows, channels), (experts, channels, outputs)
            return rows @ weights[0]
        return func(*args, **(kwargs or {}))
