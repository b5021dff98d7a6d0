"""SST-2 by every method: a sweep of learning rates, then quality runs at the best one, HF PEFT's beside ours.

    python benchmarks/make_minilm.py models/minilm
    python benchmarks/sst2.py --backbone models/minilm --data data/sst2 --parallel 8 --precision bf16-mixed
    python benchmarks/sst2.py ... --methods sparse_lora:sparsity=l1,strength=.1 --at 1e-3   # with arguments of a method
    python benchmarks/sst2.py ... --methods lora@1e-3 qlora --rates 5e-4 1e-3   # one at its rate, one with rates to try

Ours run through `lit-peft fit --config sst2/lora --config methods/NAME` as a user would run them; HF PEFT's adapter
is put into the same task, data and trainer. The sweep trains on --sweep-train sentences with seed 0 and takes the
rate of the highest validation accuracy (on a part cut from train); the runs that count train on all, with the seeds
given, and are scored once on the official validation set (872 sentences) with the checkpoint of the lowest validation
NLL. Memory is the peak of each process; times say little where several share the GPU. What follows `--` goes to every
run of ours. Each run keeps log.txt and metrics.json in a folder of its own under --out.
Prints two tables, then one line of JSON. Needs the dev extra (peft).
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sst2_peft import comparison

METRICS = ("acc", "ece", "brier", "nll")
RATES = {"full_fine_tuning": (2e-5, 5e-5, 1e-4, 2e-4), "prompt_tuning": (1e-3, 2e-3, 5e-3, 1e-2, 3e-2)}
COMMON_RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
SEVERAL_SEEDS = ("lora", "full_fine_tuning", "bitfit", "hira", "dora", "qlora", "sparse_lora", "ia3", "adalora", "vera")
WORKER = Path(__file__).with_name("sst2_peft.py")


def base_name(method: str) -> str:
    """Of `name:argument=value,...@rate` the name."""
    return re.split("[:@]", method)[0]


def run(command: list[str], root: Path) -> dict[str, float]:
    """Runs a command that trains and returns the metrics.json it leaves in `root`; of a run that diverged nothing."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "log.txt").open("w+") as log:
        failed = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    said = (root / "log.txt").read_text()
    if failed and "Has the training diverged?" in said:
        return {}
    if failed:
        raise RuntimeError(f"{' '.join(command)}\n{said[-2000:]}")
    found = sorted(root.glob("**/metrics.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(found[-1].read_text())


def ours(method: str, seed: int, rate: float, args: argparse.Namespace, limit: int | None) -> dict[str, float]:
    """One run of a method through the command line."""
    root = Path(args.out, f"{method}_{rate:g}_{limit or 'all'}", f"seed_{seed}")
    name, _, extra = method.partition("@")[0].partition(":")
    command = [
        *(sys.executable, "-m", "lit_peft.cli", "fit", "--config", "sst2/lora", "--config", f"methods/{name}"),
        *(f"--method.{argument}" for argument in extra.split(",") if argument),
        *("--model.backbone", args.backbone, "--seed_everything", str(seed), "--model.learning_rate", str(rate)),
        *("--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false", "--base_test", "false"),
        *("--trainer.precision", args.precision),
        *(["--data.path", args.data] if args.data else []),
        *(["--data.limit_train", str(limit)] if limit else []),
        *args.rest,
    ]
    return run(command, root)


def theirs(method: str, seed: int, rate: float, args: argparse.Namespace, limit: int | None) -> dict[str, float]:
    """The same with HF PEFT's adapter."""
    root = Path(args.out, f"peft_{method}_{rate:g}_{limit or 'all'}", f"seed_{seed}")
    command = [
        *(sys.executable, str(WORKER), base_name(method), "--seed", str(seed), "--rate", str(rate)),
        *("--backbone", args.backbone, "--precision", args.precision, "--out", str(root)),
        *("--adapter-decay", str(args.adapter_decay)),
        *(["--data", args.data] if args.data else []),
        *(["--limit-train", str(limit)] if limit else []),
    ]
    return run(command, root)


def row(name: str, rate: float, runs: list[dict[str, float]]) -> str:
    """One line of the table of results."""
    cells = [name, f"{rate:g}", str(len(runs))]
    for metric in METRICS:
        values = [run[f"test/{metric}"] for run in runs]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4f}{spread}")
    size = runs[0].get("adapter/bytes")
    cells += [f"{runs[0]['params/trainable']:,}", f"{runs[0]['params/trainable_share']:.2%}"]
    cells.append(f"{size / 1000:,.0f}" if size else "")
    cells.append(f"{max(run['memory/peak_bytes'] for run in runs) / 2**20:,.0f}")
    cells.append(f"{statistics.median(run['time/train_s'] for run in runs):,.0f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = comparison(__doc__)
    parser.add_argument("--sweep-train", type=int, default=8000)
    parser.add_argument("--at", type=float, default=None, help="the rate of all runs; no sweep")
    parser.add_argument("--rates", nargs="+", type=float, default=None, help="rates to try; default: each method's")
    several = "default: 0 1 2 for the methods that are compared closely, 0 for the rest; none: the sweep alone"
    parser.add_argument("--seeds", nargs="*", type=int, default=None, help=several)
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--adapter-decay", type=float, default=0.0, help="weight decay of HF PEFT's adapter")
    parser.add_argument("--out", default="runs/benchmark_sst2")
    parser.add_argument("rest", nargs="*", help="after --: arguments of every run of ours")
    args = parser.parse_args()

    def rates(method: str) -> tuple[float, ...]:
        if method in best:
            return ()
        return tuple(args.rates or RATES.get(base_name(method), COMMON_RATES))

    def seeds(method: str) -> list[int]:
        if args.seeds is not None:
            return args.seeds
        return [0, 1, 2] if base_name(method) in SEVERAL_SEEDS else [0]

    best: dict[str, float] = dict.fromkeys(args.methods, args.at) if args.at else {}
    best |= {method: float(method.partition("@")[2]) for method in args.methods + args.theirs if "@" in method}
    with ThreadPoolExecutor(args.parallel) as pool:
        swept = {
            (method, rate): pool.submit(ours, method, 0, rate, args, args.sweep_train)
            for method in args.methods
            for rate in rates(method)
        }
        print("| method | validation accuracy at each rate | best |\n|---|---|---|")
        for method in [method for method in args.methods if method not in best]:
            found = {rate: swept[method, rate].result().get("val/acc", 0.0) for rate in rates(method)}
            best[method] = max(found, key=lambda rate: found[rate])
            shown = ", ".join(f"{rate:g}: {f'{acc:.4f}' if acc else 'diverged'}" for rate, acc in found.items())
            print(f"| {method} | {shown} | {best[method]:g} |", flush=True)
        jobs: dict[tuple[str, int], Future[dict[str, float]]] = {}
        for method in args.methods:
            for seed in seeds(method):
                jobs[method, seed] = pool.submit(ours, method, seed, best[method], args, None)
        for method in args.theirs:
            for seed in seeds(method):
                rate = best.setdefault(method, args.at or 1e-3)
                jobs[f"HF PEFT {method}", seed] = pool.submit(theirs, method, seed, rate, args, None)
    failed = {job: error for job, future in jobs.items() if (error := future.exception())}
    results = {job: future.result() for job, future in jobs.items() if job not in failed}
    head = ["method", "rate", "seeds", *METRICS, "trainable", "share", "adapter kB", "peak MiB", "train s"]
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in dict.fromkeys(name for name, _ in results):
        runs = [run for (other, _), run in results.items() if other == name and run]
        if runs:
            print(row(name, best[name.removeprefix("HF PEFT ")], runs))
    print(json.dumps({f"{name}/{seed}": run for (name, seed), run in results.items()}))
    if failed:
        raise SystemExit("\n".join(f"{name}, seed {seed}: {error}" for (name, seed), error in failed.items()))


if __name__ == "__main__":
    main()
