"""Training on a Llama in NF4: step, static and peak memory, ours beside HF PEFT with bitsandbytes, in alternation.

    python benchmarks/qlora.py --out runs/qlora.jsonl              # 8 B, all rows; needs a GPU with 40 GiB, and Liger
    python benchmarks/qlora.py --rows "*bfloat16*" --rounds 5      # some, as globs
    python benchmarks/qlora.py --rows "ours*" --plan               # lit-peft's plans beside what is measured
    python benchmarks/qlora.py --shape 65b                         # 10 steps of ours at 1 x 512; needs a GPU with 80 GB
    python benchmarks/qlora.py --shape tiny --device cpu --no-liger --rounds 1 --steps 1

Random weights in NF4 with double quantisation, random tokens, LoRA on all seven linear layers without dropout. One base
serves all rows: in each round every row puts its adapters on, warms up, is timed and takes them off again, in an order
that rotates. A step is zero_grad, forward, backward and fused AdamW, or, for 65 B, bitsandbytes' paged AdamW in 32 bit;
on a GPU it is timed by its events. "kernels" is what the GPU's kernels take of it: a step takes longer where the host,
which launches them, is slow; it is had from one more round. What is compared with HF PEFT is timed before the rounds,
each pair in turns of one step. Liger's kernels are in all rows unless --no-liger says otherwise, as transformers puts
them into those of HF PEFT and the floor, and `kernels: liger` into ours.

A row is named library-dtype: the dtype is that of the adapters. "-autocast" runs the forward under bfloat16 autocast.
"hf-float32" is HF PEFT as it comes; its rows run on bitsandbytes' own layers, and so does "floor": the frozen base
through which the gradient of the embeddings flows, below which no adapter can be. "+checkpointing" is the non-reentrant
kind on both sides, "+offload" moves what that keeps to the host. "x floor" is a row's kernels by those of the floor
without checkpointing, or with it for rows that have it. Static memory is what is allocated before the first step: the
base and the adapters; the peak is that of all steps, not of building, which is told apart.

Before the rows, loss and gradients of both libraries with equal adapters are compared on one text, beside HF PEFT's
distance from itself when its adapters compute in float32. Prints tables, then one line of JSON; --out takes a line of
JSON a measurement and that one. Needs the dev extra (peft, bitsandbytes).
"""

import argparse
import fnmatch
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from llama_nf4 import SHAPES, build, gib
from qlora_rows import (
    ROWS,
    THEIRS,
    Row,
    adapted,
    agreement,
    autocast,
    by_library,
    checkpointed,
    optimizer_of,
    planned,
    tokens,
)
from torch import Tensor, nn

DEFAULTS: dict[str, dict[str, Any]] = {
    "8b": {"batch": 4, "length": 1024, "r": 16, "alpha": 32, "rounds": 3, "warmup": 2, "steps": 5, "turns": 30},
    "65b": {"batch": 1, "length": 512, "r": 64, "alpha": 16, "rounds": 1, "warmup": 0, "steps": 10, "turns": 0}
    | {"paged": True, "rows": ["ours-float32+checkpointing"], "check": False},
    "tiny": {"batch": 2, "length": 32, "r": 4, "alpha": 8, "rounds": 1, "warmup": 1, "steps": 2, "turns": 2},
}
"""Arguments of each shape that are not given."""

PAIRS: list[tuple[str, str, float]] = [
    ("ours-float32", THEIRS, 0.90),
    ("ours-bfloat16", "hf-bfloat16", 0.95),
    ("ours-float32+checkpointing", f"{THEIRS}+checkpointing", 0.92),
    ("ours-bfloat16+checkpointing", "hf-bfloat16+checkpointing", 0.92),
]
"""Rows of 8 B that are compared: ours, HF PEFT's, and the most that the former's time may be of the latter's."""

BARS: list[tuple[str, str, str, float]] = [
    ("8b", "static_gib", "ours-float32", 5.6),
    ("8b", "peak_gib", "ours-float32", 22.0),
    ("8b", "peak_gib", "ours-bfloat16", 22.0),
    ("8b", "peak_gib", "ours-float32+checkpointing", 7.4),
    ("8b", "peak_gib", "ours-bfloat16+checkpointing", 7.4),
    ("8b", "peak_gib", "ours-float32+offload", 7.0),
    ("8b", "peak_gib", "ours-bfloat16+offload", 7.0),
    ("65b", "peak_gib", "ours-float32+checkpointing", 48.0),
]
"""Shape, memory, row, and the most that it may be."""


class Clock:
    """Times what lies between its ticks, on a GPU by events, so that the host need not wait."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.ticks: list[Any] = []

    def tick(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ticks.append(event)
        else:
            self.ticks.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        pairs = list(zip(self.ticks, self.ticks[1:], strict=False))
        if not self.on_gpu:
            return [1000 * (b - a) for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def paged_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state in unified memory, which torch's allocator knows nothing of."""
    tensors = [t for state in optimizer.state.values() for t in state.values() if getattr(t, "is_paged", False)]
    return sum(t.numel() * t.element_size() for t in tensors)


