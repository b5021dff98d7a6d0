"""Pretrains the demo decoder: ``python -m lit_peft.demo.pretrain_decoder OUT_DIR``.

A small GPT-2 learns to predict the next token (Radford et al. 2019, section 2) of the reviews that the encoder learns
from. Because all sentences of a review share one sentiment, the words of a later sentence can be predicted well only by
reading that of the earlier ones. A quarter of an hour on one CPU core; the folder ``decoder`` beside this file was
written by it.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lit_peft.demo.pretrain import HELD_OUT_SEED, MAX_LENGTH, batches, save, train
from lit_peft.demo.text import unlabelled_text

STEPS = 4096
LEARNING_RATE = 2e-3
END, PAD = "<|endoftext|>", "<|pad|>"


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, as GPT-2's, that knows every word of `texts` whole and spells others byte by byte.

    The language has few words, so the vocabulary lists them in the place of merges. A word is known with the space
    before it and without.
    """
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[A-Za-z0-9-]+|\s+|[^\sA-Za-z0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [END, PAD, *letters, *sorted(words.difference(letters))]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Token ids `[len(texts), longest]` of the texts, each with its end, padded on the right."""
    ended = [text + END for text in texts]
    return tokenizer(ended, padding=True, truncation=True, return_tensors="pt")["input_ids"]


def next_token_loss(model: GPT2LMHeadModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) and correctness (bool) of each token of a batch but the first of each row, `[tokens]`."""
    ids = ids.to(model.device)
    targets, inside = ids[:, 1:], ids[:, 1:] != model.config.pad_token_id
    logits = model(ids[:, :-1]).logits[inside]  # padding is on the right, where nothing that counts can see it
    targets = targets[inside]
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, ids: Tensor) -> tuple[float, float]:
    """Mean loss (nats) and accuracy over the tokens of `ids`."""
    model.eval()
    losses, hits = (
        torch.cat(values) for values in zip(*(next_token_loss(model, part) for part in ids.split(256)), strict=True)
    )
    return losses.mean().item(), hits.float().mean().item()


def pretrain(out_dir: Path, steps: int = STEPS) -> None:
    """Trains decoder and tokenizer and writes them, with ``training_log.jsonl``, to `out_dir`.

    Every batch is new text, so nothing can be learnt by heart and there is no dropout. The weights are stored in
    float16; ``config.json`` says float32, in which `from_pretrained` then computes.

    Args:
        out_dir: The folder to write; created when it does not exist.
        steps: Number of optimizer steps, of 64 reviews each.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    tokenizer = build_tokenizer(unlabelled_text(20_000))
    held_out = encode(tokenizer, unlabelled_text(1000, seed=HELD_OUT_SEED))
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_LENGTH,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    train(
        model,
        batches(lambda texts: encode(tokenizer, texts), tokenizer.pad_token_id, generator),
        lambda batch: next_token_loss(model, batch),
        lambda: evaluate(model, held_out),
        out_dir,
        steps,
        LEARNING_RATE,
    )
    save(model, tokenizer, out_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain the demo decoder by next-token prediction.")
    parser.add_argument("out_dir", type=Path, help="folder for the decoder, its tokenizer and the training log")
    pretrain(parser.parse_args().out_dir)
