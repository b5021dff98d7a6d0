"""The verbs that run a trainer: LightningCLI with a `method:` beside `model:`, `data:` and `trainer:`."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

import lit_peft.data
import lit_peft.tasks
from lit_peft.arguments import change_method, join_quantize, name_optimizers, settings
from lit_peft.callbacks import (
    PeakPrediction,
    PredictionWriter,
    ReliabilityDiagram,
    ReproducibleSteps,
    RunReport,
    SpeedMonitor,
)
from lit_peft.callbacks.checkpoints import CHECKS, LatestCheckpoint, check_selection
from lit_peft.callbacks.report import shown, unlogged
from lit_peft.class_path import imported
from lit_peft.cli import fail
from lit_peft.core.files import atomic_path
from lit_peft.data.held_out import trained_data
from lit_peft.faults import TrainingFault
from lit_peft.handover.paths import PLACED, USAGE
from lit_peft.handover.trainer import Trainer
from lit_peft.limits import check_nulls, check_settings
from lit_peft.methods.base import Method
from lit_peft.methods.registry import available
from lit_peft.mistakes import FULL, explain, of_built, of_system
from lit_peft.quiet import be_quiet, without_notices
from lit_peft.runs import (
    claim_folder,
    claim_given,
    free_file,
    give_back_folder,
    is_first_rank,
    lock_folder,
    newest_checkpoint,
    remove_parts,
    run_folder,
    unlock_folders,
)
from lit_peft.start import find_files, given_options, knowledge, starting_checkpoint
from lit_peft.training import paged
from lit_peft.training.liger import check_liger
from lit_peft.training.seam import check_names
from lit_peft.trying import TextPrinter, take_texts, use_adapter

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs",
    "max_epochs": 3,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the table of sites says it better
}


class Parser(LightningArgumentParser):
    """Tells a mistake in a few lines instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        fail(explain(message, sys.argv[1:]))


class RunConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder, whatever logs; a resumed run does not name what it resumed from.

    It writes over the one of a run only when its checkpoint is restored: a refused one leaves the run as it was.
    """

    def __init__(self, folder: Path, parser: LightningArgumentParser, config: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.config.get("ckpt_path") is None:
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")  # once only, as in `setup`

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        config = self.config.clone()
        config["ckpt_path"] = None
        with atomic_path(self.folder / self.config_filename) as part:
            self.parser.save(config, part, skip_none=False, overwrite=True)


class LitPeftCLI(LightningCLI):
    """LightningCLI that knows methods, keeps a run in one folder, and reports on it after a fit.

    Args:
        texts: Texts to predict in the place of a data set, and to print the answers to.
        pairs: The second text of each, for tasks on pairs.
    """

    def __init__(self, texts: Sequence[str] = (), pairs: Sequence[str] = ()) -> None:
        self.texts, self.pairs = list(texts), list(pairs)
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=Trainer,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verb that is asked for, or all; verb -> arguments of the trainer's method that are no options."""
        verbs = LightningCLI.subcommands() | {verb: {"model", "datamodule"} for verb in (*PLACED, "plan")}
        asked = {verb: skipped for verb, skipped in verbs.items() if verb in sys.argv[1:2]}
        return asked or verbs  # the parser of each takes a tenth of a second

    def __deepcopy__(self, memo: Any) -> "LitPeftCLI":
        """Itself: an `OptimizerCallable` of the command line refers to it, and weight averaging copies the module."""
        return self

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = Parser(**kwargs, allow_abbrev=False)  # an abbreviation could mean another option tomorrow
        parser.add_argument("-c", "--config", action="config", help="Configuration: a name or a file; repeatable.")
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser: LightningArgumentParser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in PLACED:  # `place` makes it of the second path, and refuses it from a user
            parser.description = USAGE.format(verb=subcommand)
            next(action for action in parser._actions if action.dest == "out").help = argparse.SUPPRESS
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(Method, "method", required=True)
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_argument(
            "--resume_every", type=int, default=100, help="Optimizer steps between two writings of last.ckpt."
        )
        parser.add_argument(
            "--base_test", type=bool, default=True, help="Whether fit scores the test set before training, too."
        )
        parser.add_argument(
            "--predictions",
            type=str | None,
            default=None,
            help="File that predict writes; null: predictions.jsonl in the run's folder, numbered where it exists; "
            "with --text, none.",
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

    # ------------------------------------------------------------------------------------ checkpoints to start from

    def _parse_ckpt_path(self) -> None:
        """Finds the checkpoint, and takes from it what it recorded of the model.

        What options say is kept, and what a configuration says that stands behind the run's own: `--run R --config
        more.yaml`. Another configuration gives way, as it does with Lightning.
        """
        config = self.config[self.config.subcommand]
        config["ckpt_path"] = starting_checkpoint(self.config.subcommand, config)
        given = (config.get("model") or {}).get("init_args") or {}
        run = run_folder(config["ckpt_path"])
        said: dict[str, Any] = {}
        behind = False
        for setting in settings(sys.argv[1:], "model"):
            if behind or setting.source.startswith("--"):
                said |= {name: given[name] for name in setting.init_args if name in given}
            behind = behind or (run is not None and Path(setting.source) == run / "config.yaml")
        super()._parse_ckpt_path()
        config = self.config[self.config.subcommand]
        for name, value in said.items():
            config.model.init_args[name] = value
        known = knowledge(config)
        self.trained_on = trained_data(known)
        find_files(config, known)

    # --------------------------------------------------------------------------------------- the trainer

    def before_instantiate_classes(self) -> None:
        config = self.config[str(self.subcommand)]
        check_settings(config)
        for section in ("model", "data", "method"):
            if (part := config.get(section)) is not None:
                check_nulls(section, imported(part.class_path), part.get("init_args") or {})

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        method = self._get(self.config_init, "method")
        stopper: EarlyStopping = self._get(self.config_init, "early_stopping")
        self.best: ModelCheckpoint = self._get(self.config_init, "checkpoint")
        check_selection(stopper, self.best)
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        for key in ("max_epochs", "max_steps", "limit_train_batches"):
            if self.subcommand == "fit" and config.get(key) == 0:
                raise ValueError(f"trainer.{key} is 0: fit would train nothing. To score what there is: lit-peft test.")
        own = config.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        self.folder: Path | None = None
        self.predictions: PredictionWriter | None = None
        if config.get("barebones"):  # Lightning refuses everything that could slow it down, these defaults too
            config = {key: value for key, value in config.items() if key not in ("log_every_n_steps", "logger")}
            return self._trainer(config | {"callbacks": [method, *own]})
        keeps = self.subcommand == "fit" and not config.get("fast_dev_run")
        if keeps:
            self.folder = self._folder(config)
        if config.get("logger") in (None, True):
            # Only a fit logs: another verb's points would stand in the curves of the run.
            folder = self.folder
            config["logger"] = folder is not None and TensorBoardLogger(
                str(folder.parent), name="", version=folder.name, default_hp_metric=False
            )
        self.latest = LatestCheckpoint(self._get(self.config_init, "resume_every"))
        forced = [*self._callbacks(), stopper, self.best, self.latest]  # the last one records what the others know
        if not config["logger"]:
            forced = [c for c in forced if not isinstance(c, LearningRateMonitor)]
        if config.get("enable_checkpointing") is False:
            forced = [c for c in forced if not isinstance(c, Checkpoint)]
        if self.folder is not None:
            for callback in forced:
                if isinstance(callback, ModelCheckpoint | LatestCheckpoint) and callback.dirpath is None:
                    # Absolute: a resume that names the same folder in another way must find its best checkpoint.
                    callback.dirpath = str(self.folder.resolve() / "checkpoints")
            forced.append(RunConfig(self.folder, self._parser(self.subcommand), self.config[str(self.subcommand)]))
        return self._trainer(config | {"callbacks": [method, *own, *forced]})

    def _trainer(self, arguments: dict[str, Any]) -> pl.Trainer:
        check_names([c for c in arguments["callbacks"] if isinstance(c, Method)])  # Lightning's answer names no way out
        try:
            return self.trainer_class(**arguments)
        except (TypeError, AttributeError, KeyError, ArithmeticError) as error:  # of a value that it did not expect
            raise ValueError(f"trainer: {error}") from error

    def _callbacks(self) -> list[pl.Callback]:
        self.report = RunReport(None if self.folder is None else str(self.folder))
        watching: list[pl.Callback] = [
            *(check() for check in CHECKS),
            ReproducibleSteps(),
            SpeedMonitor(),
            PeakPrediction(),
            LearningRateMonitor(),
            ReliabilityDiagram(),
        ]
        if self.texts:
            watching.append(TextPrinter(self.texts))
        if self.subcommand == "predict" and (not self.texts or self._get(self.config_init, "predictions")):
            run = run_folder(self._get(self.config_init, "ckpt_path")) or Path()
            self.predictions = PredictionWriter(str(free_file(self._get(self.config_init, "predictions"), run)))
            watching.append(self.predictions)
        return [*watching, self.report]

    def _folder(self, config: dict[str, Any]) -> Path:
        """The run's folder: that of a logger which the user brings, of the run that goes on, or a new one."""
        given = self._get(self.config_init, "ckpt_path")
        root = Path(config["default_root_dir"])
        run = run_folder(given)
        loggers = config.get("logger")
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if (folder := getattr(logger, "log_dir", None)) is not None:
                if run is None or run.resolve() != Path(folder).resolve():
                    claim_given(Path(folder))
                return self._locked(Path(folder), clean=run is not None)
        if run is None and given == "hpc" and (last := newest_checkpoint(root, "last")) is not None:
            run = last.parent.parent  # the same job, started again
        return self._locked(run or claim_folder(root), clean=run is not None)

    @staticmethod
    def _locked(folder: Path, clean: bool) -> Path:
        if is_first_rank():
            lock_folder(folder)
            if clean:
                remove_parts(folder)
        return folder

    # ------------------------------------------------------------------------------------------ the verbs

    def before_fit(self) -> None:
        if getattr(self.model, "kernels", None) == "liger":
            check_liger(self.trainer.strategy.root_device)  # not after the test before training, which may take long
        if (
            self._get(self.config_init, "base_test")
            and is_overridden("test_step", self.model)
            and self._get(self.config_init, "ckpt_path") is None
            and self.folder is not None
        ):
            for role in ("train", "val") if hasattr(self.datamodule, "check") else ():
                self.datamodule.check(role)  # likewise
            with without_notices():
                self.report.measure_base(self.trainer, self.model, self.datamodule)

    def before_validate(self) -> None:
        self._remember("val_split")

    def before_test(self) -> None:
        self._remember("test_split")

    def before_merge(self) -> None:
        if self._get(self.config_init, "score"):
            self._remember("test_split")

    def before_plan(self) -> None:
        asked = str(self._get(self.config_init, "trainer", default={}).get("precision"))
        if asked in ("16-mixed", "16") and isinstance(self.trainer, Trainer):
            self.trainer.planned_precision = "16-mixed"  # on a CPU Lightning has put bfloat16 in its place

    def _remember(self, split: str) -> None:
        """Before the data are read: the checkpoint, which tells them later, would be late, and an adapter has none."""
        if not hasattr(self.datamodule, "remember"):
            return
        self.datamodule.remember(self.trained_on, named=split in given_options("data"))
        if not self.trained_on and self.trainer.is_global_zero:
            print("Which rows these weights were trained on is not known: any that are among these are scored, too.")

    def after_fit(self) -> None:
        trainer = self.trainer
        if trainer.barebones:
            print("barebones: no checkpoint, adapter, metrics or curves were written.")
            return
        if not RunReport.running and trainer.is_global_zero:
            done = f"{trainer.global_step:,} steps"
            print(f"Nothing was left to train: the run had ended after {done}; --trainer.max_epochs N goes on with it.")
        # A fit too short for a validation has no best checkpoint: its last one is taken.
        best = Path(self.best.best_model_path) if self.best.best_model_path else self.latest.path
        weights = {"datamodule": self.datamodule, "ckpt_path": str(best) if best is not None else None}
        with without_notices():
            results: list[Any] = []
            if is_overridden("validation_step", self.model) and trainer.limit_val_batches:
                with unlogged(trainer):  # the curve of val/* already has its last point, of the last weights
                    results += trainer.validate(self.model, verbose=False, **weights)
            if is_overridden("test_step", self.model) and trainer.limit_test_batches:
                results += trainer.test(self.model, verbose=False, **weights)
        scores = {key: float(value) for result in results for key, value in result.items()}
        steps = []
        answers = is_overridden("forward", self.model) or is_overridden("predict_step", self.model)
        if self.folder is not None and best is not None and answers:
            tries = {
                lit_peft.tasks.TextClassification: "a great movie",
                lit_peft.tasks.CausalLanguageModeling: "It is never dull.",
                lit_peft.tasks.MaskedLanguageModeling: "It is never {mask}.",
            }
            text = next((f' --text "{text}"' for task, text in tries.items() if isinstance(self.model, task)), "")
            if "{mask}" in text:
                text = text.format(mask=self.model.tokenizer.mask_token)
            steps.append(f"lit-peft predict --run {shown(self.folder)}{text}")
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            steps.append(f"tensorboard --logdir {trainer.default_root_dir}")
        self.report.finish(trainer, self.model, scores, best, steps)

    def before_predict(self) -> None:
        if not self.texts:
            return
        if not hasattr(self.datamodule, "use_texts"):
            raise ValueError(f"--text: {type(self.datamodule).__name__} has no use_texts(texts, pairs) to take them.")
        self.datamodule.use_texts(self.texts, self.pairs or None)

    def after_predict(self) -> None:
        if self.predictions is not None and self.predictions.written is not None and self.trainer.is_global_zero:
            print(f"Predictions: {self.predictions.written}")


def run(arguments: list[str]) -> None:
    """Runs one verb of LightningCLI; a mistake in the arguments ends in one to three lines and status 2."""
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
    arguments = name_optimizers(arguments, paged.NAMES, "bitsandbytes.optim")
    if any(name in str(setting.init_args) for setting in settings(arguments, "model") for name in paged.NAMES):
        import_module("bitsandbytes.optim")  # takes two seconds
    RunReport.running = False
    if is_first_rank():
        os.environ.pop("LIT_PEFT_RUN", None)
    try:
        words, texts, pairs = take_texts(arguments)
        words, changes = change_method(join_quantize(words))
        if is_first_rank() and "--json=true" not in words:
            print("\n".join(changes), end="\n" * bool(changes))
        sys.argv[1:] = use_adapter(words, texts)  # not handed over: further ranks start with the command line
        be_quiet(words[0], bool(texts))
        LitPeftCLI(texts, pairs)
    except (ValueError, OSError, MisconfigurationException, UnpicklingError) as error:
        # Once batches run, an error is the code's and not the command line's: its traceback is wanted.
        full = isinstance(error, OSError) and error.errno in FULL
        told = full or isinstance(error, TrainingFault)
        if (RunReport.running and not told) or os.environ.get("LIT_PEFT_TRACEBACK") == "1":
            raise
        fail(of_system(error, arguments[0]) if isinstance(error, OSError) and error.errno else of_built(error))
    finally:
        unlock_folders()
        if not RunReport.running and sys.exc_info()[0] is not None:
            give_back_folder()
