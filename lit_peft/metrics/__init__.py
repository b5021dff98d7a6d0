"""Metrics of runs: proper scores and calibration of classes and tokens, perplexity, and the usual from torchmetrics."""

from lit_peft.metrics.calibration import CalibrationBins, CalibrationError, reliability_diagram
from lit_peft.metrics.classification import NLL, BrierScore, classification_metrics
from lit_peft.metrics.language_modeling import (
    Perplexity,
    TokenAccuracy,
    TokenCalibrationError,
    TokenNLL,
    TokenScores,
    WordPerplexity,
    language_modeling_metrics,
    token_scores,
)

__all__ = [
    "NLL",
    "BrierScore",
    "CalibrationBins",
    "CalibrationError",
    "Perplexity",
    "TokenAccuracy",
    "TokenCalibrationError",
    "TokenNLL",
    "TokenScores",
    "WordPerplexity",
    "classification_metrics",
    "language_modeling_metrics",
    "reliability_diagram",
    "token_scores",
]
