"""What a run's peak memory would be by its plan, beside what was measured."""

import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lit_peft.planning import plan
from lit_peft.planning.gpus import gpu_bytes, workspaces
from lit_peft.planning.optimizer import remake


class PeakPrediction(pl.Callback):
    """Plans, when a fit on one GPU has ended, the largest batch that it has trained on; see `lit_peft.planning`.

    Not before: the start of a run would wait for it, and which batch is the largest is known by then. On a CPU nothing
    is planned, since what is measured there is another quantity.
    """

    def __init__(self) -> None:
        self.predicted_bytes: int | None = None
        self._largest: Any = None
        self._size = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type != "cuda" or trainer.world_size > 1:
            return
        size = sum(t.numel() for t in tree_leaves(batch) if isinstance(t, Tensor))
        if size > self._size:
            self._size = size
            self._largest = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._largest is not None:
            self.predicted_bytes = predict(trainer, pl_module, self._largest)


def predict(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> int | None:
    """Peak of a step of a fitted module by its plan; None where it cannot be planned.

    Args:
        trainer: The trainer that fitted.
        module: The module, attached.
        batch: A batch like those that it trained on; may be on the meta device.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a copy without a trainer, which logs nothing
            return plan(
                module,
                None,
                batch,
                optimizer=remake(trainer.optimizers[0]),
                precision=str(trainer.precision),
                accumulates=trainer.accumulate_grad_batches > 1,
                workspaces=workspaces(gpu_bytes(None)),
            ).peak
    except Exception:  # of somebody's step, which a copy without values or a trainer cannot make: the fit is done
        return None
