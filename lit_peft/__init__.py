"""Parameter-efficient fine-tuning, native to PyTorch Lightning."""

__version__ = "0.1.0"
