"""SST-2 by every method: a sweep of learning rates, then quality runs at the best one, HF PEFT's beside ours.

    python benchmarks/make_minilm.py models/minilm
    python benchmarks/sst2.py --backbone models/minilm --data data/sst2 --parallel 8 -- --trainer.precision bf16-mixed

Ours run through `lit-peft fit --config sst2/lora --config methods/NAME` as a user would run them; HF PEFT's adapter
is put into the same task, data and trainer. The sweep trains on --sweep-train sentences with seed 0 and takes the rate
of the highest validation accuracy (on a part cut from train); the runs that count train on all, with the seeds given,
and are scored once on the official validation set (872 sentences) with the checkpoint of the lowest validation NLL.
What follows `--` goes to every run of ours. Prints two tables, then one line of JSON. Needs the dev extra (peft).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

METRICS = ("acc", "ece", "brier", "nll")
RATES = {"full_fine_tuning": (2e-5, 5e-5, 1e-4, 2e-4)}
COMMON_RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
SEVERAL_SEEDS = ("lora", "full_fine_tuning", "bitfit", "hira", "dora", "sparse_lora", "ia3")
THEIRS = ("lora", "dora", "hira", "adalora", "ia3", "vera")


def ours(method: str, seed: int, rate: float, args: argparse.Namespace, limit: int | None) -> dict[str, float]:
    """Runs one method through the command line and returns its metrics.json; of a run that diverged nothing."""
    root = Path(args.out) / f"{method}_{rate:g}_{limit or 'all'}" / f"seed_{seed}"
    command = [
        *(sys.executable, "-m", "lit_peft.cli", "fit", "--config", "sst2/lora", "--config", f"methods/{method}"),
        *("--model.backbone", args.backbone, "--seed_everything", str(seed), "--model.learning_rate", str(rate)),
        *("--trainer.default_root_dir", str(root), "--trainer.enable_progress_bar", "false", "--base_test", "false"),
        *(["--data.path", args.data] if args.data else []),
        *(["--data.limit_train", str(limit)] if limit else []),
        *args.rest,
    ]
    root.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    (root / "log.txt").write_text(done.stdout)
    if done.returncode and "Has the training diverged?" in done.stdout:
        return {}
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}")
    runs = sorted(root.glob("version_*/metrics.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(runs[-1].read_text())


def theirs(method: str, seed: int, rate: float, args: argparse.Namespace, limit: int | None) -> dict[str, float]:
    """The same with HF PEFT's adapter, in a process of its own."""
    words = ["--worker", method, "--seeds", str(seed), "--rate", str(rate), "--backbone", args.backbone]
    words += ["--data", args.data] * bool(args.data) + (
        ["--sweep-train", str(limit)] if limit else ["--sweep-train", "0"]
    )
    command = [sys.executable, __file__, *words, "--precision", args.precision]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.strip().splitlines()[-1])


