"""Callbacks that watch a run: speed and memory, reproducible steps, calibration pictures, the report, predictions."""

from lit_peft.callbacks.calibration import ReliabilityDiagram
from lit_peft.callbacks.memory import PeakPrediction
from lit_peft.callbacks.predictions import PredictionWriter
from lit_peft.callbacks.report import RunReport
from lit_peft.callbacks.reproducible import ReproducibleSteps
from lit_peft.callbacks.speed import SpeedMonitor

__all__ = ["PeakPrediction", "PredictionWriter", "ReliabilityDiagram", "ReproducibleSteps", "RunReport", "SpeedMonitor"]
