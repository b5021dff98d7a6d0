"""Where methods meet Lightning: attach when the model is configured, save little, load strictly, guard the start.

Order of a fit: callback.setup -> module.setup -> configure_model (build, attach, shard: here) -> a checkpoint's
weights -> precision's convert_module -> configure_optimizers -> on_fit_start -> a checkpoint's optimizer state.
"""

import errno
import functools
import importlib
import io
import math
import os
import pickle
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from lit_peft.core.active import run_again
from lit_peft.core.buffers import base_buffers
from lit_peft.core.checkpoint import (
    CheckpointMismatch,
    adapter_keys,
    adapter_of,
    check_record,
    check_tensors,
    fixed_keys,
    record,
    take_moved,
)
from lit_peft.core.files import atomic_path, check_archive, check_content, told_as_damage
from lit_peft.core.memory import measured
from lit_peft.core.records import CONFIG, check_checkpoint
from lit_peft.core.registry import registry
from lit_peft.core.swap import Swapped, restore_class, swap_class, swapped_class
from lit_peft.runs import run_folder
from lit_peft.training.averaging import averaged_moved, copy_again, is_a, leave_base_out, put_base_in, take_average
from lit_peft.training.bringing import activate_saved, bring, methods, methods_of
from lit_peft.training.optimizers import BEGAN, BUILT, check_began
from lit_peft.training.sharding import shard, write_one_file

if TYPE_CHECKING:
    from lit_peft.methods.base import Method

BUILT_IN = "_lit_peft_built_in"
"""Where a module keeps how much memory it took to load the base, quantise it and attach; see `lit_peft.core.memory`."""
NO_PLUGIN = (
    "BitsandbytesPrecision turns every linear layer into frozen 4-bit weights, adapters and head included, so that "
    "nothing trains. Leave the plugin out and let the method quantise the base: LoRA(quantize='nf4'), on the command "
    "line --method.quantize nf4."
)


