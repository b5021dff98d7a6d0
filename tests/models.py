"""Tiny random models of the supported architectures, built from their configurations alone."""

from pathlib import Path

import torch
import transformers as tf
from torch import nn

from lit_peft.demo import ENCODER
from lit_peft.testing.subjects import MODELS

TINY = {name: model for name, model in MODELS.items() if name not in ("mlp", "conv_net")}


def tiny(name: str, seed: int = 0) -> nn.Module:
    """A tiny model in evaluation mode with seeded random weights, biases and norms included."""
    return TINY[name].build(seed)


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Two short sequences, the second padded, for the model of that name."""
    return TINY[name].inputs()


def logits(model: nn.Module, name: str) -> torch.Tensor:
    """The model's logits on `inputs`."""
    return TINY[name].run(model)


def hf_peft_classifier(folder: Path) -> nn.Module:
    """The demo's encoder with a LoRA of HF PEFT's that does something, as it is after it was saved to a folder."""
    import peft

    base = tf.AutoModelForSequenceClassification.from_pretrained(ENCODER, num_labels=2)
    config = peft.LoraConfig(r=4, target_modules=["q_lin", "v_lin"], task_type="SEQ_CLS")
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return model
