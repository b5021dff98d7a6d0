"""Masked language modelling: some tokens from all others, on both sides."""

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_peft import hub
from lit_peft.faults import TrainingFault
from lit_peft.labels import IGNORED
from lit_peft.methods.checks import check_range
from lit_peft.metrics import Perplexity, token_scores
from lit_peft.tasks.base import Batch
from lit_peft.tasks.documents import most_passes
from lit_peft.tasks.language_modeling import LanguageModeling
from lit_peft.tasks.loading import BaseStorage
from lit_peft.tasks.masking import Masking, fixed_noise


class MaskedLanguageModeling(LanguageModeling):
    """Trains an encoder to predict tokens that it does not see, `-log p(token_t | the text, masked)`.

    Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
    section 3.1: of the tokens of a text 15 % are drawn and scored; 80 % of these are replaced by the mask token, 10 %
    by a random one, 10 % stay. Training draws anew whenever it meets a text, from torch's generator; evaluation always
    draws the same of a text, whatever the batch or the rank. Special tokens (the unknown one among them) and tokens
    whose label is -100 are never drawn, and no special token is ever a replacement.

    In prediction a batch has texts with mask tokens in them, `input_ids` and `attention_mask`, which are filled.

    Logs `train/loss`; in evaluation nll, masked_perplexity, acc and ece of the tokens that were drawn.

    Args:
        backbone: Model to start from: a hub id, a local folder, or demo for the bundled encoder. Its tokenizer says
            what the mask token, the special tokens and the vocabulary are.
        mask_fraction: Share of a text's tokens that are drawn, at least one of a text.
        mask_seed: Seed of what evaluation draws.
        pseudo_perplexity: Whether `test` also scores each token masked alone, test/pseudo_perplexity: exp of the mean
            over all tokens (Salazar et al. 2020, "Masked Language Model Scoring", section 2). It costs a forward pass
            a token.
        **common: See `TransformersTask`.
    """

    auto_class = "AutoModelForMaskedLM"
    masked = True

    def __init__(
        self,
        backbone: str = hub.DEMO,
        *,
        mask_fraction: float = 0.15,
        mask_seed: int = 0,
        pseudo_perplexity: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        check_range("model.mask_fraction", mask_fraction, 0, 1)
        self.mask_fraction, self.mask_seed, self.scores_pseudo = mask_fraction, mask_seed, pseudo_perplexity
        self.scored_share = mask_fraction
        self._masking: Masking | None = None

    def load_model(self, storage: BaseStorage | None) -> tuple[Any, list[str]]:
        if self.tokenizer.mask_token_id is None:
            raise ValueError(
                f"backbone: the tokenizer of {self.backbone} has no mask token, which a masked language model needs; a "
                "decoder is trained by CausalLanguageModeling."
            )
        return super().load_model(storage)

    def build_metrics(self) -> None:
        super().build_metrics()
        if self.scores_pseudo:
            self.test_pseudo_perplexity = Perplexity()

    def masking(self, device: torch.device) -> Masking:
        """What is drawn, and what from."""
        if self._masking is None or self._masking.special.device != device:
            vocabulary = self.model.config.get_text_config().vocab_size
            self._masking = Masking.of(self.tokenizer, vocabulary, self.mask_fraction, device)
        return self._masking

    def inputs_and_targets(self, batch: Batch, training: bool) -> tuple[dict[str, Any], Tensor]:
        ids, labels = batch["input_ids"], batch["labels"]
        if "position_ids" in batch and "attention_mask" not in batch:
            raise TrainingFault(
                f"{type(self.model).__name__} reads texts to both sides, so that packed texts would see each other: "
                "set data.pack to false."
            )
        masking = self.masking(ids.device)
        if training:
            noise = torch.rand(3, *ids.shape, device=ids.device)
        else:
            noise = fixed_noise(ids, masking.scored(ids, labels), self.mask_seed)
        seen, targets = masking.apply(ids, labels, noise)
        return {key: value for key, value in batch.items() if key != "labels"} | {"input_ids": seen}, targets

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        if self.scores_pseudo:
            self._score_alone(batch)

    def _score_alone(self, batch: Batch) -> None:
        """Scores each token of a batch with it alone masked, as many at a time as the batch has rows, at least 32."""
        ids, metric = batch["input_ids"], self.test_pseudo_perplexity
        masking = self.masking(ids.device)
        places = masking.scored(ids, batch["labels"]).nonzero()
        parts = places.split(max(32, len(ids)))
        for _ in range(most_passes(len(parts), ids.device, self._trainer) - len(parts)):
            self.rows({k: v[:1] for k, v in batch.items() if k != "labels"}, torch.full_like(ids[:1], IGNORED))
        for some in parts:
            rows, columns = some.T
            each = torch.arange(len(some), device=ids.device)
            inputs = {key: value[rows] for key, value in batch.items() if key != "labels"}
            targets = torch.full_like(inputs["input_ids"], IGNORED)
            targets[each, columns] = ids[rows, columns]
            inputs["input_ids"][each, columns] = masking.mask
            for logits, true in self.rows(inputs, targets).chunks():
                metric.update(token_scores(logits, true))
        self.log("test/pseudo_perplexity", metric, batch_size=max(len(places), 1))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dict a text: `text`, its mask tokens filled; `tokens`, the likeliest ones; their `probabilities`."""
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        order = mask.argsort(dim=1, descending=True, stable=True)  # padding to the right: positions start with text
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        gaps = (ids == self.tokenizer.mask_token_id) & mask.bool()
        if not gaps.any():
            rank_zero_warn(f"Texts without {self.tokenizer.mask_token}, in the place of a word, have nothing to fill.")
        rows = self.rows({"input_ids": ids, "attention_mask": mask}, torch.where(gaps, 0, IGNORED))
        scores = [logits.float().softmax(-1).max(-1) for logits, _ in rows.chunks()]
        tokens, sure = (torch.cat(parts) for parts in ([s.indices for s in scores], [s.values for s in scores]))
        filled = ids.masked_scatter(gaps, tokens)
        sizes = gaps.sum(1).tolist()
        found = zip(filled, mask.bool(), tokens.split(sizes), sure.split(sizes), strict=True)
        return [
            {
                "text": self.tokenizer.decode(row[own].tolist(), skip_special_tokens=True),
                "tokens": [self.tokenizer.decode([token]) for token in new.tolist()],
                "probabilities": values.tolist(),
            }
            for row, own, new, values in found
        ]
