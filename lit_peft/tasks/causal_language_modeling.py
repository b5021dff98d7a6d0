"""Causal language modelling: each token from those before it."""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_peft import hub
from lit_peft.faults import TrainingFault
from lit_peft.labels import IGNORED
from lit_peft.methods.checks import check_number, check_range
from lit_peft.tasks.base import Batch
from lit_peft.tasks.generation import Decoding, continuations
from lit_peft.tasks.language_modeling import LanguageModeling
from lit_peft.tasks.loading import BaseStorage, use_instead
from lit_peft.tasks.token_loss import Rows, keeps_apart, sees_ahead
from lit_peft.training.data_module import current_data_module


class CausalLanguageModeling(LanguageModeling):
    """Trains a decoder to predict the next token, `-log p(token_t | token_0 ... token_{t-1})`.

    A batch has `input_ids` and `labels` [b, w], labels[t] being input_ids[t], or -100 where that token is not to be
    scored; what predicts it stands at t - 1. Beside them it has an `attention_mask`, or, where several texts share a
    row, `position_ids` that start at 0 in each: no token sees another text, and the first one of a text is not scored.

    Logs `train/loss`; in evaluation nll, perplexity, acc and ece under `val/` or `test/`, and word_perplexity where the
    data module knows how many words there are.

    In prediction a batch has prompts, `input_ids` and `attention_mask` padded on the left, which are continued.

    Args:
        backbone: Model to start from: a hub id, a local folder, or demo for the bundled decoder.
        max_new_tokens: How many tokens `predict` makes of a prompt at most; an end-of-text token ends it before.
        temperature: 0: the likeliest token at each step; else tokens are drawn from softmax(logits / temperature).
        top_p: Drawn tokens come from the smallest set that has this share of the probability, above 0; 1: from all.
        sampling_seed: Seed of the draws: the same prompts in the same batches get the same texts.
        **common: See `TransformersTask`.
    """

    auto_class = "AutoModelForCausalLM"
    masked = False

    def __init__(
        self,
        backbone: str = hub.DEMO,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        sampling_seed: int = 0,
        **common: Any,
    ) -> None:
        super().__init__(hub.DEMO_DECODER if backbone == hub.DEMO else backbone, **common)
        check_range("model.max_new_tokens", max_new_tokens, 1)
        check_range("model.temperature", temperature, 0)
        check_number("model.top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"model.top_p must be above 0 and at most 1, not {top_p}.")
        if top_p < 1 and temperature == 0:
            raise ValueError(
                f"model.top_p is {top_p}, and at model.temperature 0 nothing is drawn: set a temperature above 0, or "
                "leave top_p at 1."
            )
        self._apart: bool | None = None
        """Whether packed texts do not see each other; None: not asked yet."""
        self._looked_ahead = False
        """Whether a batch has told that the model is causal."""
        self.decoding, self.sampling_seed = Decoding(max_new_tokens, temperature, top_p), sampling_seed

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._apart = None  # another trainer may bring another method

    def load_model(self, storage: BaseStorage | None) -> tuple[Any, list[str]]:
        model, fresh = super().load_model(storage)
        causal = [child.is_causal for child in model.modules() if isinstance(getattr(child, "is_causal", None), bool)]
        if causal and not any(causal):
            self._refuse(model)
        return model, fresh

    def _refuse(self, model: Any) -> NoReturn:
        raise TrainingFault(
            f"backbone: {self.backbone}, a {type(model).__name__}, reads texts to both sides and would see "
            f"the tokens that it predicts: {use_instead(model.config, 'CausalLanguageModeling')}."
        )

    def inputs_and_targets(self, batch: Batch, training: bool) -> tuple[dict[str, Any], Tensor]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels, positions = batch["labels"], batch.get("position_ids")
        if positions is not None and "attention_mask" not in batch:
            labels = labels.masked_fill(positions == 0, IGNORED)
        # Without a cache, which nothing reads here, and with which transformers does not look for packed texts.
        return inputs | {"use_cache": False}, F.pad(labels[:, 1:], (0, 1), value=IGNORED)

    def rows(self, inputs: dict[str, Any], targets: Tensor) -> Rows:
        if not self._looked_ahead:
            if sees_ahead(self.model, inputs["input_ids"]):
                self._refuse(self.model)
            self._looked_ahead = True
        if self._apart is None and "position_ids" in inputs and "attention_mask" not in inputs:
            self._apart = keeps_apart(self.model, inputs["input_ids"])
            if not self._apart:
                raise TrainingFault(
                    f"{type(self.model).__name__} does not look where positions begin anew, so that packed texts would "
                    "see each other: set data.pack to false."
                )
        return super().rows(inputs, targets)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, str]]:
        """One dict a prompt: `prompt`, its text, and `generation`, what follows it; both without special tokens."""
        tokenizer = getattr(current_data_module(self.trainer), "tokenizer", None) or self.tokenizer
        ids = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids))
        seed = self.sampling_seed, self.global_rank, batch_idx
        return continuations(self.model, tokenizer, ids, mask, self.decoding, *seed)
