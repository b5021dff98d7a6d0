"""Full fine-tuning: the yardstick that the other methods are held against."""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lit_peft.core.registry import Adapter
from lit_peft.methods.base import Method
from lit_peft.training.averaging import is_a
from lit_peft.training.rates import base_depths


class FullFineTuning(Method):
    """Trains every parameter of the base. Its checkpoints hold the whole model, and no copy of the base is kept.

    With `unfreeze_every`, block by block from the top: gradual unfreezing, Howard and Ruder 2018, "Universal Language
    Model Fine-tuning for Text Classification", section 3.3. Of n blocks, block k first moves at step
    `(n - 1 - k) * unfreeze_every`, embeddings at `n * unfreeze_every`, what stands above the blocks and a head that the
    module itself names at once; blocks are those of `layer_decay`, which goes with it. Until then a block is bit for
    bit the base: its gradients are taken away before the optimizer sees them, so that neither momentum nor weight decay
    moves it, nor does it count in clipping. They are computed all the same (`requires_grad` stays, so that DDP and
    sharding hold): a step costs what it costs otherwise, only the optimizer's state comes later. Running statistics of
    batch norms move from the start.

    Args:
        unfreeze_every: Optimizer steps from one block to the next below: a whole number of steps, or, below 1, a share
            of all steps of the run, .1 for instance. The paper unfreezes a layer an epoch, which short runs of deep
            models do not have. null: everything trains from the start.
        **common: See `Method`.
    """

    learning_rate = 5e-5  # BERT's own range (Devlin et al. 2019, appendix A.3); 1e-3 destroys the pretraining
    keep_originals = False

    def __init__(self, unfreeze_every: int | float | None = None, **common: Any) -> None:
        super().__init__(**common)
        if unfreeze_every is not None:
            whole = isinstance(unfreeze_every, int) and not isinstance(unfreeze_every, bool) and unfreeze_every >= 1
            if not whole and not (isinstance(unfreeze_every, float) and 0 < unfreeze_every < 1):
                raise ValueError(
                    "unfreeze_every must be a whole number of steps from 1, or a share of them above 0 and below 1, "
                    f"not {unfreeze_every!r}."
                )
        self.unfreeze_every = unfreeze_every
        self._starts: dict[str, int] = {}

    def trains(self, name: str) -> bool:
        return True

    def lacks_gradient(self, name: str) -> bool:
        return True  # a model may hold parameters that its loss does not use, a pooler for instance

    def attach(self, module: nn.Module, dtype: torch.dtype | None = None) -> Adapter:
        if self.unfreeze_every is not None and not any(base_depths(module).values()):
            raise ValueError(
                f"unfreeze_every: {type(module).__name__} has no blocks, numbered modules such as layer.0, to unfreeze "
                "one after another; leave it out."
            )
        return super().attach(module, dtype)

    def notes(self, module: nn.Module) -> list[str]:
        if self.unfreeze_every is None:
            return []
        n, every = max(base_depths(module).values()), self.unfreeze_every
        after = "{:,} steps" if isinstance(every, int) else "{:.4g} of the steps"
        return [
            f"Blocks unfreeze from the top: the last of {n} and what stands above it train at once, then one more "
            f"every {after.format(every)}; embeddings after {after.format(n * every)}."
        ]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.unfreeze_every is None:
            return
        if not pl_module.automatic_optimization or is_a(trainer.strategy, "DeepSpeedStrategy"):
            raise ValueError(
                "unfreeze_every takes gradients away before the trainer's one optimizer steps, which manual "
                "optimization and DeepSpeed do not allow; leave it out."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        every = self.unfreeze_every
        if every is None:
            return
        total = trainer.estimated_stepping_batches
        known = 0 < total < float("inf")
        if isinstance(every, float):
            if not known:
                raise ValueError(
                    f"unfreeze_every = {every} is a share of the run's steps, and this run has no known end: set "
                    "max_steps, or give a whole number of steps."
                )
            every *= total
        self._starts = {name: round(depth * every) for name, depth in base_depths(pl_module).items()}
        for name in self._frozen(max(trainer.global_step - 1, 0)):  # what has not moved so far
            # A sharded optimizer that is restored makes up a state, of one step, for what has none in the checkpoint.
            for optimizer in trainer.optimizers:
                optimizer.state.pop(pl_module.get_parameter(name), None)
        if known and (late := [name for name, start in self._starts.items() if start >= total]):
            warnings.warn(
                f"unfreeze_every = {self.unfreeze_every}: the run ends after {total} steps, before {len(late)} "
                f"parameters unfreeze, {late[0]} among them.",
                stacklevel=2,
            )

    def before_optimizer_step(self, module: nn.Module) -> None:
        for name in self._frozen(module.trainer.global_step):  # type: ignore[arg-type, union-attr]
            module.get_parameter(name).grad = None

    def _frozen(self, step: int) -> list[str]:
        """Base parameters that do not move in the step after so many."""
        return [name for name, start in self._starts.items() if start > step]