class AdaptedLightningModule(Swapped):
    """What a LightningModule becomes when a trainer brings it a method; its own hooks run inside these."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """From here on the module may be built."""
        super().setup(*args, **kwargs)  # type: ignore[misc]
        self.__dict__["_lit_peft_early"] = False

    def configure_model(self) -> None:
        """Builds (the module's own), attaches, shards. Runs again for every trainer call and does nothing then."""
        module: Any = self
        if module.__dict__.get("_lit_peft_early"):  # a WeightAveraging calls it in its own setup, before ours
            return
        if module._trainer is None:
            super().configure_model()  # type: ignore[misc]
            return
        with measured(module.trainer.strategy.root_device) as growth:
            super().configure_model()  # type: ignore[misc]
            bring(module, module.trainer)
        module.__dict__.setdefault(BUILT_IN, growth)  # later calls build nothing
        if registry(module) is not None:
            copy_again(module.trainer, module)
        shard(module)
        if registry(module) is None:  # detached, and no method came with this trainer
            _uninstall(module)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the methods' penalties to the loss, at the weight of the batch where the module gives it one."""
        output = super().training_step(*args, **kwargs)  # type: ignore[misc]
        for method in methods_of(self):
            # None: the module skips this batch.
            penalty = None if output is None else method.penalty(self)  # type: ignore[arg-type]
            if penalty is not None:
                if (weight := getattr(self, "batch_weight", None)) is not None:
                    penalty = penalty * weight
                if isinstance(output, Mapping):
                    output = {**output, "loss": output["loss"] + penalty}
                else:
                    output = output + penalty
        return output

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Lets the methods act once the parameters have moved."""
        super().optimizer_step(*args, **kwargs)  # type: ignore[misc]
        for method in methods_of(self):
            method.after_optimizer_step(self)  # type: ignore[arg-type]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen base out; this hook also runs for `save_weights_only`, a callback's does not."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        module: Any = self
        state = registry(module)
        if state is None:  # detached since: the whole model
            return
        if not state.active:
            raise ValueError(
                f"{type(self).__name__} runs none of its adapters, and a checkpoint holds those that run: "
                f"lit_peft.set_active(module, {sorted(state.adapters)})."
            )
        if module.trainer.state.fn == "fit":
            take_average(checkpoint, module.trainer)
            state.moved |= averaged_moved(module.trainer)
        keys = adapter_keys(module)
        leave_base_out(checkpoint, keys)
        prepared = [name for name in state.active if state.adapters[name].prepared]
        logged = {name: float(value) for name, value in module.trainer.callback_metrics.items()}
        checkpoint["lit_peft"] = record(module, keys) | {
            "prepared": prepared,
            "optimizers": module.__dict__.get(BEGAN),
            "metrics": {name: value for name, value in logged.items() if math.isfinite(value)},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses what does not fit, by name; Lightning itself loads adapters without being strict."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        may_change = {method.name: method.may_change for method in methods_of(self)}
        module: Any = self
        where = str(getattr(module._trainer, "ckpt_path", None) or "The checkpoint")
        check_checkpoint(check_content(checkpoint, where).get("lit_peft"), where)
        fitting, state = module._trainer is not None and module._trainer.state.fn == "fit", registry(module)
        before = None if state is None else state.running()
        activate_saved(module, checkpoint["lit_peft"], fitting)
        # A strategy that has sharded the module loads its tensors before this hook and takes them out.
        tensors = checkpoint.get("state_dict")
        try:
            folder = _adapter_folder(where)
            check_record(module, checkpoint["lit_peft"], tensors, may_change, resumes=fitting, folder=folder)
            check_tensors(module, tensors or {}, where, buffers=False)
        except CheckpointMismatch:
            if before is not None:
                run_again(module, before)
            raise
        take_moved(module, checkpoint["lit_peft"])
        for name in registry(module).active:  # type: ignore[union-attr]
            registry(module).adapters[name].prepared = name in checkpoint["lit_peft"].get("prepared", [name])  # type: ignore[union-attr]
        if module._trainer is not None:
            _check_resume(module._trainer)
        if fitting:
            module.__dict__[BEGAN] = checkpoint["lit_peft"].get("optimizers")
            check_began(module)
        put_base_in(checkpoint, module, fitting=fitting)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Strict about adapters, whatever `strict` says; a base that is not in the file is not missing.

        Raises:
            CheckpointMismatch: When a tensor of an adapter, or a place for one, is missing.
        """
        module: Any = self
        if registry(module) is not None:
            fixed, places = fixed_keys(module), module.state_dict().keys()
            own = {key for key in fixed if adapter_of(key)}
            given = {key for key in state_dict if adapter_of(key)}
            if lost := sorted((own - given) | (given - places)):  # of adapters that do not run none need be there
                what = "lacks" if lost[0] in own else "holds, without a place for it,"
                raise CheckpointMismatch(f"The state dict {what} {lost[0]}; {len(lost)} tensors of adapters differ.")
            strict = strict and not state_dict.keys() <= fixed | base_buffers(module).keys()
        return super().load_state_dict(state_dict, strict, assign)  # type: ignore[misc]


class AtomicCheckpointIO(Swapped):
    """Lightning's checkpoint files, written beside their place and renamed: a killed run leaves no half of one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)  # type: ignore[misc]
            return
        with atomic_path(path) as part:
            try:
                torch.save(checkpoint, part)
            except RuntimeError as error:  # torch's archive writer has no other for a full disk
                if shutil.disk_usage(part.parent).free < (1 << 20):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
                raise

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuses a file that is damaged, or no checkpoint, by name; a folder is a strategy's to read."""
        if "://" in str(path) or Path(path).is_dir():
            return super().load_checkpoint(path, *args, **kwargs)  # type: ignore[misc]
        check_archive(path, contents=True)
        with told_as_damage(path):
            content = super().load_checkpoint(path, *args, **kwargs)  # type: ignore[misc]
        return check_content(content, path)


def install(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Prepares a module for the methods; runs in each method's `setup`, before the model is configured.

    Raises:
        ValueError: For a plugin that would quantise the adapters, a precision that cannot train them, callbacks
            that copy the module before the adapters are there, or two methods of one name.
    """
    check_names(methods(trainer))
    last = trainer.callbacks.index(methods(trainer)[-1])  # type: ignore[attr-defined]
    for i, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        averages = is_a(callback, "WeightAveraging")
        if is_a(callback, "StochasticWeightAveraging") or (averages and i < last):
            way_out = "Put it after the methods" if averages else "Use EMAWeightAveraging, after the methods"
            raise ValueError(
                f"{type(callback).__name__} copies the module before the adapters are there, so that it would average "
                f"nothing. {way_out}."
            )
    plugin = trainer.strategy.precision_plugin
    if is_a(plugin, "BitsandbytesPrecision"):
        raise ValueError(NO_PLUGIN)
    if plugin.precision == "16-true":
        raise ValueError("precision 16-true has no loss scaling, and float16 adapters underflow; use 16-mixed.")
    if plugin.precision == "bf16-true" and any(m.adapter_dtype == "float32" for m in methods(trainer)):
        raise ValueError(
            "precision bf16-true casts everything to bfloat16, adapter_dtype float32 included; use bf16-mixed with "
            "a base loaded in bfloat16, or adapter_dtype auto."
        )
    writer = type(trainer.strategy.checkpoint_io)
    if writer.__name__ == "TorchCheckpointIO" and not issubclass(writer, AtomicCheckpointIO):
        trainer.strategy.checkpoint_io = swapped_class(AtomicCheckpointIO, writer)()
    write_one_file(trainer.strategy)
    adapt(module)
    for key in (BUILT, BEGAN):
        module.__dict__.pop(key, None)
    module.__dict__["_lit_peft_early"] = any(is_a(c, "WeightAveraging") for c in trainer.callbacks)  # type: ignore[attr-defined]


def check_names(methods: Sequence["Method"]) -> None:
    """Raises ValueError where two methods of a trainer have one name."""
    names = [method.name for method in methods]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{names.count(name)} methods are named {name!r}; give each a `name` of its own.")


def adapt(module: Any) -> None:
    """Gives a LightningModule its adapted class; nothing to a module of another kind."""
    if is_a(module, "LightningModule") and not isinstance(module, AdaptedLightningModule):
        swap_class(module, AdaptedLightningModule)
        module.__dict__["_lit_peft_strict"] = module.strict_loading
        module.strict_loading = False  # the base is not in the file; `on_load_checkpoint` is strict about the rest


def build(module: Any) -> None:
    """Lets a LightningModule build the layers that it makes in `configure_model`, as its trainer would."""
    if is_a(module, "LightningModule") and module._trainer is None:
        module.configure_model()


def _check_resume(trainer: pl.Trainer) -> None:
    """Refuses a finder in a resumed fit: Lightning restores its checkpoint last, and counts from step 0."""
    finders = [c for c in trainer.callbacks if is_a(c, "LearningRateFinder") or is_a(c, "BatchSizeFinder")]  # type: ignore[attr-defined]
    own = Path(str(trainer.ckpt_path)).name.startswith((".lr_find_", ".scale_batch_size_"))
    if finders and trainer.state.fn == "fit" and not own:
        raise ValueError(
            f"{type(finders[0]).__name__} would make the resumed fit start anew, from these weights: it puts a "
            "checkpoint of its own in the place of yours. Leave it out, and set what it found before."
        )


def _uninstall(module: Any) -> None:
    restore_class(module, AdaptedLightningModule)
    module.strict_loading = module.__dict__.pop("_lit_peft_strict")
    module.__dict__.pop("_lit_peft_early", None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype for a while: Lightning's is bfloat16 under bf16-true."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_hyperparameters(trainer: Any, module: Any) -> None:
    """Refuses hyperparameters with which a checkpoint could be written and not be read: objects of other classes.

    Raises:
        ValueError: Naming the first of the module or the data module, and the way out.
    """
    for owner in (module, trainer.datamodule) if trainer.checkpoint_callbacks else ():
        for name, value in getattr(owner, "hparams", {}).items():
            file = io.BytesIO()
            try:
                torch.save(value, file)
                torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            except (pickle.PickleError, AttributeError, TypeError):
                raise ValueError(
                    f"{type(owner).__name__} keeps {name!r}, of the class {type(value).__name__}, as a hyperparameter: "
                    "a checkpoint with it could not be read again. Leave it out, "
                    f"self.save_hyperparameters(ignore=[{name!r}])."
                ) from None


def _adapter_folder(checkpoint: str) -> str:
    """The adapter folder of the run that a checkpoint lies in, where it is there."""
    run = run_folder(checkpoint)
    return str(run / "adapter") if run is not None and (run / "adapter" / CONFIG).is_file() else "FOLDER"


def guard_load_from_checkpoint(saving: Any) -> None:
    """Makes `Net.load_from_checkpoint(path)` say what to do with a checkpoint that holds adapters alone.

    Lightning would ask for the whole base, or under `strict=False` drop the adapters with a warning, and it has no
    hook on a class that knows nothing of us. The one place that all such loads pass is a private function; where a
    release has it not, Lightning's own answer stays.

    Args:
        saving: The module `core.saving` of Lightning.
    """
    plain = getattr(saving, "_load_state", None)
    if plain is None or hasattr(plain, "_lit_peft"):
        return

    @functools.wraps(plain)
    def load_state(cls: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "lit_peft" in checkpoint and any(base.__name__ == "LightningModule" for base in cls.__mro__):
            check_checkpoint(checkpoint["lit_peft"], "This checkpoint")
            made = ", ".join(
                spec["class_path"].rpartition(".")[2] for spec in checkpoint["lit_peft"]["methods"].values()
            )
            raise CheckpointMismatch(
                f"This checkpoint holds what {made} trained, and not the base: build {cls.__name__} with its base, "
                "then lit_peft.load(module, path)."
            )
        return plain(cls, checkpoint, *args, **kwargs)

    load_state._lit_peft = True  # type: ignore[attr-defined]
    saving._load_state = load_state


for _tree in ("lightning.pytorch", "pytorch_lightning"):
    if _tree in sys.modules:
        guard_load_from_checkpoint(importlib.import_module(f"{_tree}.core.saving"))
