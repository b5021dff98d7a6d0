"""What a comparison wants to know of a run beyond its metrics.json: a callback that writes monitor.json."""

import json
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_peft.callbacks.speed import SpeedMonitor, peak_bytes

FILE = "monitor.json"
WARM = 20
"""Steps that the time of a step leaves out: kernels are chosen in them and memory is first taken."""


class RunMonitor(pl.Callback):
    """Writes steps, time of a step, the curve of validation, and scores, seconds and memory of the test.

    The file lies in the trainer's `default_root_dir`. Given to `lit-peft fit` it tells of the test that ends a fit,
    given to `lit-peft test` of that one.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []
        self._batches = 0
        self._warm = (0, 0.0)
        self._start = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if self._batches == WARM:
            self._warm = (WARM, self._speed(trainer).batches_s)
        self._batches += 1

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.curve.append({"step": trainer.global_step} | self._scores(trainer, "val/"))
            self._write(trainer, {})  # a run that is cut off leaves its curve

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches, seconds = self._warm
        counted = (self._speed(trainer).batches_s - seconds) / max(1, self._batches - batches)
        steps = {"steps": trainer.global_step, "epochs": trainer.current_epoch}
        self._write(trainer, steps | {"time/step_ms": 1000 * counted * trainer.accumulate_grad_batches})

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._start = time.perf_counter()

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seconds = time.perf_counter() - self._start  # its scores are on the host: the GPU is done
        spent = {"time/test_s": seconds, "memory/test_peak_bytes": peak_bytes(pl_module)}
        self._write(trainer, self._scores(trainer, "test/") | spent)

    @staticmethod
    def _speed(trainer: pl.Trainer) -> SpeedMonitor:
        return next(callback for callback in trainer.callbacks if isinstance(callback, SpeedMonitor))

    @staticmethod
    def _scores(trainer: pl.Trainer, prefix: str) -> dict[str, float]:
        return {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith(prefix)}

    def _write(self, trainer: pl.Trainer, metrics: dict[str, float]) -> None:
        self.metrics |= metrics
        path = Path(trainer.default_root_dir, FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"metrics": self.metrics, "curve": self.curve}))
        part.replace(path)  # the run may be killed at any moment
