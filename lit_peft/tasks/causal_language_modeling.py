"""Causal language modelling: each token from those before it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lit_peft.tasks.base import Batch
from lit_peft.tasks.language_modeling import LanguageModeling
from lit_peft.tasks.loading import BaseStorage
from lit_peft.tasks.token_loss import IGNORED


class CausalLanguageModeling(LanguageModeling):
    """Trains a decoder to predict the next token, `-log p(token_t | token_0 ... token_{t-1})`.

    A batch has `input_ids` and `labels` [b, w], labels[t] being input_ids[t], or -100 where that token is not to be
    scored; what predicts it stands at t - 1. Beside them it has an `attention_mask`, or, where several texts share a
    row, `position_ids` that start at 0 in each: no token sees another text, and the first one of a text is not scored.

    Logs `train/loss`; in evaluation nll, perplexity, acc and ece under `val/` or `test/`, and word_perplexity where the
    data module knows how many words there are.

    Args:
        backbone: Model to start from: a hub id, or a local folder.
        **common: See `TransformersTask`.
    """

    auto_class = "AutoModelForCausalLM"
    masked = False

    def __init__(self, backbone: str, **common: Any) -> None:
        super().__init__(backbone, **common)

    def load_model(self, storage: BaseStorage | None) -> tuple[Any, list[str]]:
        model, fresh = super().load_model(storage)
        causal = [child.is_causal for child in model.modules() if isinstance(getattr(child, "is_causal", None), bool)]
        if causal and not any(causal):
            raise ValueError(
                f"backbone: {self.backbone}, a {type(model).__name__}, reads texts to both sides and would see "
                "the tokens that it predicts: use MaskedLanguageModeling."
            )
        return model, fresh

    def inputs_and_targets(self, batch: Batch, training: bool) -> tuple[dict[str, Any], Tensor]:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        labels, positions = batch["labels"], batch.get("position_ids")
        if positions is not None and "attention_mask" not in batch:
            labels = labels.masked_fill(positions == 0, IGNORED)
        # Without a cache, which nothing reads here, and with which transformers does not look for packed texts.
        return inputs | {"use_cache": False}, F.pad(labels[:, 1:], (0, 1), value=IGNORED)
