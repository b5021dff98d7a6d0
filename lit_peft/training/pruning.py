"""Methods that take parts of their adapter away: how far they are, and which checkpoints may then be the best one."""

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch

from lit_peft.training.averaging import is_a


@dataclass(frozen=True)
class Pruned:
    """What masking has left of an adapter.

    Attributes:
        left: Number of parts that are neither masked nor zero.
        total: Number of all.
        parts: What they are: "ranks".
        goal: How many are left in the end; None where that is open.
    """

    left: int
    total: int
    parts: str
    goal: int | None = None

    @property
    def reached(self) -> bool:
        """Whether no more than the goal is left."""
        return self.goal is None or self.left <= self.goal

    def metrics(self) -> dict[str, float]:
        """Under the keys of metrics.json: the number of parts left, and the share of those that are not."""
        return {"adapter/left": self.left, "adapter/sparsity": (self.total - self.left) / self.total}

    def __str__(self) -> str:
        return f"{self.left:,} of {self.total:,} {self.parts} left ({self.left / self.total:.0%})"


def restart_patience(trainer: pl.Trainer) -> None:
    """Lets each EarlyStopping begin with the score that it sees next."""
    for callback in _of(trainer, "EarlyStopping"):
        callback.best_score, callback.wait_count = _worst(callback), 0


def discount_checkpoints(trainer: pl.Trainer) -> bool:
    """Lets whatever each ModelCheckpoint has chosen by its monitor lose to what it sees next.

    The files stay until then: Lightning replaces or removes them, as it does with all that are beaten.

    Returns:
        Whether something had been chosen.
    """
    callbacks = _of(trainer, "ModelCheckpoint")
    for callback in callbacks:
        callback.best_k_models = dict.fromkeys(callback.best_k_models, _worst(callback))
    return any(callback.best_k_models for callback in callbacks)


def _of(trainer: pl.Trainer, name: str) -> list[Any]:
    return [callback for callback in trainer.callbacks if is_a(callback, name)]  # type: ignore[attr-defined]


def _worst(callback: Any) -> torch.Tensor:
    return torch.tensor(math.inf if callback.mode == "min" else -math.inf)
