"""A step on a Llama of 8 B in NF4: ours beside Unsloth's, which trains in an environment of its own.

    python benchmarks/unsloth_turns.py --unsloth envs/unsloth/bin/python        # needs a GPU with 60 GiB, 16 GB of disk
    python benchmarks/unsloth_turns.py --unsloth ... --rows "*offload"          # with checkpointing alone, as globs

The setting of benchmarks/qlora.py: random weights and tokens, 4 x 1024, r 16 on all seven linear layers, float32
adapters under bfloat16 autocast, fused AdamW, with Liger's kernels in ours and Unsloth's own in its. Unsloth loads a
checkpoint of weights of the same distribution, which this writes into a temporary folder; its checkpointing moves what
it keeps to the host, and is set beside ours that does so too. The two processes take turns of --steps on one card, each
waiting for the end of the other. Milliseconds are by the GPU's events, memory is what each process allocated, static
before its first step. Prints a table, then one line of JSON; --out takes a line of JSON a pair and that one.

Unsloth 2026.10.9 asks for other versions than lit-peft:
python -m venv envs/unsloth && envs/unsloth/bin/pip install unsloth
"""

import argparse
import fnmatch
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from llama_nf4 import SHAPES, build, gib, skeleton
from loading import write_checkpoint
from qlora import Clock, note, show, training
from qlora_rows import ROWS, by_library
from tokenizers import Tokenizer, models, pre_tokenizers

PAIRS = {"ours-float32-autocast": "unsloth", "ours-float32-autocast+offload": "unsloth+offload"}
"""Ours, and what of Unsloth's it is compared with."""


def write_tokenizer(folder: str) -> None:
    """A tokenizer of a few words, which Unsloth loads with a model."""
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "word"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)


class Worker:
    """Unsloth's process: what it told when it was ready, and its steps."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.ready = self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"Unsloth's process ended with {self.process.wait()}; its words are above.")
        return json.loads(line)

    def steps(self, count: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which the answer tells
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
        return self.answer()


@contextmanager
def worker(folder: str, offload: bool, args: argparse.Namespace) -> Iterator[Worker]:
    command = [args.unsloth, str(Path(__file__).with_name("unsloth_worker.py")), "--folder", folder]
    for name in ("batch", "length", "r", "alpha", "rate"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--checkpointing"] * offload
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}  # ours, whose packages differ
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean)
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.wait()


def turns(name: str, models: dict[str, Any], folder: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Milliseconds and memory of both of a pair, of ours first."""
    row, on_gpu = ROWS[name], args.device == "cuda"
    with worker(folder, bool(row.memory), args) as theirs, training(models, row, args) as ours:
        mine: dict[str, Any] = {"row": name, "trainable": sum(p.numel() for p in ours.trainable), "step_ms": []}
        their: dict[str, Any] = {**theirs.ready, "row": PAIRS[name], "step_ms": []}
        mine["static_gib"] = gib(torch.cuda.memory_allocated() if on_gpu else 0, args.device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for turn in range(args.warmup + args.turns):
            clock = Clock(args.device)
            clock.tick()
            for _ in range(args.steps):
                ours.step()
                clock.tick()
            times, answer = clock.milliseconds(), theirs.steps(args.steps)
            if turn >= args.warmup:
                mine["step_ms"] += times
                their["step_ms"] += answer["step_ms"]
        mine["peak_gib"] = gib(torch.cuda.max_memory_allocated() if on_gpu else 0, args.device)
        mine["loss"] = float(ours.losses[-1])
        return [mine, {**their, "peak_gib": answer["peak_gib"], "loss": answer["loss"]}]


def lines(pair: list[dict[str, Any]]) -> Iterator[str]:
    """Both rows of a pair, in Markdown."""
    for one in pair:
        low, middle, high = statistics.quantiles(one["step_ms"], n=4)
        ratio = middle / statistics.median(pair[1]["step_ms"])
        cells = [one["row"], f"{middle:.1f}", f"{low:.1f} to {high:.1f}", f"{ratio:.3f}"]
        cells += [show(one["static_gib"]), show(one["peak_gib"]), f"{one['loss']:.2f}", f"{one['trainable']:,}"]
        yield f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unsloth", required=True, help="Python of an environment that has it")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs of ours")
    parser.add_argument("--out", type=Path, default=None, help="file for lines of JSON")
    parser.add_argument("--shape", default="8b", choices=list(SHAPES))
    parser.add_argument("--device", default="cuda", help="of ours")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=True)
    for name, value in (("batch", 4), ("length", 1024), ("r", 16), ("turns", 10), ("warmup", 2), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--folder", help="where the temporary folder is made")
    args = parser.parse_args(argv)
    args.paged = False
    names = [name for name in PAIRS if any(fnmatch.fnmatch(name, glob) for glob in args.rows)]
    if not names:
        parser.error(f"no row is named {' or '.join(args.rows)}; there are {', '.join(PAIRS)}")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_checkpoint(Path(folder), skeleton(args.shape, args.length), args.device)
        write_tokenizer(folder)
        bases = by_library(build(args.shape, args.length, args.device).model, args)
        print("| row | ms a step | quartiles | by Unsloth's | static GiB | peak GiB | last loss | trainable |")
        print("|---" * 8 + "|")
        for name in names:
            found += (pair := turns(name, bases, folder, args))
            print(*lines(pair), sep="\n", flush=True)
            if args.out:
                note(args.out, {"rows": pair})
    setting = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "arguments": {**vars(args), "out": str(args.out)},
    }
    if args.out:
        note(args.out, setting)
    print(json.dumps({**setting, "rows": found}))


if __name__ == "__main__":
    main()
