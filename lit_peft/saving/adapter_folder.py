"""An adapter that was saved, among a trainer's callbacks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from lit_peft.core.folder_files import open_record
from lit_peft.core.quantize import Quantize
from lit_peft.core.records import RECORD
from lit_peft.core.registry import Adapter, registry
from lit_peft.methods.base import Method
from lit_peft.saving.checkpoint_file import AS_TRAINED, read_checkpoint
from lit_peft.saving.folder import load


def quantize_of(record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How the base was stored, by the record of a folder or a checkpoint of ours; None: not quantised, or not told."""
    specs = [] if record is None else record["methods"].values()
    return next((found for spec in specs if (found := spec["init_args"].get("quantize")) is not None), None)


class AdapterFolder(Method):
    """Brings a saved adapter into a trainer that validates, tests or predicts.

    It attaches the adapter when the model is configured, as the method that made it would, and needs no checkpoint
    beside it. To train on, `load(module, path)` and give the trainer the method itself.

    Args:
        path: Folder of ours or of HF PEFT's, or a run's checkpoint; see `lit_peft.load`.
        name: Name of the adapter on the module.
        quantize: How the base is stored, see `lit_peft.load`; by default as in training.
    """

    def __init__(self, path: str, name: str = "default", quantize: Quantize = AS_TRAINED) -> None:
        super().__init__(name=name, quantize=None if quantize == AS_TRAINED else quantize)
        self.path = path
        self.as_trained = quantize == AS_TRAINED
        self._spec: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            raise ValueError(
                f"AdapterFolder({self.path!r}) does not train: what its method does in training is not in a folder. "
                "Attach it with lit_peft.load(module, path), and give the trainer that method."
            )
        super().setup(trainer, pl_module, stage)

    def attach(self, module: nn.Module, dtype: torch.dtype | None = None) -> Adapter:
        adapter = load(module, self.path, self.name, quantize=AS_TRAINED if self.as_trained else self.quantize)
        self._spec = adapter.spec
        return adapter

    def base_storage(self) -> dict[str, Any] | None:
        if not self.as_trained:
            return self.quantize
        record = open_record(self.path) if Path(self.path).is_dir() else read_checkpoint(self.path)[RECORD]
        return quantize_of(record)

    def names_on(self, module: nn.Module) -> list[str]:
        """Several, where a checkpoint brings several, which keep their names."""
        state, source = registry(module), Path(self.path).resolve()
        found = [name for name, a in state.adapters.items() if a.source == str(source)] if state is not None else []
        if len(found) > 1 and source.is_file():  # which may be loaded twice, under two names, where it holds one
            kept = read_checkpoint(source)[RECORD]["methods"]
            if len(kept) > 1:
                return [name for name in found if name in kept]
        return [self.name] if self.name in found else found or super().names_on(module)

    def is_same(self, adapter: Adapter) -> bool:
        return adapter.source == str(Path(self.path).resolve())

    def spec(self) -> dict[str, Any]:
        """That of the adapter, once it is attached."""
        return self._spec or super().spec()
