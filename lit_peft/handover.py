"""The verbs `merge` and `export`: what a run trained as a plain model, or as HF PEFT's adapter, in a new folder."""

import json
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import nn
from transformers.utils.logging import disable_progress_bar

from lit_peft.callbacks.logits import LogitsComparison
from lit_peft.callbacks.report import RunReport
from lit_peft.core import hf_peft
from lit_peft.core.attach import registry
from lit_peft.core.merge import merge
from lit_peft.data.base import TextDataModule
from lit_peft.merge_report import REPORT, describe, find_tokenizer, finite, fixed_inputs, print_merged, size_of, verify
from lit_peft.methods.base import Method
from lit_peft.methods.describe import why_not_mergeable
from lit_peft.methods.full import FullFineTuning
from lit_peft.methods.registry import method_class
from lit_peft.saving.adapter_folder import AdapterFolder
from lit_peft.saving.folder import save
from lit_peft.saving.folder_record import open_folder
from lit_peft.saving.merged import check_foldable, find_model, not_foldable, write_model
from lit_peft.saving.new_folder import new_folder
from lit_peft.training.seam import methods

_OURS = "The run's adapter folder holds it, for lit_peft.load and `lit-peft predict --adapter`."


class Trainer(pl.Trainer):
    """Lightning's trainer with two verbs more, of which the command line makes subcommands."""

    def merge(
        self,
        model: pl.LightningModule,
        datamodule: Any = None,
        out: str = "",
        score: bool = True,
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
            ckpt_path: Checkpoint to merge.
            weights_only: Whether only weights are unpickled from it.
        """
        for cls in _classes(self):
            if why := why_not_mergeable(cls):
                raise ValueError(not_foldable(cls, why))
        scored = score and is_overridden("test_step", model) and bool(self.limit_test_batches)
        logits = LogitsComparison()
        weights: dict[str, Any] = {"ckpt_path": ckpt_path, "weights_only": weights_only}
        disable_progress_bar()
        if scored:
            before = _scores(self, model, datamodule, [_Check(), logits], **weights)
        else:
            _restore(self, model, datamodule, **weights)
        root = find_model(model)
        check_foldable(model)
        tokenizer = find_tokenizer(model, datamodule, root.model)
        folders = [method.path for method in methods(self) if isinstance(method, AdapterFolder)]
        report = describe(model, root) | {"checkpoint": ckpt_path, "adapter": next(iter(folders), None)}
        report["metrics"] = None
        if scored:
            merge(model)
            after = _scores(_without_methods(self), model, datamodule, [logits.compare()])
            difference = {key: after[key] - value for key, value in before.items() if key in after}
            report["metrics"] = {"before": before, "after": after, "difference": difference}
        else:
            inputs = fixed_inputs(root.model, tokenizer)
            logits.ask(root.model, inputs)
            merge(model)
            logits.compare().ask(root.model, inputs)
        RunReport.running = False  # what may go wrong from here is told in a few lines again
        report |= logits.figures() | {"precision": str(self.precision) if scored else None}
        report["measured_on"] = ("test set" if scored else "fixed inputs") if logits.rows else None
        with new_folder(out) as part:
            write_model(root.model, part, tokenizer)
            report["dtype"] = json.loads((part / "config.json").read_text())["dtype"]
            report["reloaded_max_logit_difference"] = verify(root.model, part, logits, out)
            (part / REPORT).write_text(json.dumps(finite(report), indent=2) + "\n")
        print_merged(Path(out), report, tokenizer, getattr(datamodule, "max_length", None))

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
        _restore(self, model, datamodule, ckpt_path=ckpt_path, weights_only=weights_only)
        state = registry(model)
        assert state is not None
        with new_folder(out) as part:
            for name in state.adapters:
                folder = save(model, part if name == "default" else part / name, name)
                if _peft_type(folder).startswith(hf_peft.OwnForm.hf_peft["peft_type"]):
                    raise ValueError(_why_own_form(model, name))
        _print_exported(Path(out), list(state.adapters), model)


_STAGES = {
    "test_step": ("test", "limit_test_batches"),
    "validation_step": ("validate", "limit_val_batches"),
    "predict_step": ("predict", "limit_predict_batches"),
}


class _Check(pl.Callback):
    """Refuses what cannot be merged once it is known, before any batch is scored."""

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        find_model(pl_module)
        check_foldable(pl_module)


def _classes(trainer: pl.Trainer) -> list[type[Method]]:
    """Classes of the trainer's methods; of an adapter folder the one that its record names."""
    found = []
    for method in methods(trainer):
        cls: type[Method] | None = type(method)
        if isinstance(method, AdapterFolder):
            mine = open_folder(method.path)[2] if Path(method.path).is_dir() else None
            cls = None if mine is None else method_class(next(iter(mine["methods"].values()))["class_path"])
        if cls is not None:
            found.append(cls)
    return found


def _scores(
    trainer: Any, model: Any, data: Any, callbacks: list[pl.Callback], ckpt_path: str | None = None, **options: Any
) -> dict[str, float]:
    """Metrics of the test set, with further callbacks."""
    _check_whole(ckpt_path)
    trainer.callbacks = [*callbacks, *trainer.callbacks]
    try:
        results = trainer.test(model, datamodule=data, verbose=False, ckpt_path=ckpt_path, **options)
    except SIGTERMException:  # with which Lightning would end the process as if all were well
        raise SystemExit(143) from None
    return {key: float(value) for result in results for key, value in result.items()}


def _restore(trainer: Any, model: Any, data: Any, ckpt_path: str | None, **options: Any) -> None:
    """Builds, adapts and restores a module as a trainer does, and runs no batch of it.

    Data of ours are not read: their classes are in the checkpoint or folder. A module of somebody's own may ask those
    of its own for what it is built by.
    """
    _check_whole(ckpt_path)
    verb, limit = next(names for hook, names in _STAGES.items() if hook == "predict_step" or is_overridden(hook, model))
    before = getattr(trainer, limit)
    setattr(trainer, limit, 0)
    source = {"dataloaders": []} if data is None or isinstance(data, TextDataModule) else {"datamodule": data}
    getattr(trainer, verb)(model, **source, ckpt_path=ckpt_path, **options)
    setattr(trainer, limit, before)


def _check_whole(path: str | None) -> None:
    """Raises ValueError for a checkpoint that takes several ranks."""
    if path is not None and Path(path).is_dir():
        adapter = Path(path).parents[1] / "adapter"
        hint = f" The run's adapter folder can be handed over: {adapter}" if adapter.is_dir() else ""
        raise ValueError(f"{path} is a checkpoint in shards, which one process alone cannot read.{hint}")


def _without_methods(trainer: Any) -> pl.Trainer:
    """The trainer with nothing among its callbacks that adapts a model or watches a run."""
    trainer.callbacks = [callback for callback in trainer.callbacks if isinstance(callback, ProgressBar)]
    return trainer


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
    has: Any = getattr(cls, "hf_has", lambda *_: True)
    if missing := next((site for site, addition in root.pairs(adapter) if not has(site, addition)), None):
        why = f"HF PEFT does not have it at {missing.path}, a {type(missing.layer).__name__}."
    else:
        why = f"HF PEFT would open it on {type(root.model).__name__} and compute something else"
        why += "; trained with as_hf_peft: true it is the same there." if "as_hf_peft" in cls.parameters() else "."
    return _why_not_exportable(cls) or f"{cls.__name__} cannot be exported: {why} {_OURS}"


def _peft_type(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["peft_type"]


def _print_exported(out: Path, names: list[str], module: nn.Module) -> None:
    folders = [out if name == "default" else out / name for name in names]
    model = hf_peft.find_root(module).model
    task = next((ending for ending in hf_peft.TASKS if type(model).__name__.endswith(ending)), None)
    auto = "AutoModel" + (task or "").replace("LMHeadModel", "ForCausalLM")
    head = f", num_labels={model.config.num_labels}" if task and "Classification" in task else ""  # type: ignore[union-attr]
    console = Console(soft_wrap=False)
    for folder in folders:
        config = json.loads((folder / "adapter_config.json").read_text())
        base, net = config["base_model_name_or_path"], "net"
        if base is not None:
            net = f'{auto}.from_pretrained("{base}"{head})'
        for line in (
            f"Adapter: {folder} ({size_of(folder)}), {config['peft_type']} in Hugging Face PEFT",
            "  from peft import PeftModel" + (f"; from transformers import {auto}" if base is not None else ""),
            f'  model = PeftModel.from_pretrained({net}, "{folder}")',
        ):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
