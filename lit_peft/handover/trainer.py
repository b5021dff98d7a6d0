"""The verbs `merge` and `export`: what a run trained as a plain model, or as HF PEFT's adapter, in a new folder.

And `plan`, which needs a trainer as little as they do, and its settings as much.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from json import dumps
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import nn
from transformers.utils.logging import disable_progress_bar

from lit_peft.callbacks.logits import LogitsComparison
from lit_peft.callbacks.report import RunReport
from lit_peft.core import hf_peft
from lit_peft.core.folder_files import open_record
from lit_peft.core.merge import Into, check_into, merge
from lit_peft.core.quantize import make_quantizer
from lit_peft.core.records import CONFIG
from lit_peft.core.registry import registry
from lit_peft.data.base import TextDataModule
from lit_peft.handover.original import check_float, restore_unquantised, unquantised
from lit_peft.handover.report import REPORT, finite, report_of
from lit_peft.handover.text import print_exported, print_merged
from lit_peft.handover.verifying import find_tokenizer, fixed_inputs, verify
from lit_peft.methods.base import Method
from lit_peft.methods.describe import why_not_mergeable
from lit_peft.methods.full import FullFineTuning
from lit_peft.methods.registry import method_class
from lit_peft.planning.gpus import gpu_bytes
from lit_peft.planning.run import plan_run, title
from lit_peft.planning.text import as_json, table
from lit_peft.saving.adapter_folder import AdapterFolder
from lit_peft.saving.folder import save
from lit_peft.saving.merged import changed, check_foldable, find_model, not_foldable, write_model
from lit_peft.saving.new_folder import new_folder, resolved
from lit_peft.training.bringing import methods

_OURS = "The run's adapter folder holds it, for lit_peft.load and `lit-peft predict --adapter`."


class Trainer(pl.Trainer):
    """Lightning's trainer with three verbs more, of which the command line makes subcommands."""

    planned_precision: str | None = None
    """That of the run which `plan` plans, where a CPU has it not; null: the trainer's."""

    def merge(
        self,
        model: pl.LightningModule,
        datamodule: Any = None,
        out: str = "",
        score: bool = True,
        into: Into | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write the model with its adapter folded in, as a folder for plain transformers.

        Args:
            model: The module.
            datamodule: Its data.
            out: The new folder.
            score: Whether to score the test set before and after. Otherwise the logits of a few fixed inputs are
                compared, and no data are read.
            into: Of a base in 4 or 8 bit, what the adapter is folded into: dequantized, the base as training saw it, a
                plain float model; requantized, that in as few bits again, which rounds it; original, the float weights
                from before quantising. What each changes is measured against the adapter on the base in few bits.
            ckpt_path: Checkpoint to merge.
            weights_only: Whether only weights are unpickled from it.
        """
        for cls in _classes(self):
            if why := why_not_mergeable(cls):
                raise ValueError(not_foldable(cls, why))
        storage = [made for method in methods(self) if (made := method.base_storage()) is not None]
        if storage and into is None:
            check_into([make_quantizer(made).stored_as for made in storage], into)
        original = unquantised(self, model, ckpt_path) if into == "original" and storage else None

        disable_progress_bar()
        scored = score and is_overridden("test_step", model) and bool(self.limit_test_batches)
        weights: dict[str, Any] = {"ckpt_path": ckpt_path, "weights_only": weights_only}
        with new_folder(out) as part:
            _restore(self, model, datamodule, scored=scored, **weights)
            trained, target = find_model(model), model
            if original is not None:
                target, folder = original
                restore_unquantised(self, target, folder, partial(_restore, self, target, datamodule, None, scored))
            if into == "original":
                check_float(target)
            check_foldable(target, into)
            merged = find_model(target)
            tokenizer = find_tokenizer(model, datamodule, trained.model)

            folders = [method.path for method in methods(self) if isinstance(method, AdapterFolder)]
            report = report_of(model, trained, into) | {"checkpoint": ckpt_path, "adapter": next(iter(folders), None)}
            fold = partial(merge, target, into=into)
            pair = (model, trained), (target, merged)
            logits = LogitsComparison()
            if scored:
                report |= _merge_scored(self, *pair, fold, datamodule, logits, **weights)
            else:
                report |= _merge_asked(*pair, fold, tokenizer, logits)

            RunReport.running = False  # what may go wrong from here is told in a few lines again
            write_model(merged.model, part, tokenizer)
            report["dtype"] = json.loads((part / "config.json").read_text())["dtype"]
            report["reloaded_max_logit_difference"] = verify(merged.model, part, logits, out)
            (part / REPORT).write_text(json.dumps(finite(report), indent=2) + "\n")
            place = resolved(out)
        print_merged(place, report, merged.model, tokenizer, getattr(datamodule, "max_length", None))

    def export(
        self,
        model: pl.LightningModule,
        datamodule: Any = None,
        out: str = "",
        format: Literal["hf-peft"] = "hf-peft",
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Write the adapter as a folder that Hugging Face PEFT opens.

        Args:
            model: The module.
            datamodule: Its data, which are not read.
            out: The new folder.
            format: Whose adapter folder.
            ckpt_path: Checkpoint to export.
            weights_only: Whether only weights are unpickled from it.
        """
        for cls in _classes(self):
            if why := _why_not_exportable(cls):
                raise ValueError(why)
        with new_folder(out) as part:
            _restore(self, model, datamodule, ckpt_path=ckpt_path, weights_only=weights_only)
            state = registry(model)
            assert state is not None
            names = list(state.adapters)
            root = hf_peft.find_root(model, changed(model))
            for name in names:
                folder = save(model, part if name == "default" else part / name, name)
                if _peft_type(folder).startswith(hf_peft.OwnForm.hf_peft["peft_type"]):
                    raise ValueError(_why_own_form(model, name))
            place = resolved(out)
        print_exported(place, names, root.model)

    def plan(
        self,
        model: pl.LightningModule,
        datamodule: Any = None,
        gpu: str | None = None,
        alternatives: bool = True,
        json: bool = False,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Tell what memory a training step will take, by part, and whether it fits a GPU.

        Args:
            model: The module.
            datamodule: Its data.
            gpu: H100, A100-40GB, T4, ..., or a size, 24GiB; null: the one that is here.
            alternatives: Whether to plan other methods and storages of the base beside it.
            json: Whether to print JSON instead of a table.
            ckpt_path: A run's checkpoint, as `--run FOLDER` names it; of it the classes are taken, and no weights.
            weights_only: Passed over; the configuration of a run has it.
        """
        found_gpu = gpu_bytes(gpu)
        found, about = plan_run(self, model, datamodule, found_gpu, alternatives, self.planned_precision)
        if json:
            print(dumps(as_json(found, about, found_gpu), indent=2))
        else:
            Console().print(table(found, title(about), found_gpu), highlight=False)


_STAGES = {
    "test_step": ("test", "limit_test_batches"),
    "validation_step": ("validate", "limit_val_batches"),
    "predict_step": ("predict", "limit_predict_batches"),
}


def _classes(trainer: pl.Trainer) -> list[type[Method]]:
    """Classes of the trainer's methods; of an adapter folder the one that its record names."""
    found = []
    for method in methods(trainer):
        cls: type[Method] | None = type(method)
        if isinstance(method, AdapterFolder):
            mine = open_record(method.path) if Path(method.path).is_dir() else None
            cls = None if mine is None else method_class(next(iter(mine["methods"].values()))["class_path"])
        if cls is not None:
            found.append(cls)
    return found


Placed = tuple[Any, hf_peft.Root]
"""A module, and the transformers model in it."""


def _merge_scored(
    trainer: Any,
    trained: Placed,
    merged: Placed,
    fold: Callable[[], None],
    data: Any,
    logits: LogitsComparison,
    **weights: Any,
) -> dict[str, Any]:
    """Scores the test set as trained, folds the adapters in, scores it merged: what a report says of both."""
    before = _scores(trainer, *trained, data, logits, **weights)
    fold()
    with _without_methods(trainer):
        after = _scores(trainer, *merged, data, logits.compare())
    difference = {key: after[key] - value for key, value in before.items() if key in after}
    figures = logits.figures() | {"precision": str(trainer.precision)}
    figures["measured_on"] = "test set" if figures["rows"] else None
    return figures | {"metrics": {"before": before, "after": after, "difference": difference}}


def _merge_asked(
    trained: Placed, merged: Placed, fold: Callable[[], None], tokenizer: Any, logits: LogitsComparison
) -> dict[str, Any]:
    """The same with a few inputs that are always the same, and no metrics."""
    model = trained[1].model
    try:
        batches = fixed_inputs(model, tokenizer)
    except Exception:  # somebody's tokenizer: what it cannot make is not asked
        batches = []
    for batch in batches:
        logits.ask(model, batch)
    fold()
    logits.compare()
    for batch in batches:
        logits.ask(merged[1].model, batch)
    figures = logits.figures() | {"precision": None, "metrics": None}
    figures["measured_on"] = "fixed inputs" if figures["rows"] else None
    return figures


def _scores(
    trainer: Any, model: Any, root: hf_peft.Root, data: Any, logits: LogitsComparison, **weights: Any
) -> dict[str, float]:
    """Metrics of the test set, its answers taken; with one seed, so that random data are the same every time."""
    own = trainer.callbacks
    trainer.callbacks = [logits, *own]
    pl.seed_everything(int(os.environ.get("PL_GLOBAL_SEED", 0)), workers=True, verbose=False)
    try:
        results = trainer.test(model, datamodule=data, verbose=False, **weights)
    except FileNotFoundError as error:
        if RunReport.running or not isinstance(data, TextDataModule):
            raise
        raise FileNotFoundError(f"{error} Name where the data are, --data.path FILE, or --score false.") from error
    except SIGTERMException:  # with which Lightning would end the process as if all were well
        raise SystemExit(143) from None
    finally:
        trainer.callbacks = own
        if model.get_submodule(root.path) is not root.model:  # whatever came of it
            raise ValueError(
                f"{type(model).__name__} builds its model anew each time a trainer runs it, so that it cannot be "
                "scored before and after: build it once (`if self.net is None` in setup or configure_model), or "
                "--score false."
            )
    return {key: float(value) for result in results for key, value in result.items()}


def _restore(trainer: Any, model: Any, data: Any, ckpt_path: str | None, scored: bool = False, **options: Any) -> None:
    """Builds, adapts and restores a module as a trainer does, and runs no batch of it.

    What data of ours say is in the checkpoint or folder, and they are not read. Those of somebody's own are where they
    are scored anyway, or where the module cannot be built without them.
    """
    _check_whole(ckpt_path)
    own = None if isinstance(data, TextDataModule) else data
    verb, limit = next(names for hook, names in _STAGES.items() if hook == "predict_step" or is_overridden(hook, model))
    run, before = getattr(trainer, verb), getattr(trainer, limit)
    setattr(trainer, limit, 0)
    try:
        if scored and own is not None:
            return run(model, datamodule=own, ckpt_path=ckpt_path, **options)
        try:
            run(model, dataloaders=[], ckpt_path=ckpt_path, **options)
        except (AttributeError, TypeError, KeyError):  # of a `trainer.datamodule` that is None
            if own is None:
                raise
            run(model, datamodule=own, ckpt_path=ckpt_path, **options)
    finally:
        setattr(trainer, limit, before)


def _check_whole(path: str | None) -> None:
    """Raises ValueError for a checkpoint that takes several ranks."""
    if path is not None and Path(path).is_dir():
        adapter = Path(path).parents[1] / "adapter"
        hint = f" The run's adapter folder can be handed over: {adapter}" if adapter.is_dir() else ""
        raise ValueError(f"{path} is a checkpoint in shards, which one process alone cannot read.{hint}")


@contextmanager
def _without_methods(trainer: Any) -> Iterator[None]:
    """Without what adapts a model, or watches our runs, among a trainer's callbacks: a test may need the others."""
    own = trainer.callbacks
    trainer.callbacks = [c for c in own if not isinstance(c, Method) and not type(c).__module__.startswith("lit_peft.")]
    try:
        yield
    finally:
        trainer.callbacks = own


# -------------------------------------------------------------------------------------------------------- an adapter


def _why_not_exportable(cls: type[Method]) -> str | None:
    """What is told of a method of which HF PEFT has no folder, whatever it is on."""
    if issubclass(cls, FullFineTuning):
        return f"{cls.__name__} trains the model itself, there is no adapter: `lit-peft merge` writes the model."
    if cls.build is Method.build or hf_peft.has_form(cls):
        return None
    return f"{cls.__name__} cannot be exported: HF PEFT has no such method. {_OURS}"


def _why_own_form(module: nn.Module, name: str) -> str:
    """What is told of an adapter that was written in our own form, though HF PEFT may have its method."""
    state = registry(module)
    assert state is not None
    adapter = state.adapters[name]
    cls: Any = method_class(adapter.spec["class_path"])
    root = hf_peft.find_root(module, [*adapter.sites, *adapter.base])
    if missing := hf_peft.first_lacking(cls, root.pairs(adapter)):
        why = f"HF PEFT does not have it at {missing.path}, a {type(missing.layer).__name__}."
    else:
        why = f"HF PEFT would open it on {type(root.model).__name__} and compute something else"
        why += "; trained with as_hf_peft: true it is the same there." if "as_hf_peft" in cls.parameters() else "."
    return _why_not_exportable(cls) or f"{cls.__name__} cannot be exported: {why} {_OURS}"


def _peft_type(folder: Path) -> str:
    return json.loads((folder / CONFIG).read_text())["peft_type"]
