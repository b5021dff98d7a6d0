"""Merging into the weights from before quantising: they are in a second module, which is built without it."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl

from lit_peft.core.quantize import stored_as
from lit_peft.methods.base import Method
from lit_peft.saving.adapter_folder import AdapterFolder
from lit_peft.training.bringing import methods


def unquantised(trainer: Any, module: pl.LightningModule, ckpt_path: str | None) -> tuple[Any, AdapterFolder]:
    """A copy of a module that is not built yet, or not quantised yet, and the callback that brings what was trained.

    Args:
        trainer: Whose methods quantise it.
        module: The module, before the trainer has seen it.
        ckpt_path: The checkpoint to merge; None: the adapter folder among the trainer's methods.

    Raises:
        ValueError: When it is quantised already, or no file holds what was trained.
    """
    own = methods(trainer)
    source = ckpt_path or next((method.path for method in own if isinstance(method, AdapterFolder)), None)
    if stored_as(module) or source is None:
        why = "is quantised already" if stored_as(module) else "was trained in memory, and no checkpoint is given"
        raise ValueError(
            f"into is 'original', but this {type(module).__name__} {why}: its original weights are not in it. In "
            "Python: lit_peft.load(model, FOLDER_OR_CHECKPOINT, quantize=None) on the float model, then "
            "lit_peft.saving.merged.save_merged(model, NEW_FOLDER)."
        )
    attached, module._trainer = module._trainer, None
    try:
        return copy.deepcopy(module), AdapterFolder(str(source), own[0].name, quantize=None)
    finally:
        module._trainer = attached


def restore_unquantised(trainer: Any, module: Any, folder: AdapterFolder, restore: Callable[[], None]) -> None:
    """Builds the copy and loads what was trained onto it.

    A trainer's own way to restore a checkpoint would refuse a base that is stored otherwise than in training.

    Args:
        trainer: The trainer.
        module: The copy.
        folder: What brings it.
        restore: Has the trainer build the copy, and run nothing.
    """
    with _in_place_of_methods(trainer, folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*by what quantising rounds")  # which is what was asked for
        restore()


def check_float(module: pl.LightningModule) -> None:
    """Raises ValueError where the base comes in few bits, though no method asks for that."""
    if kinds := set(stored_as(module).values()):
        raise ValueError(
            f"into is 'original', but the base itself is stored quantised, {' and '.join(sorted(kinds))}: its original "
            "weights are not there. Choose dequantized, or in Python load the adapter onto the float model, "
            "lit_peft.load(model, FOLDER_OR_CHECKPOINT, quantize=None), and merge that one."
        )


@contextmanager
def _in_place_of_methods(trainer: Any, folder: AdapterFolder) -> Iterator[None]:
    own = trainer.callbacks
    trainer.callbacks = [folder, *(callback for callback in own if not isinstance(callback, Method))]
    try:
        yield
    finally:
        trainer.callbacks = own
