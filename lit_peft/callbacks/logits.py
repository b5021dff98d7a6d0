"""What two states of one model answer to the same batches, compared batch by batch."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_peft.core.hf_peft import find_root

MOST = 2**24
"""Numbers of logits that are kept, 64 MB; what comes after them is not compared."""
ROWS = 8
"""Rows of the first batch that are kept as inputs."""


class LogitsComparison(pl.Callback):
    """Keeps what the transformers model in a module answers in one test, and compares what it answers in the next.

    Args:
        most: Numbers that are kept; of a first batch that has more, at least one row.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.comparing = False
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """Of the first call, positional and by name, on the host."""
        self.rows = 0
        self.difference = torch.tensor(0.0)
        self.largest = torch.tensor(0.0)
        self.flips: int | None = 0
        self.compared: str | None = None
        self._kept: list[Tensor] = []
        self._calls = 0
        self._path: str | None = None
        self._handle: Any = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._path is None:
            self._path = find_root(pl_module).path
        self._handle = pl_module.get_submodule(self._path).register_forward_hook(self._take, with_kwargs=True)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._handle.remove()

    @torch.no_grad()
    def ask(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Takes the answer to one batch without a trainer, in evaluation mode; nothing where there are no inputs."""
        if inputs:
            self._take(model, (), inputs, model.eval()(**inputs))

    def compare(self) -> "LogitsComparison":
        """From now on answers are compared to those that were kept."""
        self.comparing = True
        return self

    def _take(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name, found = logits_of(output)
        found = found.detach().float().cpu()
        if not self.comparing:
            if self.inputs is None:
                self.compared, rows = name, len(found)
                self.inputs = (
                    tuple(_first(value, rows) for value in args),
                    {key: _first(value, rows) for key, value in kwargs.items()},
                )
            room = self.most - sum(kept.numel() for kept in self._kept)
            fitting = max(room // max(found[:1].numel(), 1), 0 if self._kept else 1)
            if fitting:
                self._kept.append(found[:fitting].clone())
            return
        if self._calls < len(self._kept):
            self._compare(self._kept[self._calls], found)
        self._calls += 1

    def _compare(self, before: Tensor, after: Tensor) -> None:
        after = after[: len(before)]
        difference = torch.where(before == after, 0.0, (after - before).abs())  # infinities may be equal
        self.rows += len(before)
        self.difference = torch.maximum(self.difference, difference.max())
        self.largest = torch.maximum(self.largest, before.abs().max())
        if self.compared == "logits" and before.ndim == 2 and before.shape[1] > 1 and self.flips is not None:
            self.flips += int((before.argmax(-1) != after.argmax(-1)).sum())
        else:
            self.flips = None

    def figures(self) -> dict[str, Any]:
        """What was found, null where nothing was compared: for a report."""
        nothing = self.rows == 0
        return {
            "compared": self.compared,
            "rows": self.rows,
            "max_logit_difference": None if nothing else self.difference.item(),
            "largest_logit": None if nothing else self.largest.item(),
            "label_flips": None if nothing else self.flips,
        }


def logits_of(output: Any) -> tuple[str, Tensor]:
    """What a transformers model answers: its logits, or its last hidden state where it has no head."""
    for name in ("logits", "last_hidden_state"):
        if torch.is_tensor(found := getattr(output, name, None)):
            return name, found
    return "output", output if torch.is_tensor(output) else output[0]


def _first(value: Any, rows: int) -> Any:
    """The first rows of what goes by rows, on the host; anything else as it is."""
    if not torch.is_tensor(value):
        return value
    return (value[:ROWS] if value.ndim and len(value) == rows else value).detach().cpu().clone()
