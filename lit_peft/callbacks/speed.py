"""How fast a run trains and how much memory it takes."""

import resource
import sys
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class SpeedMonitor(pl.Callback):
    """Logs `throughput/examples_per_s` and `memory/peak_bytes` while training.

    Throughput counts training batches alone, loading included, validation left out, over all devices; it goes
    on counting after a resume. Peak memory is what the allocator of the first GPU held at most, or on a CPU the
    largest resident size of the process.
    """

    def __init__(self) -> None:
        self.examples = 0
        self.batches_s = 0.0
        """Seconds spent in training batches."""
        self.train_s = 0.0
        """Seconds from the start of training to now or its end, validation included."""
        self.peak_bytes = 0
        self._mark = self._start = 0.0

    @property
    def examples_per_s(self) -> float:
        """Mean over the run so far; 0 before the first batch."""
        return self.examples / self.batches_s if self.batches_s else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "batches_s": self.batches_s,
            "train_s": self._elapsed(),
            "peak_bytes": self.peak_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.examples, self.batches_s = state_dict["examples"], state_dict["batches_s"]
        self.train_s = state_dict["train_s"]
        self.peak_bytes = state_dict.get("peak_bytes", 0)

    def _elapsed(self) -> float:
        return self.train_s + (time.perf_counter() - self._start if self._start else 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = self._mark = time.perf_counter()
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.batches_s += now - self._mark
        self._mark = now
        self.examples += batch_size(batch) * trainer.world_size
        self.peak_bytes = max(self.peak_bytes, peak_bytes(pl_module))
        values = {"throughput/examples_per_s": self.examples_per_s, "memory/peak_bytes": float(self.peak_bytes)}
        pl_module.log_dict(values, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.train_s, self._start = self._elapsed(), 0.0


def batch_size(batch: Any) -> int:
    """Length of the first tensor found in a batch, 0 where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return next((n for part in parts if (n := batch_size(part))), 0)


def peak_bytes(module: pl.LightningModule) -> int:
    """Most bytes held so far: by the CUDA allocator, or resident on a CPU."""
    if module.device.type == "cuda":
        return torch.cuda.max_memory_allocated(module.device)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
