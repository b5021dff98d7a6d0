"""Metrics of a classification run: proper scores, calibration, and the usual ones from torchmetrics."""

from lit_peft.metrics.calibration import CalibrationBins, CalibrationError, reliability_diagram
from lit_peft.metrics.classification import NLL, BrierScore, classification_metrics

__all__ = [
    "NLL",
    "BrierScore",
    "CalibrationBins",
    "CalibrationError",
    "classification_metrics",
    "reliability_diagram",
]
