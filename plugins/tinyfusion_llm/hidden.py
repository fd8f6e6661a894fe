"""What a language model says of tokens: hidden states before its head, and losses that run the head in chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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
from tinyfusion_llm.layers.finding import around_layers
from tinyfusion_llm.pretrained.reading import transformers

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
    """The most probable tokens of a language model, for each target.

    Attributes:
        log_p: (batch, tokens, k) their log-probabilities at the temperature of the distance, in nats.
        tokens: (batch, tokens, k) their ids.
    """

    log_p: Tensor
    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenLoss(LossAdapter):
    """Cross-entropy of tokens in nats, averaged over those that count; inputs hold them as `targets` (batch, tokens).

    The distance for distillation is a divergence of the teacher's and the student's distributions at a temperature,
    times its square, averaged over the same tokens. The hidden states of a prediction may be more than the targets,
    which are those of the first.

    Args:
        divergence: `forward` is KL(teacher || student), `reverse` KL(student || teacher) as in MiniLLM
            (arXiv:2306.08543); a number b between 0 and 1 is the generalised Jensen-Shannon divergence of GKD
            (arXiv:2306.13649): b KL(teacher || m) + (1 - b) KL(student || m), where m = b teacher + (1 - b) student.
        temperature: temperature of both distributions in the distance.
        top_k: compare the teacher's most probable tokens and the rest as one, instead of the whole vocabulary: a lower
            bound of any divergence that keeps k numbers per token for the backward pass; null compares all.
        chunk: tokens whose logits are in memory at a time, over all samples of the batch.
    """

    divergence: Literal["forward", "reverse"] | float = field(default="forward", metadata={NEUTRAL: "forward"})
    temperature: float = 1.0
    top_k: int | None = None
    chunk: int = 1024

    def __post_init__(self) -> None:
        b = self.divergence
        fit = isinstance(b, str) or 0 < b < 1
        require(fit, "loss.divergence", b, "forward, reverse, or a number between 0 and 1")
        require(self.temperature > 0, "loss.temperature", self.temperature, "a number above 0")
        require(self.top_k is None or self.top_k >= 1, "loss.top_k", self.top_k, "at least 1, or null")
        require(self.chunk >= 1, "loss.chunk", self.chunk, "at least 1 token")

    @override
    def loss(self, prediction: Hidden, inputs: Batch) -> Tensor:
        def piece(targets: Tensor, states: Tensor) -> Tensor:
            logits = prediction.head(states).float()
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORED)

        return self._mean(piece, inputs["targets"], self._told(prediction, inputs))

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
            apart = self._diverging(target, found)
            return self.temperature**2 * apart.masked_fill(targets == IGNORED, 0)

        told = teacher if isinstance(teacher, MostProbable) else (self._told(teacher, inputs),)
        return self._mean(piece, inputs["targets"], self._told(student, inputs), *told)

    @override
    def keep(self, teacher: Hidden, inputs: Batch) -> dict[str, Tensor]:
        """Return the log-probabilities and ids of the `top_k` most probable tokens, both (batch, tokens, k).

        Raises:
            UserError: `top_k` is null: the probabilities of a whole vocabulary would fill any disk.
        """
        if self.top_k is None:
            raise UserError(
                "loss.top_k: null compares the whole vocabulary, of which a cache keeps a part; set 64, say"
            )
        width, found = max(1, self.chunk // len(teacher.states)), []
        for states in torch.split(self._told(teacher, inputs), width, dim=1):
            log_p = self._log_p(teacher, states)
            found.append(log_p.topk(min(self.top_k, log_p.shape[-1])))
        log_p, tokens = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return {"log_p": log_p, "tokens": tokens.int()}

    @override
    def kept(self, columns: Batch, like: Hidden) -> MostProbable:
        return MostProbable(columns["log_p"], columns["tokens"])

    def _diverging(self, teacher: Tensor, student: Tensor) -> Tensor:
        """(...) divergences of distributions, given as log-probabilities (..., outcomes)."""
        if self.divergence == "forward":
            return _kl(teacher, student)
        if self.divergence == "reverse":
            return _kl(student, teacher)
        b = float(self.divergence)
        middle = torch.logaddexp(teacher + math.log(b), student + math.log1p(-b))
        return b * _kl(teacher, middle) + (1 - b) * _kl(student, middle)

    def _told(self, hidden: Hidden, inputs: Batch) -> Tensor:
        """The states of the targets."""
        return hidden.states[:, : inputs["targets"].shape[1]]

    def _log_p(self, hidden: Hidden, states: Tensor) -> Tensor:
        """(B, t, vocabulary) log-probabilities of tokens at the temperature, of states (B, t, D)."""
        return (hidden.head(states).float() / self.temperature).log_softmax(-1)

    def _mean(self, piece: Callable[..., Tensor], targets: Tensor, *columns: Tensor) -> Tensor:
        """Average a quantity over the counted tokens; it is computed in chunks, and recomputed for the gradient.

        Args:
            piece: (B, t) targets and (B, t, ...) columns, one or several -> a number per token, 0 if not counted.
            targets: (B, T).
            columns: (B, T, ...) each.

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


