"""What a merged model is asked without a test set, and whether the written one is the same when it is read again."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_peft import hub
from lit_peft.callbacks.logits import LogitsComparison, logits_of
from lit_peft.saving.merged import read_again

TEXTS = ["a great movie", "a dull and empty film", "The table has four legs.", "Nobody knows what comes next, or when."]
"""What a model is asked where no test set is scored."""
EPSILONS = 64
"""Differences of the written model's logits from those in memory that are rounding, in units of the dtype's."""


def find_tokenizer(module: nn.Module, data: Any, model: nn.Module) -> Any:
    """The tokenizer of the data, of the module, or of the base, as it is there; None where there is none."""
    for owner in (data, module):
        with suppress(ValueError, AttributeError):
            if hasattr(owner.tokenizer, "save_pretrained"):
                return owner.tokenizer
    names = (getattr(data, "tokenizer_name", None), getattr(module, "backbone", None), model.config._name_or_path)  # type: ignore[union-attr]
    for name in names:
        if isinstance(name, str) and name:
            with suppress(OSError, ValueError, KeyError):
                return hub.load_tokenizer(name)
    return None


def fixed_inputs(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Batches that are always the same: some texts, or without a tokenizer some tokens; none for a model of no text."""
    if getattr(model, "main_input_name", None) != "input_ids":
        return []
    if tokenizer is None:
        return [dict(model.dummy_inputs)]
    asked = [[text] for text in TEXTS] if tokenizer.pad_token_id is None else [TEXTS]
    batches = []
    for texts in asked:
        encoded = tokenizer(texts, padding=len(texts) > 1, return_tensors="pt")
        inputs = {key: encoded[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in encoded}
        if model.config.is_encoder_decoder:
            start = model.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full((len(texts), 1), 0 if start is None else start)
        batches.append(inputs)
    return batches


def verify(model: nn.Module, folder: Path, logits: LogitsComparison, out: str) -> float | None:
    """Largest difference of the logits of the model that transformers reads from a folder to those of the merged one.

    None where its logits are not compared; its tensors are held to each other all the same.

    Raises:
        ValueError: When it is another model.
    """
    try:
        again = read_again(model, folder)
        if logits.inputs is None:
            return None
        args, kwargs = logits.inputs
        model.eval()
        with torch.no_grad():
            ours, theirs = (logits_of(m(*args, **kwargs))[1] for m in (model, again))
        if ours is None or theirs is None:
            return None
        if ours.shape != theirs.shape:
            raise ValueError(f"it answers {list(theirs.shape)} logits, not {list(ours.shape)}.")
        difference = (ours.float() - theirs.float()).abs().max().item()
        allowed = EPSILONS * torch.finfo(ours.dtype).eps * max(1.0, ours.float().abs().max().item())
        if not difference <= allowed:
            raise ValueError(f"its logits differ by {difference:.3g} from those in memory.")
    except ValueError as error:
        raise ValueError(
            f"{out} was not written, since what transformers reads from it is another model: {error}"
        ) from error
    return difference
