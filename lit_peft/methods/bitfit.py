"""BitFit: the biases that a model has, and nothing else."""

from typing import Any

import torch
from torch import nn

from lit_peft.core.attach import Adapter
from lit_peft.methods.base import Method


class BitFit(Method):
    """Trains every bias of the base, `b' = b + db`, and the head.

    Ben Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models", section 3. About .1 % of a BERT's parameters, no cost in inference.

    Args:
        **common: See `Method`.
    """

    def __init__(self, **common: Any) -> None:
        super().__init__(**common)

    def trains(self, name: str) -> bool:
        return "bias" in name.rpartition(".")[2].split("_")  # in_proj_bias and an LSTM's bias_ih_l0 too

    def lacks_gradient(self, name: str) -> bool:
        # A key's bias adds the same to all scores of a query, which softmax cancels: its gradient is zero.
        return True

    def attach(self, module: nn.Module, dtype: torch.dtype | None = None) -> Adapter:
        if not any(self.trains(name) for name, _ in module.named_parameters()):
            raise ValueError(
                f"BitFit has nothing to train: {type(module).__name__} has no biases. Use LoRA, or LinearProbe for the "
                "head alone."
            )
        return super().attach(module, dtype)