def run_to_head(model: nn.Module, tokens: Tensor, given: Mapping[str, Any], to_head: Mapping[str, Any]) -> Hidden:
    """Run a network, its head for one token only.

    Args:
        model: the network.
        tokens: (batch, tokens), of an encoder-decoder those of its decoder.
        given: further arguments. Without `logits_to_keep` among them the head is given the first token alone.
        to_head: further arguments with which its head can be run.

    Returns:
        Hidden states (batch, tokens, channels), and the head.

    Raises:
        UserError: no part of it returns hidden states.
        NotImplementedError: it looks at values, of which `tokens` has none.
    """
    cut = "logits_to_keep" not in given
    try:
        with _watched(model, cut) as outputs, nullcontext() if has_values(tokens) else _OneProduct():
            model(**{reader_of(model): tokens}, **given)
    except (RuntimeError, ValueError, TypeError, AssertionError) as e:
        if has_values(tokens):
            raise
        raise NotImplementedError(f"{type(model).__name__}: {e}") from e
    # The outermost one that ends before the head returns last.
    ended = [found for found in outputs if "last_hidden_state" in found[1]]
    if not ended:
        raise UserError(
            f"backbone.model: no part of a {type(model).__name__} returns hidden states before its head, which losses "
            "are computed from"
        )
    below, output = ended[-1]
    return Hidden(output[0], lambda states: _head(model, below, type(output), states, to_head))


def reader_of(model: Any) -> str:
    """Return the argument in which a network is given the tokens that it continues."""
    return "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q), (...), of log-probabilities (..., outcomes)."""
    return (p.exp() * (p - q)).sum(-1)


def _with_rest(log_p: Tensor) -> Tensor:
    """Append the remaining probability of a distribution to the log-probabilities of some of its outcomes."""
    rest = (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=1e-7)
    return torch.cat([log_p, rest.log()], dim=-1)


@contextmanager
def _watched(model: nn.Module, cut: bool) -> Iterator[list[tuple[nn.Module, Any]]]:
    """The outputs of these modules, in the order in which they return; the head may be given the first token alone."""
    outputs: list[tuple[nn.Module, Any]] = []
    modules = around_layers(model)

    def watch(module: nn.Module, _args: Any, output: Any) -> Any:
        outputs.append((module, output))
        if cut and module is modules[0] and "last_hidden_state" in output:
            return type(output)(**{**output, "last_hidden_state": output["last_hidden_state"][:, :1]})
        return None

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(watch).remove)
        yield outputs


def _head(model: Any, below: nn.Module, kind: type[Any], states: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Run the model with `below` returning these states: its own head, with all caps and scales it applies."""
    before = below.__dict__.get("forward")
    below.forward = lambda *args, **kwargs: kind(last_hidden_state=states)
    try:
        tokens = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
        # Whatever an encoder has read, the decoder would have made these states of it.
        read = transformers("loss").modeling_outputs.BaseModelOutput(last_hidden_state=states)
        encoded = {"encoder_outputs": read} if model.config.is_encoder_decoder else {}
        logits: Tensor = model(**{reader_of(model): tokens}, **encoded, **given).logits
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
