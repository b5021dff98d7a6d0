"""Random numbers of a training step that follow from the step alone."""

import os
from typing import Any

import lightning.pytorch as pl
import torch


class ReproducibleSteps(pl.Callback):
    """Seeds torch's generators before every training batch from (seed, batches so far, rank).

    Dropout then draws the same masks in a resumed run as in an uninterrupted one; Lightning does not restore
    the generators. Costs some microseconds a batch.

    Args:
        seed: Seed of the run; null: the one given to `seed_everything`, or 0.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed
        batches = trainer.fit_loop.total_batch_idx  # 0 for the first of the run, also counted across a resume
        # Distinct for all runs of fewer than 2^32 batches on fewer than 2^16 ranks.
        torch.manual_seed((seed << 48 ^ trainer.global_rank << 32 ^ batches) & (2**63 - 1))
