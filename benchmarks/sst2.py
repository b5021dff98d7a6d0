"""SST-2 by every recipe under configs/sst2, several seeds each, through `lit-peft fit` as a user would run it.

    python benchmarks/make_minilm.py models/minilm
    python benchmarks/sst2.py --backbone models/minilm --seeds 0 1 2 --parallel 4 -- --trainer.precision bf16-mixed

What follows `--` goes to every run. Accuracy and calibration are of the official validation set (872 sentences),
scored once, with the checkpoint that was best on a part cut from train. Prints a table with means over the seeds
and standard deviations, then one line of JSON. Times are those of runs that share the device when --parallel
exceeds 1.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METRICS = ("acc", "ece", "brier", "nll")


def fit(recipe: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Runs one recipe with one seed and returns its metrics.json."""
    root = Path(args.out) / recipe / f"seed_{seed}"
    command = [
        *(sys.executable, "-m", "lit_peft.cli", "fit", "--config", f"sst2/{recipe}"),
        *("--model.backbone", args.backbone, "--seed_everything", str(seed)),
        *("--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false"),
        *(["--data.path", args.data] if args.data else []),
        *args.rest,
    ]
    root.mkdir(parents=True, exist_ok=True)
    with (root / "log.txt").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    runs = sorted(root.glob("version_*/metrics.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(runs[-1].read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="distilbert/distilbert-base-uncased")
    parser.add_argument("--data", default=None, help="a folder with SST-2's files; default: the hub's")
    parser.add_argument("--recipes", nargs="+", default=["full", "lora", "bitfit", "linear_probe"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--out", default="runs/benchmark_sst2")
    parser.add_argument("rest", nargs="*", help="after --: arguments of every run")
    args = parser.parse_args()

    jobs = [(recipe, seed) for seed in args.seeds for recipe in args.recipes]
    with ThreadPoolExecutor(args.parallel) as pool:
        results = dict(zip(jobs, pool.map(lambda job: fit(*job, args), jobs), strict=True))

    head = ["recipe", *METRICS, "trainable", "share", "train s", "checkpoint kB"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for recipe in args.recipes:
        runs = [results[recipe, seed] for seed in args.seeds]
        cells = [recipe]
        for name in METRICS:
            values = [run[f"test/{name}"] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        cells += [f"{runs[0]['params/trainable']:,}", f"{runs[0]['params/trainable_share']:.2%}"]
        cells.append(f"{statistics.mean(run['time/train_s'] for run in runs):.0f}")
        cells.append(f"{runs[0]['checkpoint/bytes'] / 1000:,.0f}")
        print("| " + " | ".join(cells) + " |")
    print(json.dumps({f"{recipe}/{seed}": run for (recipe, seed), run in results.items()}))


if __name__ == "__main__":
    main()
