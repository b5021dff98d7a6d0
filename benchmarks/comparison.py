"""Runs of many methods on one task: a sweep of rates, then runs at the best rate, HF PEFT's beside ours.

What sst2.py, wikitext2.py and imdb.py share; they say what differs, a `Study`. Ours run through `lit-peft fit` as a
user would run them; HF PEFT's adapter is put into the same task, data and trainer by peft_worker.py. Every run is a
process and keeps log.txt, metrics.json and monitor.json in a folder of its own. A run that has ended is a line of JSON
at once, so that nothing is lost when time runs out; `--report` makes the tables of such lines.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison_tables import Record, name_of, print_tables, told
from run_monitor import FILE

from lit_peft.arguments import configs

HERE = Path(__file__).parent
MONITOR = ("--trainer.callbacks+=run_monitor.RunMonitor",)
KNOWN = tuple(name.removeprefix("methods/") for name in configs() if name.startswith("methods/"))


@dataclass(frozen=True)
class Study:
    """What is compared on which data.

    Attributes:
        name: Of the folder of runs, by default.
        recipe: Configuration that every run starts from.
        scores: Metrics of the test, as columns of the table, with their decimals.
        select: Metric by which the sweep chooses a rate: the lowest nll, the highest of any other.
        methods: Ours, unless `--methods` says others.
        theirs: HF PEFT's, likewise.
        rates: Rates to try, by method.
        common_rates: The same of all other methods.
        several_seeds: Methods that run with seeds 0, 1 and 2 by default; the others with 0.
        variants: Name -> arguments: each method runs once for each, the sweep with those of the first.
        retests: Name -> (variant, arguments): its runs are tested again with these, without training.
        own: Arguments of the runs of some methods.
        base_of: Methods whose first run also scores the base, before training.
        curve: Whether the validations of each method's first run are printed.
    """

    name: str
    recipe: str
    scores: Mapping[str, int]
    select: str
    methods: Sequence[str]
    theirs: Sequence[str]
    rates: Mapping[str, Sequence[float]]
    common_rates: Sequence[float]
    several_seeds: Collection[str]
    variants: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": ()})
    retests: Mapping[str, tuple[str, Sequence[str]]] = field(default_factory=dict)
    own: Mapping[str, Sequence[str]] = field(default_factory=dict)
    base_of: Collection[str] = ()
    curve: bool = False


@dataclass(frozen=True)
class Run:
    """One run: of a method `name:argument=value,...@rate`, at a rate and with a seed."""

    method: str
    rate: float
    seed: int
    variant: str = ""
    library: str = ""
    limit: int | None = None
    """Rows that a run of the sweep trains on; None: a run that counts."""

    def folder(self, out: str) -> Path:
        parts = [self.library.replace(" ", "_"), self.method, self.variant, f"{self.rate:g}", str(self.limit or "all")]
        return Path(out, "_".join(part for part in parts if part), f"seed_{self.seed}")

    def record(self, **more: Any) -> Record:
        name = name_of(self.library, self.method, self.variant)
        own: Record = {"name": name, "method": self.method, "rate": self.rate, "seed": self.seed}
        return own | {"sweep": self.limit is not None, "metrics": {}} | more


class Ledger:
    """What has ended so far, in memory and as lines of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, record: Record) -> None:
        with self._lock:
            self.records.append(record)
            with self.path.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            print(told(record), file=sys.stderr, flush=True)


def base_name(method: str) -> str:
    """Of `name:argument=value,...@rate` the name."""
    return re.split("[:@]", method)[0]


def own_arguments(method: str) -> list[str]:
    """Of `name:argument=value,...@rate` the arguments, each with its value."""
    return [argument for argument in method.partition("@")[0].partition(":")[2].split(",") if argument]