def kernels_ms(step: Callable[[], None], steps: int) -> float:
    """Milliseconds that the GPU's kernels take in a step: what it would take on a host that is never waited for.

    The mean of some steps, since a card that is at its power limit changes its clocks.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / steps / 1000


class Training:
    """A row whose adapters are on: its steps, and the losses of those that were made."""

    def __init__(self, outer: nn.Module, row: Row, args: argparse.Namespace) -> None:
        self.outer, self.ids, self.losses = outer, tokens(args), list[Tensor]()
        self.autocast: Callable[[], Any] = lambda: autocast(row, args)
        self.trainable = [p for p in outer.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self.trainable, args) if self.trainable else None

    def step(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        with self.autocast():
            loss = self.outer(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        self.losses.append(loss.detach())


@contextmanager
def training(models: dict[str, Any], row: Row, args: argparse.Namespace) -> Iterator[Training]:
    with adapted(models, row, args) as outer, checkpointed(models[row.library], row):
        yield Training(outer, row, args)


def measure(models: dict[str, Any], row: Row, args: argparse.Namespace, profiled: bool = False) -> dict[str, Any]:
    """Milliseconds of each step after the first ones, the losses of all, and memory in GiB.

    Where it is profiled, no steps are timed: a profiler goes on to slow the launches of a process that has had one.
    """
    on_gpu, device = args.device == "cuda", args.device
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    with training(models, row, args) as run:
        clock = Clock(device)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        static = torch.cuda.memory_allocated() if on_gpu else 0
        clock.tick()
        for _ in range(args.warmup + args.steps * (not profiled)):
            run.step()
            clock.tick()
        times = clock.milliseconds()[args.warmup :]
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        return {
            "step_ms": times,
            "kernels_ms": kernels_ms(run.step, args.steps) if profiled else None,
            "static_gib": gib(static, device),
            "peak_gib": gib(peak, device),
            "paged_gib": gib(paged_bytes(run.optimizer), device) if args.paged else None,
            "loss": [float(loss) for loss in run.losses],
            "trainable": sum(p.numel() for p in run.trainable),
        }


def turns(models: dict[str, Any], names: tuple[str, str], args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each step of two rows, of other libraries, that take turns.

    Whatever slows the host for longer than a step slows both.
    """
    with ExitStack() as stack:
        runs = [stack.enter_context(training(models, ROWS[name], args)) for name in names]
        clock = Clock(args.device)
        for i in range(2 * (args.warmup + args.turns)):
            clock.tick()
            runs[i % 2].step()
        clock.tick()
        times = clock.milliseconds()[2 * args.warmup :]
        return {name: times[i::2] for i, name in enumerate(names)}


def figure(results: list[dict[str, Any]], name: str, key: str) -> float | None:
    """The median of a row's times, or the most of another figure; None where it was not measured."""
    values = [result[key] for result in results if result["row"] == name and result[key] is not None]
    if not values:
        return None
    if key == "step_ms":
        values = [t for times in values for t in times]
        return statistics.median(values) if values else None
    return statistics.median(values) if key.endswith("_ms") else max(values)


