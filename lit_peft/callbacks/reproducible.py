"""Random numbers of a training step that follow from the step alone."""

import os
from typing import Any

import lightning.pytorch as pl
import numpy as np
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
        # Mixed, because torch's generator for CPUs reads the low 32 bits alone: all three must show in these.
        mixed = np.random.SeedSequence((seed, trainer.global_rank, batches)).generate_state(1, np.uint64)
        torch.manual_seed(int(mixed[0]) >> 1)
