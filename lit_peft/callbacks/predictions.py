"""Predictions on disk."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lit_peft.core.files import atomic_path


def _plain(value: Any) -> Any:
    """Tensors as numbers and lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(
        f"predict_step returned a {type(value).__name__}, which JSON has no form for; return lists of dicts."
    )


class PredictionWriter(BasePredictionWriter):
    """Writes what `predict_step` returned, lists of dicts or a tensor, as one JSON value a line, in the data's order.

    Args:
        path: The file; null: predictions.jsonl in the run's folder. Each further rank writes its own share to
            predictions.1.jsonl and so on.
    """

    def __init__(self, path: str | None = None) -> None:
        super().__init__(write_interval="epoch")
        self.path = path
        self.written: Path | None = None

    def write_on_epoch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        predictions: Sequence[Any],
        batch_indices: Any,
    ) -> None:
        if self.path is not None:
            target = Path(self.path)
        else:
            target = Path(trainer.log_dir or trainer.default_root_dir) / "predictions.jsonl"
        if trainer.global_rank:
            target = target.with_suffix(f".{trainer.global_rank}{target.suffix}")
        with atomic_path(target) as part, part.open("w", encoding="utf-8") as file:
            for batch in predictions:
                for row in batch.tolist() if isinstance(batch, Tensor) else batch:
                    file.write(json.dumps(row, ensure_ascii=False, default=_plain) + "\n")
        self.written = target
