"""Small fits of Lightning's trainer."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_peft.testing.subjects import Model


class Task(pl.LightningModule):
    """A LightningModule around a model, that brings its outputs to fixed values."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model, self._run = model.build(), model.run

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self._run(self.model) - batch.mean()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def loader() -> Any:
    """Three batches of numbers."""
    return DataLoader(torch.tensor([0.1, -0.2, 0.3]), batch_size=1)  # type: ignore[arg-type]


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    """A quiet trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet | arguments)