def show(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The rows, in Markdown."""
    heads = ("row", "adapters", "ms a step", "min to max", "kernels ms", "x floor")
    heads += ("static GiB", "peak GiB", "paged GiB", "loss")
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for name in dict.fromkeys(result["row"] for result in results):
        times = [t for result in results if result["row"] == name for t in result["step_ms"]]
        floor = figure(results, "floor+checkpointing" if "+" in name else "floor", "kernels_ms")
        kernels = figure(results, name, "kernels_ms")
        losses = next(result["loss"] for result in results if result["row"] == name)
        cells = [
            *(name, ROWS[name].dtype or "none", show(figure(results, name, "step_ms"), 1)),
            *(
                f"{min(times):.1f} to {max(times):.1f}" if times else "",
                show(kernels, 1),
                show(floor and kernels and kernels / floor),
            ),
            *(show(figure(results, name, key)) for key in ("static_gib", "peak_gib", "paged_gib")),
            f"{losses[0]:.4f} to {losses[-1]:.4f}",
        ]
        yield f"| {' | '.join(cells)} |"


def bars(results: list[dict[str, Any]], taken: dict[str, dict[str, list[float]]], shape: str) -> Iterator[str]:
    """The figures that are to be reached, in Markdown; of steps the ratio of the medians, with quartiles of all."""
    yield "| figure | measured | quartiles | at most | reached |\n|---|---|---|---|---|"
    found: list[tuple[str, float, str, float]] = []
    for name, other, most in PAIRS if shape == "8b" else []:
        if times := taken.get(name):
            each = [a / b for a, b in zip(times[name], times[other], strict=True)]
            low, _, high = statistics.quantiles(each, n=4)
            ratio = statistics.median(times[name]) / statistics.median(times[other])
            found.append((f"step of {name} / {other}", ratio, f"{low:.3f} to {high:.3f}", most))
        mine, their = (figure(results, row, "kernels_ms") for row in (name, other))
        if mine and their:
            found.append((f"kernels of {name} / {other}", mine / their, "", most))
    for of, key, name, most in BARS:
        if of == shape and (value := figure(results, name, key)) is not None:
            found.append((f"{key} of {name}", value, "", most))
    for what, value, spread, most in found:
        yield f"| {what} | {value:.3f} | {spread} | {most:.2f} | {'yes' if value <= most else 'no'} |"


def plans(names: list[str], results: list[dict[str, Any]], args: argparse.Namespace) -> Iterator[str]:
    """lit-peft's plan beside what was measured, in Markdown."""
    yield "| row | static GiB, planned | peak GiB, planned | measured | planned / measured |\n|---|---|---|---|---|"
    for name in names:
        row, peak = ROWS[name], figure(results, name, "peak_gib")
        if row.library == "ours":
            plan = planned(row, args)
            static, total = (plan.base + plan.constants + plan.adapters) / 2**30, plan.peak / 2**30
            ratio = show(peak and total / peak, 3)
            yield f"| {name} | {static:.2f} | {total:.2f} | {show(peak)} | {ratio} |"


def chosen(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """Names of the rows to run."""
    for glob in [*args.rows, *args.skip]:
        if not fnmatch.filter(ROWS, glob):
            parser.error(f"no row {glob!r}; there are {', '.join(ROWS)}")
    wanted = {name for glob in args.rows for name in fnmatch.filter(ROWS, glob)}
    wanted -= {name for glob in args.skip for name in fnmatch.filter(ROWS, glob)}
    return [name for name in ROWS if name in wanted]


def note(path: Path, found: dict[str, Any]) -> None:
    """Adds a line of JSON to a file: what was measured before a run is cut off is kept."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--rows", nargs="+", default=None, help="globs; default: all, for 65b one")
    parser.add_argument("--skip", nargs="+", default=[], help="globs of rows to leave out")
    for name, what in (
        ("batch", "texts"),
        ("length", "tokens"),
        ("r", "rank"),
        ("rounds", ""),
        ("warmup", ""),
        ("steps", ""),
        ("turns", "steps of each of two rows that are compared"),
    ):
        parser.add_argument(f"--{name}", type=int, default=None, help=what or None)
    parser.add_argument("--alpha", type=float, default=None)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--paged", action=argparse.BooleanOptionalAction, default=None, help="paged AdamW")
    parser.add_argument("--liger", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=None, help="compare gradients first")
    parser.add_argument("--plan", action="store_true", help="tell lit-peft's plan of our rows")
    parser.add_argument("--out", type=Path, default=None, help="file for lines of JSON")
    args = parser.parse_args(argv)
    defaults = {"rows": ["*"], "paged": False, "check": True, **DEFAULTS[args.shape]}
    vars(args).update({key: value for key, value in defaults.items() if getattr(args, key) is None})
    names = chosen(args, parser)

    transformers.utils.logging.set_verbosity_error()
    built = build(args.shape, args.length, args.device)
    models = by_library(built.model, args)
    packages = {"torch": torch, "transformers": transformers, "peft": peft, "bitsandbytes": bitsandbytes}
    setting = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "versions": {name: package.__version__ for name, package in packages.items()},
        "build": built._replace(model=None)._asdict(),
        "arguments": {**vars(args), "out": str(args.out)},
    }
    peak = f", peak {built.peak_gib:.2f} GiB" if built.peak_gib is not None else ""
    print(f"built in {built.seconds:.1f} s{peak}; {built.layers} layers in 4 bit", flush=True)
    if args.check:
        setting["agreement"] = agreement(models, args)
        print("| equal adapters | loss differs by | gradients by |\n|---|---|---|")
        for what, (loss, gradient) in setting["agreement"].items():
            print(f"| {what} | {loss:.2e} | {gradient:.2e} |", flush=True)
    results: list[dict[str, Any]] = []
    pairs = [(ours, theirs) for ours, theirs, _ in PAIRS if args.turns and {ours, theirs} <= set(names)]
    taken = {pair[0]: turns(models, pair, args) for pair in pairs}
    if args.out:
        note(args.out, {"turns": taken})
    for times in taken.values():
        print("in turns:", ", ".join(f"{row} {statistics.median(found):.1f} ms" for row, found in times.items()))
    for i in range(args.rounds + (args.device == "cuda")):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found = measure(models, ROWS[name], args, profiled=i == args.rounds)
            results.append({"row": name, "round": i, **found})
            if args.out:
                note(args.out, results[-1])
    print(*table(sorted(results, key=lambda result: names.index(result["row"]))), sep="\n")
    print(*bars(results, taken, args.shape), sep="\n")
    if args.plan:
        print(*plans(names, results, args), sep="\n")
    if args.out:
        note(args.out, setting)
    print(json.dumps(setting))


if __name__ == "__main__":
    main()
