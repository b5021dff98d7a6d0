"""Linear probing: the base stays as it is, only the head trains."""

import torch
from torch import nn

from lit_peft.core.registry import Adapter
from lit_peft.methods.base import Method


class LinearProbe(Method):
    """Trains `train_also` alone: the head that a task names, or the one that you name.

    Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes". The least that
    can be trained; what it reaches is what the frozen features hold already.

    Args:
        **common: See `Method`; on a module that does not name its head, `train_also` is needed.
    """

    def attach(self, module: nn.Module, dtype: torch.dtype | None = None) -> Adapter:
        if not self.train_also and not getattr(module, "train_also", ()):
            raise ValueError(
                f"LinearProbe trains only the head, and {type(module).__name__} does not say which it is: "
                "name it, LinearProbe(train_also=['classifier'])."
            )
        return super().attach(module, dtype)
