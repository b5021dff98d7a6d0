"""Makes a small pretrained decoder of GPT-2 architecture from local text, where no model hub is in reach.

    python benchmarks/pretrain_gpt2_mini.py --text data/imdb --column text --out models/gpt2-mini
    python benchmarks/pretrain_gpt2_mini.py --text reviews.txt --out models/tiny --layers 2 --width 64 --pieces 500

6 layers, width 320, 512 positions and a byte-level BPE of 8,192 pieces are 10.2 M parameters: a stand-in for gpt2 that
knows its domain and no other, so that there is something to tune. `--text` is a text file, each of whose lines is a
text, a parquet, csv or jsonl file with a column of texts, or a folder with train files of these, as lit-peft's data
modules read them; line breaks in HTML become spaces, and blank texts are passed over. Each text ends with
the end token; all are joined and cut into rows of as many tokens as there are positions, in another order each epoch,
from `--seed`. AdamW, warm-up and cosine, bf16 autocast on a GPU. One text in a hundred is held out; its loss, in nats a
token, is printed every `--log-every` steps, and at the end one line of JSON. The folder appears under its name when it
is complete.
"""

import argparse
import itertools
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

from lit_peft.data.blocks import counted
from lit_peft.data.columns import check_documents
from lit_peft.data.splits import load_splits

END = "<|endoftext|>"


def read(path: Path, column: str) -> list[str]:
    """The texts of a file, or of the train files of a folder; exits with a sentence where they cannot be had."""
    if not path.exists():
        raise SystemExit(f"--text {path} does not exist.")
    try:
        splits = load_splits(str(path), lines=True)
        if "train" not in splits:
            raise ValueError(f"{path} has no split 'train'; it has {', '.join(map(repr, splits))}.")
        check_documents(splits["train"], column, str(path))
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    texts = [text.replace("<br />", " ").strip() for text in splits["train"][column]]
    texts = [text for text in texts if text]
    if len(texts) < 2:
        raise SystemExit(
            f"{path} has {counted(len(texts), 'text')}, expected two or more: one in a hundred, or one, is held out."
        )
    return texts


def build_tokenizer(texts: list[str], pieces: int, positions: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Radford et al. 2019, section 2.2) of so many pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, unk_token=END, model_max_length=positions
    )


def joined(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """The tokens of all texts, each with its end, one after another."""
    ids = tokenizer(texts, verbose=False)["input_ids"]
    return torch.tensor(list(itertools.chain.from_iterable((*row, tokenizer.eos_token_id) for row in ids)))


def batches(tokens: Tensor, positions: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows of `positions` tokens without end; each epoch cuts them at another place."""
    while True:
        start = int(torch.randint(min(positions, len(tokens) - positions + 1), (), generator=generator))
        rows = tokens[start : start + (len(tokens) - start) // positions * positions].view(-1, positions)
        for chosen in torch.randperm(len(rows), generator=generator).split(size):
            if len(chosen) == min(size, len(rows)):
                yield rows[chosen]


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokens: Tensor, positions: int) -> float:
    """Nats a token, in rows of `positions`."""
    model.eval()
    total, count = 0.0, 0
    for row in tokens.split(positions):
        if len(row) > 1:
            ids = row[None].to(model.device)
            total += model(ids, labels=ids).loss.item() * (len(row) - 1)
            count += len(row) - 1
    model.train()
    return total / count


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--column", default="text")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=320)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--pieces", type=int, default=8192)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; remove it first.")
    if args.width % 64:
        raise SystemExit(f"--width is {args.width}, expected a multiple of 64, the size of a head.")

    torch.manual_seed(args.seed)
    generator, begun = torch.Generator().manual_seed(args.seed), time.perf_counter()
    texts = read(args.text, args.column)
    order = torch.randperm(len(texts), generator=generator).tolist()
    held = max(1, len(texts) // 100)
    train, kept = [texts[i] for i in order[held:]], [texts[i] for i in order[:held]]
    tokenizer = build_tokenizer(train, args.pieces, args.positions)
    tokens, rest = joined(tokenizer, train), joined(tokenizer, kept)
    if len(tokens) < args.positions:
        raise SystemExit(f"{args.text} has {len(tokens):,} tokens to train on, expected at least {args.positions:,}.")
    print(f"{len(train):,} texts, {len(tokens):,} tokens; {len(tokenizer):,} pieces", flush=True)

    end = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=args.positions,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.width // 64,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop"), args.dropout),
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    model = GPT2LMHeadModel(config).to(args.device).train()
    plain = [p for p in model.parameters() if p.dim() < 2]
    decayed = [p for p in model.parameters() if p.dim() > 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, args.steps // 20), args.steps)
    rows = batches(tokens, args.positions, args.batch, generator)
    for step, ids in enumerate(itertools.islice(rows, args.steps), start=1):
        ids = ids.to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda"):
            loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % args.log_every == 0 or step == args.steps:
            found = held_out_loss(model, rest, args.positions)
            print(f"step {step:,}: loss {loss.item():.3f}, held out {found:.3f} nats a token", flush=True)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, because a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as work:
        part = Path(work, "model")
        model.half().save_pretrained(part)
        model.config.dtype = torch.float32
        model.config.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.replace(args.out)
    told = {"parameters": sum(p.numel() for p in model.parameters()), "steps": args.steps, "held_out_nats": found}
    print(json.dumps(told | {"perplexity": math.exp(found), "seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
