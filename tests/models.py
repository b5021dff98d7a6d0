"""Tiny random models of the supported architectures, built from their configurations alone."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf
from torch import nn

from lit_peft.demo import ENCODER

TINY: dict[str, Callable[[], nn.Module]] = {
    "distilbert": lambda: tf.DistilBertForSequenceClassification(
        tf.DistilBertConfig(vocab_size=50, dim=16, hidden_dim=32, n_layers=2, n_heads=2, max_position_embeddings=16)
    ),
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    ),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=18,
        )
    ),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)),
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
        )
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=50,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        )
    ),
}


def tiny(name: str, seed: int = 0) -> nn.Module:
    """A tiny model in evaluation mode with seeded random weights, biases and norms included."""
    torch.manual_seed(seed)
    model = TINY[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Two short sequences, the second padded, for the model of that name."""
    ids = torch.tensor([[3, 7, 11, 23, 5, 9], [8, 2, 31, 4, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    if name == "t5":
        batch["decoder_input_ids"] = torch.tensor([[0, 4, 9], [0, 6, 2]])
    return batch


def logits(model: nn.Module, name: str) -> torch.Tensor:
    """The model's logits on `inputs`."""
    return model(**inputs(name)).logits


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
