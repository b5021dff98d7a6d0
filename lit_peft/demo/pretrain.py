"""Pretrains the demo encoder: ``python -m lit_peft.demo.pretrain OUT_DIR``.

A small DistilBERT learns masked language modelling (Devlin et al. 2019, section 3.1: 15 % of the tokens are chosen;
80 % of those become [MASK], 10 % a random token, 10 % stay) on `unlabelled_text`. Because all sentences of a review
share one sentiment, a masked word can be predicted well only by reading the sentiment of the others, negation and
contrast included: no label is ever seen. A quarter of an hour on one CPU core, two minutes on a GPU; the folder
``encoder`` beside this file was written by it.
"""

import argparse
import itertools
import json
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertTokenizer,
    get_linear_schedule_with_warmup,
)

from lit_peft.demo.text import unlabelled_text
from lit_peft.labels import IGNORED

STEPS = 6144
BATCH_SIZE = 64
BATCHES_PER_CHUNK = 64  # text is generated, and its reviews sorted by length, this many batches at a time
HELD_OUT_SEED = 10**6  # chunk i is `unlabelled_text` of seed i, so this text is never trained on
LEARNING_RATE = 1.5e-3
MAX_LENGTH = 128
LOG_EVERY = 256


def build_tokenizer(texts: list[str]) -> DistilBertTokenizer:
    """A lower-case WordPiece tokenizer that knows every word of `texts` whole and can spell other words.

    The language has few words, so the vocabulary lists them: learning merges, whose order varies from run to run,
    would end at the same words.
    """
    special = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    backend = DistilBertTokenizer(vocab=special).backend_tokenizer
    words = {
        word
        for text in texts
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text))
    }
    letters = string.ascii_lowercase + string.digits
    pieces = [*letters, *string.punctuation, *(f"##{letter}" for letter in letters)]
    tokens = [*special, *pieces, *sorted(words.difference(pieces))]
    return DistilBertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=MAX_LENGTH)


def encode(tokenizer: DistilBertTokenizer, texts: list[str]) -> Tensor:
    """Token ids `[len(texts), longest]`, padded on the right."""
    return tokenizer(texts, padding=True, truncation=True, return_tensors="pt")["input_ids"]


def mask_tokens(ids: Tensor, tokenizer: DistilBertTokenizer, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Chooses 15 % of the tokens of `ids` as targets and hides most of them.

    Returns:
        The input ids and the targets, both shaped as `ids`; the target is `IGNORED` where nothing is predicted.
    """
    special = torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & ~special
    fate = torch.rand(ids.shape, generator=generator)
    anything = torch.randint(len(tokenizer), ids.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    inputs = torch.where(chosen & (fate >= 0.9), anything, inputs)
    return inputs, torch.where(chosen, ids, IGNORED)


def masked_loss(model: DistilBertForMaskedLM, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (nats) and correctness (bool) of each masked token of a batch, both of shape `[masked]`."""
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    logits = model(inputs, attention_mask=inputs != model.config.pad_token_id).logits[targets != IGNORED]
    targets = targets[targets != IGNORED]
    return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


@torch.no_grad()
def evaluate(model: DistilBertForMaskedLM, tokenizer: DistilBertTokenizer, ids: Tensor) -> tuple[float, float]:
    """Mean loss (nats) and accuracy over the masked tokens of `ids`, always masked alike."""
    model.eval()
    inputs, targets = mask_tokens(ids, tokenizer, torch.Generator().manual_seed(0))
    parts = [masked_loss(model, *batch) for batch in zip(inputs.split(256), targets.split(256), strict=True)]
    losses, hits = (torch.cat(values) for values in zip(*parts, strict=True))
    return losses.mean().item(), hits.float().mean().item()


def batches_of(ids: Tensor, pad_id: int, generator: torch.Generator) -> list[Tensor]:
    """Batches in random order, each of reviews of about one length and without superfluous padding."""
    lengths = (ids != pad_id).sum(1)
    rows = lengths.argsort(stable=True).split(BATCH_SIZE)
    return [ids[rows[i], : lengths[rows[i]].max()] for i in torch.randperm(len(rows), generator=generator)]


def pretrain(out_dir: Path, steps: int = STEPS) -> None:
    """Trains encoder and tokenizer and writes them, with ``training_log.jsonl``, to `out_dir`.

    Every batch is new text, so nothing can be learnt by heart and there is no dropout. The weights are stored in
    float16, with the masked-language-model head; ``config.json`` says float32, in which `from_pretrained` then
    computes.

    Args:
        out_dir: The folder to write; created when it does not exist.
        steps: Number of optimizer steps, of `BATCH_SIZE` reviews each.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)  # masks and order are drawn on the CPU: equal on every device
    tokenizer = build_tokenizer(unlabelled_text(20_000))
    held_out = encode(tokenizer, unlabelled_text(1000, seed=HELD_OUT_SEED))
    config = DistilBertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_LENGTH,
        dim=128,
        hidden_dim=256,
        n_layers=4,
        n_heads=4,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = DistilBertForMaskedLM(config)
    train(
        model,
        batches(lambda texts: encode(tokenizer, texts), tokenizer.pad_token_id, generator),
        lambda batch: masked_loss(model, *mask_tokens(batch, tokenizer, generator)),
        lambda: evaluate(model, tokenizer, held_out),
        out_dir,
        steps,
        LEARNING_RATE,
    )
    save(model, tokenizer, out_dir)


def batches(encode: Callable[[list[str]], Tensor], pad_id: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of new reviews without end."""
    for chunk in itertools.count():
        yield from batches_of(encode(unlabelled_text(BATCHES_PER_CHUNK * BATCH_SIZE, seed=chunk)), pad_id, generator)


def train(
    model: Any,
    data: Iterator[Tensor],
    loss: Callable[[Tensor], tuple[Tensor, Tensor]],
    score: Callable[[], tuple[float, float]],
    out_dir: Path,
    steps: int,
    rate: float,
) -> None:
    """Trains one of the demo models, on a GPU if there is one, and writes ``training_log.jsonl``.

    Args:
        model: The model.
        data: Its batches.
        loss: Cross-entropy (nats) and correctness (bool) of each token of a batch that is predicted.
        score: Mean loss and accuracy on text that is held out.
        out_dir: Where the log goes; created when it does not exist.
        steps: Number of optimizer steps.
        rate: Peak of the learning rate.
    """
    torch.nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")  # model.to is typed as taking none
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / "training_log.jsonl").open("w") as log:
        for step, batch in enumerate(itertools.islice(data, steps), start=1):
            model.train()
            losses, hits = loss(batch)
            optimizer.zero_grad()
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if step % LOG_EVERY == 0 or step == steps:
                held_out_loss, held_out_accuracy = score()
                entry = {
                    "loss": losses.mean().item(),
                    "accuracy": hits.float().mean().item(),
                    "held_out_loss": held_out_loss,
                    "held_out_accuracy": held_out_accuracy,
                }
                line = json.dumps({"step": step} | {key: round(value, 4) for key, value in entry.items()})
                print(line, flush=True)
                log.write(line + "\n")


def save(model: Any, tokenizer: Any, out_dir: Path) -> None:
    """Writes a model in float16, which its configuration has `from_pretrained` load in float32, and its tokenizer."""
    model.half().save_pretrained(out_dir)
    model.config.dtype = torch.float32
    model.config.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain the demo encoder by masked language modelling.")
    parser.add_argument("out_dir", type=Path, help="folder for the encoder, its tokenizer and the training log")
    pretrain(parser.parse_args().out_dir)