def parser(description: str | None, study: Study) -> argparse.ArgumentParser:
    """A parser of what to compare, on which model and data."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--backbone", default=None, help="hub id or folder; default: the recipe's")
    made.add_argument("--data", default=None, help="a folder with the data's files; default: the hub's")
    made.add_argument("--precision", default="32-true")
    made.add_argument("--methods", nargs="*", default=list(study.methods), help=f"of {', '.join(KNOWN)}")
    made.add_argument("--theirs", nargs="*", default=list(study.theirs), help="methods of HF PEFT")
    return made


def add_runs(made: argparse.ArgumentParser, study: Study, sweep_train: int) -> None:
    """The options that say how methods run."""
    made.add_argument("--sweep-train", type=int, default=sweep_train, help="rows that a run of the sweep trains on")
    made.add_argument("--sweep-epochs", type=int, default=None, help="its epochs; default: the recipe's")
    made.add_argument("--epochs", type=int, default=None, help="most epochs of a run (%(default)s); None: the recipe's")
    made.add_argument("--at", type=float, default=None, help="the rate of all runs; no sweep")
    made.add_argument("--rates", nargs="+", type=float, default=None, help="rates to try; default: each method's")
    several = f"default: 0 1 2 for {', '.join(study.several_seeds)}, 0 for the rest; none: the sweep alone"
    made.add_argument("--seeds", nargs="*", type=int, default=None, help=several)
    made.add_argument("--parallel", type=int, default=1, help="runs at a time")
    made.add_argument("--adapter-decay", type=float, default=0.0, help="weight decay of HF PEFT's adapter")
    extra = "arguments of one method's runs, in one word: --extra 'qlora --model.optimizer torch.optim.AdamW'"
    made.add_argument("--extra", action="append", default=[], help=extra)
    late = "begin no run after so many minutes, and end those that go on, so that the tables are printed in time"
    made.add_argument("--minutes", type=float, default=math.inf, help=late)
    made.add_argument("--out", default=f"runs/benchmark_{study.name}")
    made.add_argument("--lines", type=Path, default=None, help="file to add a line to for each run; OUT/lines.jsonl")
    made.add_argument("--report", nargs="+", type=Path, default=None, help="run nothing: the tables of such files")
    made.add_argument("rest", nargs="*", help="after --: arguments of every run; those of a method are for ours alone")


def execute(command: list[str], root: Path, deadline: float = math.inf) -> Record:
    """Runs a command that leaves metrics.json and monitor.json somewhere below `root`; of one that diverged nothing."""
    left = deadline - time.monotonic()
    if left <= 0:
        return {"error": "no time was left for it"}
    root.mkdir(parents=True, exist_ok=True)
    (root / FILE).unlink(missing_ok=True)  # of an earlier call
    paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(HERE))))
    setting: dict[str, Any] = {"stderr": subprocess.STDOUT, "env": os.environ | {"PYTHONPATH": paths}}
    try:
        with (root / "log.txt").open("w") as log:
            until = None if math.isinf(left) else left
            failed = subprocess.run(command, stdout=log, timeout=until, **setting).returncode
    except subprocess.TimeoutExpired:
        curve = json.loads((root / FILE).read_text())["curve"] if (root / FILE).is_file() else []
        return {"error": "its time was over", "curve": curve}
    said = (root / "log.txt").read_text(errors="replace")
    if failed and "Has the training diverged?" in said:
        return {"diverged": True}
    if failed or not (root / FILE).is_file():
        return {"error": f"{shlex.join(command)}\n{said[-2000:]}"}
    monitor = json.loads((root / FILE).read_text())
    found = max(root.glob("**/metrics.json"), key=lambda path: path.stat().st_mtime, default=None)
    if found is None:  # of `lit-peft test`
        return {"metrics": monitor["metrics"]}
    return {
        "metrics": json.loads(found.read_text()) | monitor["metrics"],
        "curve": monitor["curve"],
        "run": str(found.parent),
    }


def arguments(study: Study, run: Run, args: argparse.Namespace) -> list[str]:
    """What both libraries are told."""
    sweep = run.limit is not None
    epochs = args.sweep_epochs if sweep else args.epochs
    base = not sweep and base_name(run.method) in study.base_of and run.seed == (args.seeds or [0])[0]
    given = {
        "--model.backbone": args.backbone,
        "--model.learning_rate": str(run.rate),
        "--data.path": args.data,
        "--data.limit_train": run.limit,
        "--seed_everything": run.seed,
        "--base_test": str(base).lower(),
        "--resume_every": 1_000_000,  # no run goes on, and HF PEFT's writes nothing between
        "--trainer.default_root_dir": run.folder(args.out),
        "--trainer.precision": args.precision,
        "--trainer.max_epochs": epochs,
        "--trainer.limit_test_batches": 0 if sweep else None,
        "--trainer.enable_progress_bar": "false",
    }
    words = [word for key, value in given.items() if value is not None for word in (key, str(value))]
    words += [*study.variants[run.variant], *args.arguments, *study.own.get(base_name(run.method), ())]
    for name, *own in map(shlex.split, args.extra):
        words += own if name in (run.method, base_name(run.method)) else []
    return words + args.rest


def fit(study: Study, run: Run, args: argparse.Namespace, ledger: Ledger) -> None:
    """One run, and its further tests."""
    root, name = run.folder(args.out), base_name(run.method)
    words = arguments(study, run, args)
    if run.library:
        words = [word for start, word in enumerate(words) if not _of_our_method(words, start)]
        worker = [sys.executable, str(HERE / "peft_worker.py"), name, "--config", study.recipe]
        done = execute([*worker, "--model.adapter_weight_decay", str(args.adapter_decay), *words], root, args.deadline)
    else:
        method = [f"--method.{argument}" for argument in own_arguments(run.method)]
        verbs = [sys.executable, "-m", "lit_peft.cli"]
        recipe = ["--config", study.recipe, "--config", f"methods/{name}"]
        done = execute([*verbs, "fit", *recipe, *method, *words, *MONITOR], root, args.deadline)
    folder = done.pop("run", None)
    ledger.add(run.record(**done))
    if run.limit is not None or run.library or folder is None:
        return
    for title, (variant, more) in study.retests.items():
        if variant == run.variant:
            below = root / title.replace(" ", "_")
            command = [*verbs, "test", "--run", folder, *more, "--trainer.default_root_dir", str(below)]
            again = execute(command, below, args.deadline)
            if "metrics" in again:  # of its training what there was to say
                again["metrics"] = {k: v for k, v in done["metrics"].items() if "test" not in k} | again["metrics"]
            ledger.add(run.record(**again, name=name_of("", run.method, title)))


def _of_our_method(words: Sequence[str], at: int) -> bool:
    """Whether a word is an option of our method, or its value."""
    ours = words[at].startswith("--method.")
    return ours or (at > 0 and words[at - 1].startswith("--method.") and "=" not in words[at - 1])


def best_rate(study: Study, records: Sequence[Record], method: str) -> float | None:
    """The best of the rates that were tried and did not diverge; None where none is left."""
    tried = {r["rate"]: r["metrics"].get(study.select) for r in records if r["sweep"] and r["method"] == method}
    sign = -1 if study.select.endswith("nll") else 1
    found = {rate: sign * value for rate, value in tried.items() if value is not None}
    return max(found, key=lambda rate: found[rate], default=None)


def compare(study: Study, args: argparse.Namespace, data: Sequence[str] = ()) -> None:
    """Runs what the arguments ask for, and prints tables and a line of JSON of what has ended.

    Args:
        study: What is compared.
        args: Of a parser with the options of `add_runs`.
        data: Further arguments of all runs.
    """
    args.arguments, args.deadline = list(data), time.monotonic() + 60 * args.minutes
    if args.report:
        read = [json.loads(line) for path in args.report for line in path.read_text().splitlines()]
        latest = {tuple(r[key] for key in ("name", "rate", "seed", "sweep")): r for r in read}
        print_tables(study.scores, study.select, list(latest.values()), study.curve)
        return
    ledger = Ledger(args.lines or Path(args.out, "lines.jsonl"))
    known = dict.fromkeys(args.methods + args.theirs, args.at) if args.at else {}
    known |= {method: float(method.partition("@")[2]) for method in args.methods + args.theirs if "@" in method}
    skipped: list[str] = []
    with ThreadPoolExecutor(args.parallel) as pool:

        def submit(*run: Any, **more: Any) -> Future[None]:
            return pool.submit(fit, study, Run(*run, **more), args, ledger)

        def submit_seeds(method: str, rate: float, library: str = "") -> list[Future[None]]:
            several = [0, 1, 2] if base_name(method) in study.several_seeds else [0]
            seeds = several if args.seeds is None else args.seeds
            return [submit(method, rate, s, variant, library) for variant in study.variants for s in seeds]

        first = next(iter(study.variants))
        sweeps = {
            method: [
                submit(method, rate, 0, first, limit=args.sweep_train)
                for rate in args.rates or study.rates.get(base_name(method), study.common_rates)
            ]
            for method in args.methods
            if method not in known
        }
        jobs: list[Future[None]] = []
        for method in args.methods:
            if method in sweeps:
                wait(sweeps[method])
                jobs += sweeps[method]
                if (rate := best_rate(study, ledger.records, method)) is None:
                    skipped.append(f"{method}: no rate of the sweep is left")
                    continue
                known[method] = rate
            jobs += submit_seeds(method, known[method])
        for method in args.theirs:
            jobs += submit_seeds(method, known.get(method, 1e-3), "HF PEFT")
    print_tables(study.scores, study.select, ledger.records, study.curve)
    for job in jobs:
        job.result()  # an error of this script
    errors = [f"{told(record)}\n{record['error']}" for record in ledger.records if "error" in record]
    if skipped or errors:
        raise SystemExit("\n".join([*skipped, *errors]))
