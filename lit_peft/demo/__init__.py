"""What runs without a network: film-review text (`reviews`, `verdicts`), and two small models pretrained on it."""

from pathlib import Path

from lit_peft.demo.text import reviews, verdicts

ENCODER = Path(__file__).parent / "encoder"
"""Folder of a 4-layer DistilBERT and its tokenizer, for every Auto class of transformers; made by `pretrain`."""

DECODER = Path(__file__).parent / "decoder"
"""Folder of a 4-layer GPT-2 and its tokenizer; made by `pretrain_decoder`."""

__all__ = ["DECODER", "ENCODER", "reviews", "verdicts"]
