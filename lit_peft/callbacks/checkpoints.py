"""Checkpoints of a run: the state to go on from, kept fresh, and checks that the best one can be chosen."""

import signal
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden

from lit_peft.arguments import nearest
from lit_peft.faults import TrainingFault
from lit_peft.training.data_module import current_data_module

HIGHER_IS_BETTER = {"acc", "accuracy", "f1", "mcc", "auroc", "precision", "recall"}


class LatestCheckpoint(Checkpoint):
    """Keeps last.ckpt, the state to go on from, up to date: every so many steps, on Ctrl-C, at the end of training.

    It stands beside the best checkpoint, often enough that a killed run loses little. Where a step is followed by a
    validation, it is written after that, since a resumed fit does not make up for one that it was killed in. On one
    device the first Ctrl-C lets the step in hand end, so that what is written is the state between two steps; a
    second one stops at once.

    Args:
        every_n_train_steps: Optimizer steps between two writings.
        dirpath: Folder of the file; null: nothing is written.
    """

    def __init__(self, every_n_train_steps: int, dirpath: str | None = None) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"resume_every must be at least 1, not {every_n_train_steps}.")
        self.every_n_train_steps = every_n_train_steps
        self.dirpath = dirpath
        self.stopping = False
        self._written = 0
        self._handler: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.dirpath = trainer.strategy.broadcast(self.dirpath)  # only rank 0 may know it, as with ModelCheckpoint

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._written = trainer.global_step

        def stop(number: int, frame: Any) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            print("\nStopping after this step; Ctrl-C again stops at once.", flush=True)

        # Ranks would have to agree on the step; a collective at each costs more than the steps that are lost.
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, stop)

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        epoch, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if fetcher is not None and not epoch._should_check_val_fx(fetcher):
            self._step(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._step(trainer)

    def _step(self, trainer: pl.Trainer) -> None:
        """Writes if it is time to: between two steps, or between a validation and the next step."""
        step = trainer.global_step
        # Inside a step, between the batches that it accumulates, a checkpoint would lose their gradients.
        stops = self.stopping and not trainer.fit_loop.epoch_loop._should_accumulate()
        if stops or (step // self.every_n_train_steps > self._written // self.every_n_train_steps):
            self._write(trainer)
            self._written = step
        if stops:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._write(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _write(self, trainer: pl.Trainer) -> None:
        if self.dirpath is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)

    @property
    def path(self) -> Path | None:
        """The file, or the folder of a sharding strategy; None where it was not written."""
        path = Path(self.dirpath or "") / "last.ckpt"
        return path if self.dirpath is not None and path.exists() else None


class MonitorCheck(pl.Callback):
    """Refuses to monitor what validation does not log: before training where a sanity check validates, else then."""

    def __init__(self) -> None:
        self._checked = False

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._check(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not self._checked:
            self._check(trainer)

    def _check(self, trainer: pl.Trainer) -> None:
        self._checked = True
        logged = list(trainer.callback_metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is None or monitor in logged or monitor.startswith("train"):
                continue
            key = "checkpoint" if isinstance(callback, ModelCheckpoint) else "early_stopping"
            raise TrainingFault(
                f"{key}.monitor: validation logs no {monitor!r}.{nearest(monitor, logged)} "
                f"It logs {', '.join(logged) or 'nothing'}."
            )


class TestSetCheck(pl.Callback):
    """Has the data module look at its test set before training: after it is late to find that it cannot be scored."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data = current_data_module(trainer)
        if hasattr(data, "check") and trainer.limit_test_batches and is_overridden("test_step", pl_module):
            data.check("test")


CHECKS = (MonitorCheck, TestSetCheck)
"""Callbacks that end a run from which nothing would come."""


def check_selection(*selecting: EarlyStopping | ModelCheckpoint) -> None:
    """Refuses settings under which the best weights would silently be the worst.

    Raises:
        ValueError: For a metric that is better when higher under `mode: min`, and for several best checkpoints
            under one file name.
    """
    for callback in selecting:
        name = "checkpoint" if isinstance(callback, ModelCheckpoint) else "early_stopping"
        metric = str(callback.monitor).rpartition("/")[2]
        if metric in HIGHER_IS_BETTER and callback.mode == "min":
            raise ValueError(f"{name}.monitor {callback.monitor} is better when higher: set {name}.mode to max.")
        if (
            isinstance(callback, ModelCheckpoint)
            and callback.save_top_k not in (0, 1)
            and "{" not in str(callback.filename)
        ):
            raise ValueError(
                f"checkpoint.save_top_k {callback.save_top_k} needs a file name that tells the checkpoints apart: "
                "checkpoint.filename best-{epoch}, for instance."
            )