def worker(args: argparse.Namespace) -> None:
    """Trains HF PEFT's adapter in our task and prints its metrics."""
    import lightning.pytorch as pl
    import peft
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lit_peft.data import SST2DataModule
    from lit_peft.tasks import TextClassification

    attention = ["q_lin", "k_lin", "v_lin", "out_lin"]
    common: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["pre_classifier", "classifier"]}
    lora = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": attention, **common}

    class Theirs(TextClassification):
        def configure_model(self) -> None:
            if self.model is None:
                super().configure_model()
                self.model = peft.get_peft_model(self.model, self.configuration())

        def configuration(self) -> Any:
            if args.worker == "adalora":
                steps = int(self.trainer.estimated_stepping_batches)
                shape = {
                    "init_r": 12,
                    "target_r": 8,
                    "lora_alpha": 12,
                    "total_step": steps,
                    "target_modules": attention,
                }
                return peft.AdaLoraConfig(**shape, tinit=steps // 10, tfinal=3 * steps // 10, **common)
            return {
                "lora": lambda: peft.LoraConfig(**lora),
                "dora": lambda: peft.LoraConfig(**lora, use_dora=True),
                "hira": lambda: peft.HiraConfig(r=32, target_modules=attention, **common),
                "vera": lambda: peft.VeraConfig(r=256, target_modules=attention, **common),
                "ia3": lambda: peft.IA3Config(
                    target_modules=["k_lin", "v_lin", "lin2"], feedforward_modules=["lin2"], **common
                ),
            }[args.worker]()

        def on_before_zero_grad(self, optimizer: Any) -> None:
            if args.worker == "adalora" and self.trainer.global_step:
                self.model.base_model.update_and_allocate(self.trainer.global_step - 1)

    pl.seed_everything(args.seeds[0], verbose=False)
    data = SST2DataModule(
        **{"path": args.data} if args.data else {},
        **{"batch_size": 64, "max_length": 128, "test_split": "validation", "limit_train": args.sweep_train or None},
    )
    with tempfile.TemporaryDirectory() as folder:
        best = ModelCheckpoint(folder, monitor="val/nll", save_on_train_epoch_end=False)
        trainer = pl.Trainer(
            callbacks=[best],
            max_epochs=3,
            precision=args.precision,
            gradient_clip_val=1.0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Theirs(backbone=args.backbone, learning_rate=args.rate)
        trainer.fit(model, data)
        scores = trainer.validate(model, data, ckpt_path=best.best_model_path, verbose=False, weights_only=False)[0]
        scores |= trainer.test(model, data, ckpt_path=best.best_model_path, verbose=False, weights_only=False)[0]
    scores["params/trainable"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    scores["params/trainable_share"] = scores["params/trainable"] / sum(p.numel() for p in model.parameters())
    print(json.dumps(scores))


def row(name: str, rate: float, runs: list[dict[str, float]]) -> str:
    """One line of the table of results."""
    cells = [name, f"{rate:g}", str(len(runs))]
    for metric in METRICS:
        values = [run[f"test/{metric}"] for run in runs]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4f}{spread}")
    size = runs[0].get("adapter/bytes")
    cells += [f"{runs[0]['params/trainable']:,}", f"{runs[0]['params/trainable_share']:.2%}"]
    return "| " + " | ".join([*cells, f"{size / 1000:,.0f}" if size else ""]) + " |"


def main() -> None:
    from lit_peft.arguments import configs

    known = [name.removeprefix("methods/") for name in configs() if name.startswith("methods/")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="distilbert/distilbert-base-uncased")
    parser.add_argument("--data", default=None, help="a folder with SST-2's files; default: the hub's")
    parser.add_argument("--methods", nargs="*", default=known, help=f"of {', '.join(known)}")
    parser.add_argument("--theirs", nargs="*", default=list(THEIRS), help="methods of HF PEFT")
    parser.add_argument("--sweep-train", type=int, default=8000)
    parser.add_argument("--at", type=float, default=None, help="the rate of all runs; no sweep")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=1)
    parser.add_argument("--precision", default="32-true", help="of HF PEFT's runs")
    parser.add_argument("--out", default="runs/benchmark_sst2")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--rate", type=float, default=1e-3, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help="after --: arguments of every run of ours")
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return

    with ThreadPoolExecutor(args.parallel) as pool:
        swept = {
            (method, rate): pool.submit(ours, method, 0, rate, args, args.sweep_train)
            for method in args.methods
            for rate in ([] if args.at else RATES.get(method, COMMON_RATES))
        }
        best: dict[str, float] = dict.fromkeys(args.methods, args.at) if args.at else {}
        print("| method | " + "validation accuracy at each rate | best |\n|---|---|---|")
        for method in [] if args.at else args.methods:
            found = {rate: swept[method, rate].result().get("val/acc", 0.0) for rate in RATES.get(method, COMMON_RATES)}
            best[method] = max(found, key=lambda rate: found[rate])
            shown = ", ".join(f"{rate:g}: {f'{acc:.4f}' if acc else 'diverged'}" for rate, acc in found.items())
            print(f"| {method} | {shown} | {best[method]:g} |", flush=True)
        jobs = {}
        for method in args.methods:
            for seed in args.seeds if method in SEVERAL_SEEDS else args.seeds[:1]:
                jobs[method, seed] = pool.submit(ours, method, seed, best[method], args, None)
        for method in args.theirs:
            for seed in args.seeds if method in SEVERAL_SEEDS else args.seeds[:1]:
                rate = best.setdefault(method, args.at or args.rate)
                jobs[f"HF PEFT {method}", seed] = pool.submit(theirs, method, seed, rate, args, None)
        results = {job: future.result() for job, future in jobs.items()}
    head = ["method", "rate", "seeds", *METRICS, "trainable", "share", "adapter kB"]
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name in dict.fromkeys(name for name, _ in results):
        runs = [run for (other, _), run in results.items() if other == name]
        print(row(name, best[name.removeprefix("HF PEFT ")], runs))
    print(json.dumps({f"{name}/{seed}": run for (name, seed), run in results.items()}))


if __name__ == "__main__":
    main()
