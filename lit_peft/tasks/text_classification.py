"""Sequence classification with any transformers model that has a head for it."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import AdamW

from lit_peft import hub
from lit_peft.class_path import imported
from lit_peft.core.checkpoint import read_archive
from lit_peft.methods.checks import check_choice, check_positive, check_range
from lit_peft.metrics import classification_metrics
from lit_peft.saving.folder import load
from lit_peft.tasks.loading import BaseStorage, load_classifier
from lit_peft.tasks.optim import Schedule, build_optimizer, warmup_schedule
from lit_peft.training.checkpointing import checkpoint_activations
from lit_peft.training.liger import use_liger
from lit_peft.training.rates import methods_on

Batch = dict[str, Tensor]
BACKBONE_PATH = "backbone_path"
"""Key of a checkpoint."""
_LIGHTNINGS = {"map_location", "hparams_file", "strict", "weights_only"}
"""Arguments of Lightning's own `load_from_checkpoint`."""


class TextClassification(pl.LightningModule):
    """Classifies texts, or pairs of texts, with a transformers sequence-classification model.

    The model is built in `configure_model`, in training mode. Whatever `from_pretrained` reports as newly
    initialised (the head, a missing pooler) is named by `train_also`, so that every method trains and saves it.
    Logs `train/loss`; in evaluation acc, f1, mcc, nll, brier and ece under `val/` or `test/`.

    Args:
        backbone: Model to start from: a hub id, a local folder, or demo for the bundled encoder.
        label_names: Names of the classes in the order of their codes; null: the data module's.
        learning_rate: Peak learning rate; null: the method's own (1e-3; full fine-tuning 5e-5).
        optimizer: Optimizer, called with the parameter groups; its rate and decay are set by the arguments here. null:
            the method's own, AdamW, of QLoRA PagedAdamW. bitsandbytes' AdamW8bit, PagedAdamW and PagedAdamW8bit keep
            their state in 8 bit, or let it move to host memory where a GPU is full.
        weight_decay: Decay of base weights that train (the head, or the whole model); never of biases and norms.
        adapter_weight_decay: Decay of adapter tensors, which are small by construction.
        schedule: How the rate falls after the warm-up: linear, cosine, or constant.
        warmup: Share of the steps over which the rate rises.
        class_weights: Weights of the classes in the loss: one number each, or balanced for the inverse of their
            frequencies; null: equal.
        dtype: Dtype in which the frozen base is loaded. bfloat16 halves its memory; what trains stays float32.
        compile: Compile the model in place for training; pays off when batches are large or epochs many.
        gradient_checkpointing: Compute each block again in the backward pass and keep its input alone: less memory for
            a third more time, at the same gradients. offload keeps those inputs in host memory.
        kernels: liger trains with Liger's kernels, on a GPU and for the architectures that Liger knows; it needs the
            extra of that name. null: with torch's.
    """

    def __init__(
        self,
        backbone: str = hub.DEMO,
        label_names: Sequence[str] | None = None,
        learning_rate: float | None = None,
        optimizer: OptimizerCallable | None = None,
        weight_decay: float = 0.01,
        adapter_weight_decay: float = 0.0,
        schedule: Schedule = "linear",
        warmup: float = 0.06,
        class_weights: Literal["balanced"] | Sequence[float] | None = None,
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
        self.label_names = None if label_names is None else list(label_names)
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.weight_decay, self.adapter_weight_decay = weight_decay, adapter_weight_decay
        self.schedule: Schedule = schedule
        self.warmup = warmup
        self.class_weights = class_weights
        self.base_dtype = getattr(torch, dtype)
        self.compiles = compile
        self.gradient_checkpointing = gradient_checkpointing
        self.kernels = kernels
        self.model: Any = None
        self.train_also: list[str] = []
        self.loss_weights: Tensor | None = None

    # ------------------------------------------------------------------------------------------- the model

    def setup(self, stage: str) -> None:
        """Takes the classes from the data module, or holds it to the ones that are known.

        Our data modules encode labels by the known names; the order of another one's codes must be the model's.
        To predict with known classes, the data need no labels, and what labels there are do not matter.
        """
        if stage == "predict" and self.label_names is not None:
            return
        names = list(getattr(getattr(self.trainer, "datamodule", None), "label_names", None) or [])
        if self.label_names is None:
            if not names:
                raise ValueError("The classes are unknown: give label_names, or a data module that has them.")
            self.label_names = names
            self.hparams["label_names"] = names
        elif names and names != self.label_names:
            raise ValueError(
                f"The data's classes are {', '.join(names)}; this model's are {', '.join(self.label_names)}. Their "
                "order is the order of the codes, so a file that lacks a class cannot be scored as it is."
            )

    def configure_model(self) -> None:
        if self.model is None:
            self._build()
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self.use_kernels(self.trainer.strategy.root_device)  # elsewhere a run may be used without a GPU

    def use_kernels(self, device: torch.device) -> None:
        """Lets the model, which is built, train on the `kernels` that were asked for; see `use_liger`."""
        if self.kernels is not None:
            use_liger(self.model, device)

    def _build(self) -> None:
        if self.label_names is None:
            raise ValueError("The classes are unknown: give label_names when there is no trainer.")
        classes = len(self.label_names)
        self.model, fresh = load_classifier(self.backbone, self.label_names, self.base_dtype, BaseStorage.of(self))
        if self.gradient_checkpointing:
            checkpoint_activations(self.model, offload=self.gradient_checkpointing == "offload")
        self.train_also = [f"model.{name}" for name in fresh]
        self.val_metrics = classification_metrics(classes, "val/")
        self.test_metrics = classification_metrics(classes, "test/")

    def sample(self, size: int, length: int) -> Batch:
        """A batch of so many texts of that length, or of the longest that the model takes; on the meta device."""
        length = min(length, getattr(self.model.config, "max_position_embeddings", length))
        ids = torch.empty(size, length, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "attention_mask": torch.empty_like(ids), "labels": ids[:, 0]}

    def _class_weights(self, counts: Sequence[int] | None) -> Tensor | None:
        if self.class_weights is None or self.label_names is None:
            return None
        if self.class_weights == "balanced":
            if not counts:
                raise ValueError("class_weights: balanced needs a data module with class_counts.")
            frequency = torch.tensor(counts, dtype=torch.float32)
            return frequency.sum() / (len(frequency) * frequency)
        weights = torch.tensor([float(w) for w in self.class_weights])
        if len(weights) != len(self.label_names):
            raise ValueError(
                f"class_weights has {len(weights)} numbers; there are {len(self.label_names)} classes: "
                f"{', '.join(self.label_names)}."
            )
        if not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
            raise ValueError(f"model.class_weights is {weights.tolist()}, expected numbers from 0, not all of them 0.")
        return weights

    def forward(self, batch: Batch) -> Tensor:
        """Logits in float32, [batch, classes], of one batch of the data module; its labels are not looked at."""
        return self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()

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
        known = inspect.signature(cls.__init__).parameters
        saved = {key: value for key, value in content["hyper_parameters"].items() if key in known}
        own = {key: value for key, value in kwargs.items() if key not in _LIGHTNINGS}
        if unknown := sorted(own.keys() - known.keys()):
            raise TypeError(f"{cls.__name__} has no argument {unknown[0]!r}; it has {', '.join(list(known)[1:])}.")
        task = cls(**saved | own)
        load(task, checkpoint_path)
        return task.eval()

    def folder_record(self) -> dict[str, Any]:
        """What an adapter folder says of the task: `lit-peft predict --adapter` starts from it, without the run."""
        return {"backbone": self.backbone, "label_names": self.label_names}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes where a local base is: `backbone` may be seen from the folder in which this process began."""
        path = Path(self.backbone).expanduser()
        if path.is_dir() and self.backbone != hub.DEMO:
            checkpoint[BACKBONE_PATH] = str(path.resolve())

    # --------------------------------------------------------------------------------------------- the loop

    def on_fit_start(self) -> None:
        self.model.train()  # `load_from_checkpoint` gives evaluation mode, which Lightning keeps: no dropout
        data = getattr(self.trainer, "datamodule", None)
        weights = self._class_weights(getattr(data, "class_counts", None))
        self.loss_weights = None if weights is None else weights.to(self.device)
        if self._scheduled != self._schedule_key():
            # A LearningRateFinder or BatchSizeFinder has come in between: the schedule starts from another rate, or
            # ends after another number of steps. Lightning itself sets the rate of the groups and nothing else.
            self.trainer.strategy.setup_optimizers(self.trainer)
        if self.compiles:
            self.model.compile()  # in place, after attaching: torch.compile(model) would rename every parameter

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["labels"], weight=self.loss_weights)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_metrics.update(self(batch), batch["labels"])
        self.log_dict(self.val_metrics, prog_bar=False, batch_size=len(batch["labels"]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_metrics.update(self(batch), batch["labels"])
        self.log_dict(self.test_metrics, batch_size=len(batch["labels"]))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dict a text: `label`, its name; `probability` of it; `probabilities` of all classes by name."""
        assert self.label_names is not None
        rows = self(batch).softmax(-1).tolist()
        return [
            {
                "label": self.label_names[max(range(len(row)), key=row.__getitem__)],
                "probability": max(row),
                "probabilities": dict(zip(self.label_names, row, strict=True)),
            }
            for row in rows
        ]

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
