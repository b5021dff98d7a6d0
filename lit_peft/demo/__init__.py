"""What runs without a network: film-review text (`reviews`) and a small encoder pretrained on it (`ENCODER`)."""

from pathlib import Path

from lit_peft.demo.text import reviews

ENCODER = Path(__file__).parent / "encoder"
"""Folder of a 4-layer DistilBERT and its tokenizer, for every Auto class of transformers; made by `pretrain`."""

__all__ = ["ENCODER", "reviews"]
