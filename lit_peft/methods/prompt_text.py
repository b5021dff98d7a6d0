"""Tokens of the text that a prompt or a prefix starts from."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_peft import hub
from lit_peft.core.hf_peft import find_root


def token_ids(module: nn.Module, text: str, tokenizer: str | None, n: int) -> Tensor:
    """The first n token ids of a text, [n], which is repeated where it is shorter.

    Args:
        module: What the method is attached to; a task's `backbone` or the model's own folder has the tokenizer.
        text: The text; special tokens are left out.
        tokenizer: Hub id or folder, in the place of the model's.
        n: How many.

    Raises:
        ValueError: When no tokenizer is known or the text has no token.
    """
    model: Any = find_root(module).model
    backbone = getattr(module, "backbone", None)  # of a user's module it may be the network itself
    name = tokenizer or (isinstance(backbone, str) and backbone) or getattr(model.config, "_name_or_path", None)
    if not name:
        raise ValueError("tokenizer: the model does not say where its tokenizer is; give a folder or a hub id.")
    ids = hub.load_tokenizer(name)(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"The text {text!r} has no token for the tokenizer of {name}.")
    return torch.tensor((ids * (n // len(ids) + 1))[:n])
