"""Tiny language models in folders, tasks on them, and batches of the form that the data modules give."""

import lightning.pytorch as pl
import torch
import transformers as tf
from torch import Tensor

VOCABULARY = 97


def save(folder, kind: str = "gpt2", seed: int = 0, **options) -> str:
    """Folder of a tiny random model; its weights are large enough that predictions are far from uniform."""
    torch.manual_seed(seed)
    common = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    few = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = {**few, "intermediate_size": 48, "max_position_embeddings": 64}
    grouped = {**small, "num_key_value_heads": 2, "head_dim": 8}
    make = {
        "gpt2": lambda: tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **common, **options),
        "llama": lambda: tf.LlamaConfig(**grouped, **common, **options),
        "opt": lambda: tf.OPTConfig(
            **few, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64, **common, **options
        ),
        "gemma2": lambda: tf.Gemma2Config(**grouped, **common, **options),
        "cohere": lambda: tf.CohereConfig(**grouped, **common, **options),
        "mistral": lambda: tf.MistralConfig(**grouped, sliding_window=16, **common, **options),
        "qwen2": lambda: tf.Qwen2Config(**small, num_key_value_heads=2, **common, **options),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**small, **common, **options),
        "phi": lambda: tf.PhiConfig(**small, **common, **options),
        "falcon": lambda: tf.FalconConfig(**few, max_position_embeddings=64, **common, **options),
        "bloom": lambda: tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, **common, **options),
        "mpt": lambda: tf.MptConfig(d_model=32, n_layers=2, n_heads=4, max_seq_len=64, **common, **options),
        "mamba": lambda: tf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **common, **options),
        "bert": lambda: tf.BertConfig(**small, is_decoder=True, **common, **options),
        "roberta": lambda: tf.RobertaConfig(**small, is_decoder=True, pad_token_id=1, **common, **options),
        # More layers than the encoder that it was taken from, whose number transformers takes for its own.
        "bart": lambda: tf.BartConfig(
            **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "max_position_embeddings": 64},
            **{
                f"{side}_{what}": n
                for side in ("encoder", "decoder")
                for what, n in [("attention_heads", 4), ("ffn_dim", 48)]
            },
            **common,
            **options,
        ),
    }
    model = tf.AutoModelForCausalLM.from_config(make[kind]())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(folder)
    return str(folder)


def batch(*lengths: int, seed: int = 0, vocabulary: int = VOCABULARY, first: int = 1) -> dict[str, Tensor]:
    """Texts of these lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(first, vocabulary, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": ids.masked_fill(~mask, -100),
    }


def trainer(*callbacks: pl.Callback, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(callbacks=list(callbacks), enable_model_summary=False, **quiet | {"max_epochs": 1} | options)
