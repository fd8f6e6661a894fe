"""Next-token prediction, in chunks of the text: the logits of a whole batch are never in memory at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from tinyfusion_core.errors import UserError, require
from tinyfusion_core.protocols.backbone import Batch
from tinyfusion_core.protocols.loss import has_values
from tinyfusion_core.runtime.files import NEUTRAL
from tinyfusion_core.runtime.seeding import Rng, to_device
from tinyfusion_llm.generation.continuing import continued, drawn, prompt_lengths
from tinyfusion_llm.hidden import IGNORED, Hidden, TokenLoss, run_to_head
from tinyfusion_llm.images.columns import model_inputs
from tinyfusion_llm.layers.finding import vocabulary_of
from tinyfusion_llm.seq2seq.columns import ENCODED, encoder_inputs


@dataclass(frozen=True, kw_only=True)
class NextToken(TokenLoss):
    """Cross-entropy of the next token in nats, averaged over a sample's counted tokens.

    The distance for distillation is `divergence` of the distributions of teacher and student at a temperature, times
    its square, averaged over the same tokens.

    Args:
        prompt_tokens: tokens of a text without a prompt that are kept, and continued, by `tinyfusion generate-data` and
            by a student that learns on policy.
        sampling_temperature: temperature of the continuation's tokens.
        top_p: they are drawn from the most probable ones that have this probability together.
    """

    prompt_tokens: int = field(default=16, metadata={NEUTRAL: 16})
    sampling_temperature: float = field(default=1.0, metadata={NEUTRAL: 1.0})
    top_p: float = field(default=1.0, metadata={NEUTRAL: 1.0})

    def __post_init__(self) -> None:
        super().__post_init__()
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
                of separate documents also `positions` (batch, tokens), with images what `ImageText` has of them, and of
                an encoder-decoder what its encoder reads.
            rng: not drawn from.

        Returns:
            `tokens` (batch, tokens), and `targets` (batch, tokens - 1): the label of the token that follows; and all
            others as they are.

        Raises:
            UserError: the batch is an encoder's, which sees the tokens that follow.
        """
        if "attention" in batch:
            raise UserError(
                "loss: NextToken is for networks that read a text up to a token, and an encoder sees what follows; "
                "take MaskedToken or SentenceEmbedding"
            )
        others = {name: column for name, column in batch.items() if name != "labels"}
        return {**others, "targets": batch["labels"][:, 1:]}

    @override
    def prepare_clean(self, batch: Batch, rng: Rng) -> dict[str, Tensor]:
        return self.prepare(batch, rng)

    @override
    def predict(self, model: Any, inputs: Batch) -> Hidden:
        """Return the final hidden states, (batch, tokens, channels); the head is run for one token only.

        Raises:
            UserError: a token id of the data is outside the model's vocabulary.
        """
        tokens = inputs["tokens"]
        if not model.training and has_values(tokens):  # once the teacher has been checked, the data are known to fit
            size = vocabulary_of(model)
            require(
                int(tokens.max()) < size, "data.tokenizer: a token", int(tokens.max()), f"below {size}, the model's"
            )
        if model.config.is_encoder_decoder:
            read = encoder_inputs(model, inputs)
            return run_to_head(model, tokens, {"use_cache": False, **read}, {"use_cache": False})
        if has_values(tokens):
            given = model_inputs(inputs, next(model.parameters()).dtype)
        else:  # Transformers looks at values to find a mask, so it is given; so do towers, and images are left out.
            size = tokens.shape[1]
            given = {"attention_mask": tokens.new_ones(len(tokens), 1, size, size, dtype=torch.bool)}
        if "positions" in inputs:  # where they begin anew, transformers keeps what is before out of sight
            given["position_ids"] = inputs["positions"]
        # As an index: told a number of tokens, Gemma 4 runs the layers that share keys and values for these alone.
        given["logits_to_keep"] = tokens.new_zeros(1)
        return run_to_head(model, tokens, {"use_cache": False, **given}, {"use_cache": False})

    @override
    def generated(self, model: Any, batch: Batch, conditions: str, rng: Rng) -> dict[str, Tensor]:
        """Return the texts of a batch, continued by a network up to its end-of-text token or the end of the sample.

        The tokens that no loss counts at the beginning of a text are its prompt; where all count, `prompt_tokens` are.
        Of an encoder-decoder the targets are written anew: sequence-level distillation (Kim and Rush, 2016,
        arXiv:1606.07947).

        Args:
            model: the network, in eval mode.
            batch: `tokens` and `labels`, (batch, tokens); of separate documents also `positions`, (batch, tokens); of
                an encoder-decoder what its encoder reads.
            conditions: not looked at.
            rng: streams "token <number>", for each of the new ones.

        Returns:
            The same tensors of the same shape; behind the end of a text no loss counts.

        Raises:
            UserError: there are other columns, as those of images.
        """
        tokens, labels, read, encoded = batch["tokens"], batch["labels"], {}, None
        if model.config.is_encoder_decoder:
            encoded, read = encoder_inputs(model, batch), {n: batch[n] for n in ENCODED if n in batch}
        kept = self._kept(model, batch)

        def draw(number: int, logits: Tensor) -> Tensor:
            u = to_device(rng.uniform(f"token {number}", len(logits)), logits.device)
            return drawn(logits / self.sampling_temperature, u, self.top_p)

        made, written = continued(model, tokens, kept, draw, encoded)
        places = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens), 1)
        labels = labels.where(places < kept[:, None], made.masked_fill(~written, IGNORED))
        return {**read, "tokens": made, "labels": labels, **({"positions": places} if "positions" in batch else {})}

    @override
    def own_samples(self, model: Any, batch: Batch, conditions: str, rng: Rng) -> dict[str, Tensor]:
        """Return the texts of a batch, (batch, tokens), continued as by `generated`; their beginnings count in no loss.

        Args:
            model: the student, in eval mode.
            batch: as `generated` takes it.
            conditions: not looked at.
            rng: streams "token <number>", for each of the new ones.
        """
        labels = batch["labels"]
        begins = torch.arange(labels.shape[1], device=labels.device) < self._kept(model, batch)[:, None]
        return self.generated(model, {**batch, "labels": labels.masked_fill(begins, IGNORED)}, conditions, rng)

    def _kept(self, model: Any, batch: Batch) -> Tensor:
        """How many tokens of each text are its prompt, (batch,)."""
        read = ENCODED if model.config.is_encoder_decoder else ()
        return prompt_lengths(batch, batch["labels"] != IGNORED, 1 if read else self.prompt_tokens, read)
