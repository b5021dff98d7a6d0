"""Pictures of calibration in TensorBoard."""

import lightning.pytorch as pl
from lightning.pytorch.loggers import TensorBoardLogger

from lit_peft.metrics import CalibrationError, reliability_diagram


class ReliabilityDiagram(pl.Callback):
    """Adds `calibration/val` and `calibration/test` to TensorBoard.

    What is drawn is the `CalibrationError` in a collection that is named after the stage, as the tasks'
    `val_metrics` and `test_metrics` are.
    """

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for name, metric in module.named_modules():
            if loggers and isinstance(metric, CalibrationError) and stage in name.split(".")[0]:
                bins = metric.bins()  # every rank: it gathers
                if trainer.is_global_zero and int(bins.count.sum()):
                    figure = reliability_diagram(bins, f"{stage}, epoch {trainer.current_epoch}")
                    loggers[0].experiment.add_figure(f"calibration/{stage}", figure, trainer.global_step)
