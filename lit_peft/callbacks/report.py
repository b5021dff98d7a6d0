"""The report of a run: what trains, before; metrics.json, the adapter folder and a summary, after."""

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from lit_peft.callbacks.memory import PeakPrediction
from lit_peft.callbacks.speed import SpeedMonitor
from lit_peft.callbacks.tables import count_parameters, sites_table, summary_panel
from lit_peft.core.files import atomic_path
from lit_peft.core.memory import Growth
from lit_peft.core.quantize import stored_as
from lit_peft.core.registry import registry
from lit_peft.core.sharded import is_sharded
from lit_peft.methods.base import Method
from lit_peft.saving.folder import save
from lit_peft.training.bringing import methods
from lit_peft.training.data_module import current_data_module
from lit_peft.training.seam import BUILT_IN


class RunReport(pl.Callback):
    """Prints what the data are and the table of sites when a fit starts; `finish` writes what a run leaves.

    Validating and testing begin with what is scored, unless a fit on the same data has told it.

    Args:
        folder: The run's folder; null: that of the trainer's logger, or the trainer's root.
        quiet: Print nothing, write all the same.
    """

    running: ClassVar[bool] = False
    """Whether batches have been run, and an exception is no longer about the arguments."""

    def __init__(self, folder: str | None = None, quiet: bool = False) -> None:
        self.folder = folder
        self.quiet = quiet
        self.base: dict[str, float] = {}
        """Test metrics before training, `base/test/...`; a checkpoint carries them through a resume."""
        self.console = Console(soft_wrap=False)
        self._described: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base = dict(state_dict["base"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or self.quiet:
            return
        self._describe(trainer)
        if registry(pl_module) is not None:
            self.console.print(sites_table(pl_module))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._describe(trainer, ("val",))

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._describe(trainer, ("test",))

    def _describe(self, trainer: pl.Trainer, *roles: Any) -> None:
        data = current_data_module(trainer)
        if not trainer.is_global_zero or self.quiet or data is self._described or not hasattr(data, "describe"):
            return
        if not roles:
            self._described = data  # a fit validates it, and tests it afterwards
        for line in data.describe(*roles):
            self.console.print(line, soft_wrap=True, markup=False, highlight=False)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        RunReport.running = True

    def on_validation_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        RunReport.running = RunReport.running or not trainer.sanity_checking

    def on_test_batch_start(self, *args: Any) -> None:
        RunReport.running = True

    def on_predict_batch_start(self, *args: Any) -> None:
        RunReport.running = True

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        fitting = trainer.state.fn == "fit"
        if isinstance(exception, KeyboardInterrupt) and fitting and trainer.is_global_zero and not self.quiet:
            folder = self._folder(trainer)
            steps = f"{trainer.global_step} of {trainer.estimated_stepping_batches:.0f} steps"
            self.console.print(f"Interrupted after {steps}. Not written: metrics.json, adapter/.", highlight=False)
            if (folder / "checkpoints" / "last.ckpt").exists() and (folder / "config.yaml").is_file():
                self.console.print(f"  lit-peft fit --run {shown(folder)}", soft_wrap=True, highlight=False)

    def _folder(self, trainer: pl.Trainer) -> Path:
        return Path(self.folder or trainer.log_dir or trainer.default_root_dir)

    def measure_base(self, trainer: pl.Trainer, module: pl.LightningModule, data: Any) -> None:
        """Scores the test set before training."""
        with unlogged(trainer):
            results = trainer.test(module, datamodule=data, verbose=False)
        self.base = {f"base/{key}": value for result in results for key, value in result.items()}

    def finish(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        scores: Mapping[str, float],
        checkpoint: Path | None,
        next_steps: list[str],
    ) -> dict[str, Any]:
        """Writes adapter/ and metrics.json for the weights that the module holds now, and prints the summary.

        Args:
            trainer: The trainer that fitted.
            module: The module, with the best checkpoint's weights.
            scores: Its val and test metrics.
            checkpoint: The best checkpoint, None where none was written.
            next_steps: Commands for the summary.

        Returns:
            What metrics.json holds; figures that cannot be had are null.
        """
        folder = self._folder(trainer)
        notes: dict[str, str] = {}
        metrics: dict[str, Any] = {**scores, **self.base, **count_parameters(module).metrics()}
        speed = next((c for c in trainer.callbacks if isinstance(c, SpeedMonitor)), None)  # type: ignore[attr-defined]
        if speed is not None:
            metrics["time/train_s"] = speed.train_s
            metrics["throughput/examples_per_s"] = speed.examples_per_s
            metrics["memory/peak_bytes"] = speed.peak_bytes
        built: Growth = module.__dict__.get(BUILT_IN, Growth())
        metrics |= {"memory/load_host_bytes": built.host, "memory/load_device_bytes": built.device}
        if kinds := sorted(set(stored_as(module).values())):
            metrics["quantize"] = "; ".join(kinds)
        planned = next((c for c in trainer.callbacks if isinstance(c, PeakPrediction)), None)  # type: ignore[attr-defined]
        if planned is not None and planned.predicted_bytes is not None:
            metrics["memory/predicted_bytes"] = planned.predicted_bytes
        metrics["checkpoint/bytes"] = _size(checkpoint) if checkpoint is not None else None
        metrics["adapter/bytes"] = None
        nothing = "not written: fast_dev_run keeps nothing" if trainer.fast_dev_run else None  # type: ignore[attr-defined]
        notes["checkpoint"] = nothing or (str(checkpoint) if checkpoint else "not written: checkpoints are off")
        if checkpoint is not None and checkpoint.name == "last.ckpt":
            notes["checkpoint"] += " (there is no best one)"
        for method in methods(trainer):
            target = folder / "adapter" if method.name == "default" else folder / "adapter" / method.name
            of = "" if method.name == "default" else f"/{method.name}"
            key = f"adapter{of}"
            if nothing:
                notes[key] = nothing
            elif trainer.is_global_zero or is_sharded(module):  # shards are gathered by all ranks
                try:
                    save(module, target, method.name, metrics={k: v for k, v in scores.items() if math.isfinite(v)})
                except Exception as error:  # the fit is done, and its figures are not written yet
                    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                    notes[key] = f"not written: {kind}{error}"
                else:
                    size = _size(target)
                    metrics["adapter/bytes"] = (metrics["adapter/bytes"] or 0) + size
                    notes[key] = f"{target} ({size / 1000:,.0f} kB)"
            pruned = method.pruned(module)  # on every rank: shards are gathered
            if pruned is not None:
                metrics |= {key + of: value for key, value in pruned.metrics().items()}
                notes[f"pruned{of}"] = str(pruned)
        metrics = {key: value if isinstance(value, str) or _finite(value) else None for key, value in metrics.items()}
        if trainer.is_global_zero:
            notes["metrics"] = nothing or str(folder / "metrics.json")
            if not nothing:
                with atomic_path(folder / "metrics.json") as part:
                    part.write_text(json.dumps(metrics, indent=2, sort_keys=True) + "\n")
            if not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
                notes["curves"] = nothing or "not written: no TensorBoard logger"
            self._log_hyperparameters(trainer, module, metrics)
            if not self.quiet:
                title = " + ".join(type(method).__name__ for method in methods(trainer)) or type(module).__name__
                self.console.print(summary_panel(title, metrics, notes))
                for step in next_steps:  # never wrapped, so that it can be copied
                    self.console.print(f"  {step}", soft_wrap=True, highlight=False)
        return metrics

    def _log_hyperparameters(self, trainer: pl.Trainer, module: pl.LightningModule, metrics: Mapping[str, Any]) -> None:
        """Fills TensorBoard's HPARAMS page: arguments and final metrics must come in one call to show together."""
        arguments: dict[str, Any] = {}
        for method in methods(trainer):
            arguments["method"] = type(method).__name__
            arguments |= {f"method.{key}": _plain(value) for key, value in method.arguments().items()}
        rates = [group.get("initial_lr", group["lr"]) for opt in trainer.optimizers for group in opt.param_groups]
        arguments |= {
            "learning_rate": max(rates, default=0.0),
            "optimizer": type(trainer.optimizers[0]).__name__ if trainer.optimizers else "none",
            "seed": os.environ.get("PL_GLOBAL_SEED", "none"),
            "trainer.max_epochs": trainer.max_epochs or -1,
            "trainer.precision": str(trainer.precision),
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
            "trainer.gradient_clip_val": trainer.gradient_clip_val or 0.0,
        }
        for part in (module, trainer.datamodule):  # type: ignore[attr-defined]
            for key, value in getattr(part, "hparams", {}).items():
                if not key.startswith("_"):
                    arguments[f"{'model' if part is module else 'data'}.{key}"] = _plain(value)
        finite = {f"final/{key}": value for key, value in metrics.items() if isinstance(value, int | float)}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(arguments, finite)


@contextmanager
def unlogged(trainer: pl.Trainer) -> Iterator[None]:
    """Lets a trainer evaluate without a trace: no logger, and no callback but methods and progress."""
    loggers, callbacks = trainer.loggers, trainer.callbacks  # type: ignore[attr-defined]
    trainer.loggers = []
    trainer.callbacks = [c for c in callbacks if isinstance(c, Method | ProgressBar)]  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():  # the callbacks of the checkpoint are left out on purpose
            warnings.filterwarnings("ignore", ".*callbacks used to create the checkpoint.*")
            yield
    finally:
        trainer.loggers, trainer.callbacks = loggers, callbacks  # type: ignore[attr-defined]


def shown(path: Path) -> Path:
    """A path as a user would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _size(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)
