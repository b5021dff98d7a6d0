"""What tasks over a transformers model share: how it is built, stored, saved and optimised."""

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW

from lit_peft import hub
from lit_peft.class_path import imported
from lit_peft.core.files import read_archive
from lit_peft.methods.checks import check_choice, check_positive, check_range
from lit_peft.saving.folder import load
from lit_peft.tasks.loading import BaseStorage, check_tokenizer, load_model, max_positions
from lit_peft.tasks.optim import Schedule, build_optimizer, warmup_schedule
from lit_peft.training.checkpointing import checkpoint_activations
from lit_peft.training.liger import use_liger
from lit_peft.training.rates import methods_on
from lit_peft.training.sharding import shard_blocks

Batch = dict[str, Tensor]
BACKBONE_PATH = "backbone_path"
"""Key of a checkpoint."""
_LIGHTNINGS = {"map_location", "hparams_file", "strict", "weights_only"}
"""Arguments of Lightning's own `load_from_checkpoint`."""


class TransformersTask(pl.LightningModule):
    """Base of the tasks: a transformers model, `self.model`, with its optimizer and schedule.

    The model is built in `configure_model`, in training mode. Whatever `from_pretrained` reports as newly
    initialised (a head, a missing pooler) is named by `train_also`, so that every method trains and saves it.

    A subclass names the `auto_class`, makes its metrics in `build_metrics`, and defines the steps.

    Args:
        backbone: Model to start from: a hub id, a local folder, or demo for the bundled encoder.
        learning_rate: Peak learning rate; null: the method's own (1e-3; full fine-tuning 5e-5).
        optimizer: Optimizer, called with the parameter groups; its rate and decay are set by the arguments here. null:
            the method's own, AdamW, of QLoRA PagedAdamW. bitsandbytes' AdamW8bit, PagedAdamW and PagedAdamW8bit keep
            their state in 8 bit, or let it move to host memory where a GPU is full.
        weight_decay: Decay of base weights that train (the head, or the whole model); never of biases and norms.
        adapter_weight_decay: Decay of adapter tensors, which are small by construction.
        schedule: How the rate falls after the warm-up: linear, cosine, or constant.
        warmup: Share of the steps over which the rate rises.
        dtype: Dtype in which the frozen base is loaded. bfloat16 halves its memory; what trains stays float32.
        compile: Compile the model in place for training; pays off when batches are large or epochs many.
        gradient_checkpointing: Compute each block again in the backward pass and keep its input alone: less memory for
            a third more time, at the same gradients. offload keeps those inputs in host memory.
        kernels: liger trains with Liger's kernels, on a GPU and for the architectures that Liger knows; it needs the
            extra of that name. null: with torch's.
    """

    auto_class: ClassVar[str]
    """Name of the class of transformers that loads the model."""

    def __init__(
        self,
        backbone: str = hub.DEMO,
        learning_rate: float | None = None,
        optimizer: OptimizerCallable | None = None,
        weight_decay: float = 0.01,
        adapter_weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        warmup: float = 0.06,
        dtype: Literal["float32", "bfloat16"] = "float32",
        compile: bool = False,
        gradient_checkpointing: bool | Literal["offload"] = False,
        kernels: Literal["liger"] | None = None,
    ) -> None:
        super().__init__()
        check_choice("model.gradient_checkpointing", str(gradient_checkpointing).lower(), ("false", "true", "offload"))
        check_choice("model.kernels", "null" if kernels is None else kernels, ("liger", "null"))
        if compile and gradient_checkpointing == "offload":
            raise ValueError(
                "model.gradient_checkpointing: offload copies beside the computation, which a compiled model does not; "
                "set it to true, or compile to false."
            )
        check_range("model.warmup", warmup, 0, 1)
        check_range("model.weight_decay", weight_decay, 0)
        check_range("model.adapter_weight_decay", adapter_weight_decay, 0)
        if learning_rate is not None:
            check_positive("model.learning_rate", learning_rate)
        self.save_hyperparameters(ignore=["optimizer"])
        self.backbone = backbone
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.weight_decay, self.adapter_weight_decay = weight_decay, adapter_weight_decay
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.base_dtype = getattr(torch, dtype)
        self.compiles = compile
        self.gradient_checkpointing = gradient_checkpointing
        self.kernels = kernels
        self.model: Any = None
        self.train_also: list[str] = []

    @classmethod
    def arguments(cls) -> dict[str, inspect.Parameter]:
        """The constructor's arguments by name, those that it passes on to its base classes included."""
        found: dict[str, inspect.Parameter] = {}
        for base in cls.__mro__:
            if issubclass(base, TransformersTask):
                for p in list(inspect.signature(base.__init__).parameters.values())[1:]:
                    if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                        found.setdefault(p.name, p)
        return found

    # ------------------------------------------------------------------------------------------- the model

    def configure_model(self) -> None:
        if self.model is None:
            self._build()
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.use_kernels(self.trainer.strategy.root_device)  # elsewhere a run may be used without a GPU

    def shard(self, mesh: Any) -> None:
        """Spreads the model over the devices of a `ModelParallelStrategy`; runs once adapters are attached."""
        shard_blocks(self.model, mesh)

    def use_kernels(self, device: torch.device) -> None:
        """Lets the model, which is built, train on the `kernels` that were asked for; see `use_liger`."""
        if self.kernels is not None:
            use_liger(self.model, device)

    def _build(self) -> None:
        self.model, fresh = self.load_model(BaseStorage.of(self))
        if self.gradient_checkpointing:
            checkpoint_activations(self.model, offload=self.gradient_checkpointing == "offload")
        self.train_also = [f"model.{name}" for name in fresh]
        self.build_metrics()

    def load_model(self, storage: BaseStorage | None) -> tuple[Any, list[str]]:
        """The model, and the names of the parameters that are new; see `lit_peft.tasks.loading.load_model`."""
        return load_model(self.auto_class, self.backbone, self.base_dtype, storage)

    def build_metrics(self) -> None:
        """Makes `val_metrics` and `test_metrics`, once the model is there."""
        raise NotImplementedError(f"{type(self).__name__} must define build_metrics().")

    def sample_ids(self, size: int, length: int) -> Batch:
        """Ids and mask of so many texts of that length, or of the longest that the model takes; on the meta device."""
        length = min(length, getattr(self.model.config, "max_position_embeddings", length))
        ids = torch.empty(size, length, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "attention_mask": torch.empty_like(ids)}

    @cached_property
    def max_positions(self) -> int | None:
        """Tokens of the longest text that the model has positions for, null where it knows no end; data keep to it."""
        return max_positions(self.backbone, self.model)

    def check_tokenizer(self, name: str, tokenizer: Any) -> None:
        """Whether the model can read what a data module's tokenizer writes; see `lit_peft.tasks.loading`.

        Data are set up before the model is built: a subclass that resizes its embeddings overrides this.
        """
        check_tokenizer(name, tokenizer, self.backbone, self.model)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Rebuilds the task of a run: the base, the methods that the checkpoint records, and what they trained.

        Args:
            checkpoint_path: A run's `.ckpt`.
            *args: Lightning's further arguments, for a checkpoint that no method wrote.
            **kwargs: The same; and arguments of the task in the place of those that were saved, `backbone` where
                the base lies elsewhere now.

        Returns:
            The task, on the CPU and in evaluation mode.

        Raises:
            FileNotFoundError: When there is no such file.
            CheckpointMismatch: When the file is damaged, or the base is another.
        """
        content = read_archive(checkpoint_path)
        if "lit_peft" not in content:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        known = cls.arguments()
        saved = {key: value for key, value in content["hyper_parameters"].items() if key in known}
        own = {key: value for key, value in kwargs.items() if key not in _LIGHTNINGS}
        if unknown := sorted(own.keys() - known.keys()):
            raise TypeError(f"{cls.__name__} has no argument {unknown[0]!r}; it has {', '.join(known)}.")
        task = cls(**saved | own)
        load(task, checkpoint_path)
        return task.eval()

    def folder_record(self) -> dict[str, Any]:
        """What an adapter folder says of the task: `lit-peft predict --adapter` starts from it, without the run."""
        return {"backbone": self.backbone}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes where a local base is: `backbone` may be seen from the folder in which this process began."""
        path = Path(self.backbone).expanduser()
        if path.is_dir() and self.backbone not in hub.BUNDLED:
            checkpoint[BACKBONE_PATH] = str(path.resolve())

    # --------------------------------------------------------------------------------------------- the loop

    def on_fit_start(self) -> None:
        self.model.train()  # `load_from_checkpoint` gives evaluation mode, which Lightning keeps: no dropout
        if self._scheduled != self._schedule_key():
            # A LearningRateFinder or BatchSizeFinder has come in between: the schedule starts from another rate, or
            # ends after another number of steps. Lightning itself sets the rate of the groups and nothing else.
            self.trainer.strategy.setup_optimizers(self.trainer)
        if self.compiles:
            self.model.compile()  # in place, after attaching: torch.compile(model) would rename every parameter

    def _schedule_key(self) -> tuple[float | None, float]:
        return self.learning_rate, self.trainer.estimated_stepping_batches

    def configure_optimizers(self) -> OptimizerLRScheduler:
        self._scheduled = self._schedule_key()
        lr, make = self.learning_rate, self.optimizer
        method = next(iter(methods_on(self)), None)
        if lr is None:
            lr = 5e-5 if method is None else method.learning_rate
        if make is None:
            make = AdamW if method is None else imported(method.optimizer)
        optimizer = build_optimizer(self, make, lr, self.weight_decay, self.adapter_weight_decay)
        schedule = warmup_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches, self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
