"""The verbs that run a trainer: LightningCLI with a `method:` beside `model:`, `data:` and `trainer:`."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

import lit_peft.data
import lit_peft.tasks
from lit_peft.callbacks import (
    PredictionWriter,
    ReliabilityDiagram,
    ReproducibleSteps,
    RunReport,
    SpeedMonitor,
)
from lit_peft.callbacks.report import unlogged
from lit_peft.class_path import find_fault
from lit_peft.cli import fail, nearest
from lit_peft.methods.base import Method
from lit_peft.methods.registry import available, find

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs",
    "max_epochs": 3,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the table of sites says it better
}


HIGHER_IS_BETTER = {"acc", "accuracy", "f1", "mcc", "auroc", "precision", "recall"}


class Parser(LightningArgumentParser):
    """Tells a mistake in a few lines instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        fail(essence(message))


def essence(message: str) -> str:
    """At most three lines of an error text: of jsonargparse's report on a union type, what was wrong with the value."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    if "Errors:" in lines:
        paths = re.findall(r"(?:Given value: |class_path'?: ?'?)((?:\w+\.)+\w+)", message)
        for path in paths:
            if (fault := find_fault(path)) is not None:
                return fault
        reasons = [line.removeprefix("- ") for line in lines[lines.index("Errors:") + 1 :] if line.startswith("- ")]
        reasons = [reason for reason in reasons if "NoneType" not in reason]
        unknown = next((r.rpartition(": ")[2] for r in reasons if r.startswith("Expected a dot import path")), None)
        if unknown is not None and "Method" in message:
            try:
                find(unknown)
            except ValueError as error:
                return str(error)
        lines = [reason.replace("Import path does", f"{''.join(paths[:1])} does") for reason in reasons] or lines
    return "\n".join(lines[:3])


class LatestCheckpoint(ModelCheckpoint):
    """Keeps last.ckpt, the state to resume from, up to date: every so many steps and at the end of training.

    It stands beside the best checkpoint, often enough that a killed run loses little.
    """

    def __init__(self, every_n_train_steps: int) -> None:
        super().__init__(filename="last", every_n_train_steps=every_n_train_steps, enable_version_counter=False)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.dirpath is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", weights_only=False)

    @property
    def path(self) -> Path | None:
        """The file, None where it was not written."""
        path = Path(self.dirpath or "") / "last.ckpt"
        return path if self.dirpath is not None and path.is_file() else None


class MonitorCheck(pl.Callback):
    """Refuses, before training, to monitor what validation does not log; Lightning finds out after an epoch."""

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        logged = list(trainer.callback_metrics)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            monitor = getattr(callback, "monitor", None)
            if monitor is None or monitor in logged or monitor.startswith("train"):
                continue
            key = "checkpoint" if isinstance(callback, ModelCheckpoint) else "early_stopping"
            raise ValueError(
                f"{key}.monitor: validation logs no {monitor!r}.{nearest(monitor, logged)} "
                f"It logs {', '.join(logged) or 'nothing'}."
            )


class LitPeftCLI(LightningCLI):
    """LightningCLI that knows methods, keeps a run in one folder, and reports on it after a fit."""

    def __init__(self) -> None:
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    def __deepcopy__(self, memo: Any) -> "LitPeftCLI":
        """Itself: an `OptimizerCallable` of the command line refers to it, and weight averaging copies the module."""
        return self

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Configuration: a name or a file; repeatable.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(Method, "method", required=True)
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_argument(
            "--resume_every", type=int, default=100, help="Optimizer steps between two writings of last.ckpt."
        )
        parser.add_argument(
            "--base_test",
            type=bool,
            default=True,
            help="Whether fit scores the test set before training, too.",
        )
        parser.set_defaults(
            {
                "early_stopping.monitor": "val/nll",
                "early_stopping.patience": 3,
                "early_stopping.check_on_train_epoch_end": False,  # an epoch may end, by max_steps, unvalidated
                "checkpoint.monitor": "val/nll",
                "checkpoint.filename": "best",
                "checkpoint.save_on_train_epoch_end": False,
                "checkpoint.enable_version_counter": False,
            }
        )

    # --------------------------------------------------------------------------------------- the trainer

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        method = self._get(self.config_init, "method")
        stopper: EarlyStopping = self._get(self.config_init, "early_stopping")
        self.best: ModelCheckpoint = self._get(self.config_init, "checkpoint")
        check_selection(stopper, self.best)
        forced = [*self._callbacks(), stopper, self.best]
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        own = config.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        if config.get("barebones"):  # Lightning refuses everything that could slow it down, these defaults too
            config = {key: value for key, value in config.items() if key not in ("log_every_n_steps", "logger")}
            config["callbacks"] = [method]
            return self.trainer_class(**config)
        if config.get("logger") in (None, True):
            # Only a fit logs: another verb's points would stand in the curves of the run.
            config["logger"] = self._logger(config["default_root_dir"]) if self.subcommand == "fit" else False
        if config.get("logger") is False:
            forced = [c for c in forced if not isinstance(c, LearningRateMonitor)]
        if config.get("enable_checkpointing") is False:
            forced = [c for c in forced if not isinstance(c, ModelCheckpoint)]
        elif isinstance(config.get("logger"), TensorBoardLogger):
            for callback in forced:
                if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                    # Absolute: a resume that names the same folder in another way must find its best checkpoint.
                    callback.dirpath = str(Path(config["logger"].log_dir).resolve() / "checkpoints")
        config["callbacks"] = [method, *own, *forced]
        if self.subcommand == "fit" and not config.get("fast_dev_run") and config.get("logger") is not False:
            resolved = self.config[str(self.subcommand)]
            config["callbacks"].append(SaveConfigCallback(self._parser(self.subcommand), resolved, overwrite=True))
        return self.trainer_class(**config)

    def _callbacks(self) -> list[pl.Callback]:
        self.report = RunReport()
        watching: list[pl.Callback] = [
            MonitorCheck(),
            ReproducibleSteps(),
            SpeedMonitor(),
            LearningRateMonitor(),
            ReliabilityDiagram(),
        ]
        if self.subcommand == "predict":
            run = run_folder(self._get(self.config_init, "ckpt_path"))
            self.predictions = PredictionWriter(str(run / "predictions.jsonl") if run is not None else None)
            watching.append(self.predictions)
        every = self._get(self.config_init, "resume_every")
        self.latest = LatestCheckpoint(every)
        return [*watching, self.report, self.latest]

    def _logger(self, root: str) -> TensorBoardLogger:
        """TensorBoard in <root>/version_N; a run that is taken up again stays in its folder."""
        run = run_folder(self._get(self.config_init, "ckpt_path"))
        if run is None:
            run = claim_folder(Path(root))
        return TensorBoardLogger(str(run.parent), name="", version=run.name, default_hp_metric=False)

    # ------------------------------------------------------------------------------------------ the verbs

    def before_instantiate_classes(self) -> None:
        """Without a checkpoint the other verbs would score an untrained adapter: takes the run's best, or refuses."""
        config = self.config[str(self.subcommand)]
        if self.subcommand == "fit" or config.get("ckpt_path") is not None:
            return
        runs = [Path(str(path)).parent for path in config.get("config") or []]
        best = next((b for b in (run / "checkpoints" / "best.ckpt" for run in reversed(runs)) if b.is_file()), None)
        if best is None:
            raise ValueError(
                f"{self.subcommand} needs the weights of a run: --ckpt_path <run>/checkpoints/best.ckpt, or the run's "
                "own configuration, --config <run>/config.yaml."
            )
        config["ckpt_path"] = str(best)

    def before_fit(self) -> None:
        if (
            self._get(self.config_init, "base_test")
            and is_overridden("test_step", self.model)
            and self._get(self.config_init, "ckpt_path") is None
            and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
            and not self._get(self.config_init, "trainer.barebones")
        ):
            with _without_notices():
                self.report.measure_base(self.trainer, self.model, self.datamodule)

    def after_fit(self) -> None:
        trainer = self.trainer
        if trainer.interrupted or self._get(self.config_init, "trainer.barebones"):
            return
        # A fit too short for a validation has no best checkpoint: its last one is taken.
        best = Path(self.best.best_model_path) if self.best.best_model_path else self.latest.path
        weights = {"datamodule": self.datamodule, "ckpt_path": str(best) if best is not None else None}
        with _without_notices():
            results: list[Any] = []
            if is_overridden("validation_step", self.model):
                with unlogged(trainer):  # the curve of val/* already has its last point, of the last weights
                    results += trainer.validate(self.model, verbose=False, **weights)
            if is_overridden("test_step", self.model):
                results += trainer.test(self.model, verbose=False, **weights)
        scores = {key: float(value) for result in results for key, value in result.items()}
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        logged = any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers)
        steps = [f"tensorboard --logdir {trainer.default_root_dir}"] if logged else []
        if best is not None and (folder / "config.yaml").is_file():
            steps.insert(0, f"lit-peft predict --config {folder / 'config.yaml'} --ckpt_path {_shown(best)}")
        self.report.finish(trainer, self.model, scores, best, steps)

    def after_predict(self) -> None:
        if self.predictions.written is not None and self.trainer.is_global_zero:
            print(f"Predictions: {self.predictions.written}")


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


def claim_folder(root: Path) -> Path:
    """Makes <root>/version_N, N the first number that is free, so that runs started together do not share one.

    Further ranks of a run are started with its environment and take the folder that the first one claimed.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" and "LIT_PEFT_RUN" in os.environ:
        return Path(os.environ["LIT_PEFT_RUN"])
    root.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name.removeprefix("version_")) for p in root.glob("version_*") if p.name[8:].isdigit()]
    number = max(taken, default=-1) + 1
    while True:
        folder = root / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:  # another run was faster
            number += 1
        else:
            os.environ["LIT_PEFT_RUN"] = str(folder)
            return folder


def _shown(path: Path) -> Path:
    """A path as a user would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def run_folder(checkpoint: str | None) -> Path | None:
    """The run that a checkpoint file belongs to, <run>/checkpoints/x.ckpt, or None."""
    path = Path(checkpoint) if checkpoint else None
    return path.parent.parent if path is not None and path.is_file() and path.parent.name == "checkpoints" else None


def run(arguments: list[str]) -> None:
    """Runs one verb of LightningCLI; a mistake in the arguments ends in one to three lines and status 2."""
    _quiet()
    # As `python -m` does, and the console script does not: a module of the user's is found from its folder. Last, so
    # that a folder named like an installed package, `datasets` for instance, does not take its place.
    if not {"", str(Path.cwd())}.intersection(sys.path):
        sys.path.append(str(Path.cwd()))
    # What is imported can be named without its module.
    for package in (lit_peft.data, lit_peft.tasks):
        for name in package.__all__:
            getattr(package, name)
    for entry in available().values():
        entry.load()
    RunReport.running = False
    sys.argv[1:] = arguments  # not handed over: further ranks are started with the command line
    try:
        LitPeftCLI()
    except (ValueError, FileNotFoundError, ConnectionError, MisconfigurationException) as error:
        # Once batches run, an error is the code's and not the command line's: its traceback is wanted.
        if RunReport.running or os.environ.get("LIT_PEFT_TRACEBACK") == "1":
            raise
        fail(essence(str(error)))


@contextmanager
def _without_notices() -> Iterator[None]:
    """Keeps Lightning from telling which file it restores, while a fit scores its own checkpoints."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def _quiet() -> None:
    """Silences what other packages print at every start and nobody can act on."""
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
