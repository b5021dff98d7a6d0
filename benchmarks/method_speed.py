"""Time of a step and of inference, and memory, of every method of a study and of HF PEFT's, in rounds.

    python benchmarks/method_speed.py --study sst2 --backbone models/minilm --data data/sst2 --precision bf16-mixed
    python benchmarks/method_speed.py --study wikitext2 --backbone models/gpt2-mini --data data/wikitext2 \
        --precision bf16-mixed -- --data.batch_size 32

--steps of the batches that training would have, after 20 that are not counted; inference on the same batches. In each
of --rounds all methods come, another one first each time: medians, and of steps what was least and most. "kernels" is
what the GPU's kernels take of a step, which on a slow host takes longer: of one step each, after all others, since a
profiler goes on to slow a process that has had one. Nothing else may run on the GPU. What follows `--` changes the
study's recipe. Needs the dev extra (peft).
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from typing import Any

import imdb
import lightning.pytorch as pl
import sst2
import torch
import wikitext2
import yaml
from comparison import Study, base_name, own_arguments, parser
from comparison_tables import table
from peft_worker import settings, task_and_data

from lit_peft.arguments import configs
from lit_peft.class_path import imported

STUDIES = {"sst2": sst2.STUDY, "imdb": imdb.STUDY, "wikitext2": wikitext2.CAUSAL, "wikitext2_masked": wikitext2.MASKED}
THEIRS = "HF PEFT "
WARM = 20
GPU = torch.cuda.is_available()


class Clock(pl.Callback):
    """Times the steps after the first ones, then inference on the batches of some of them, in evaluation mode."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.batches: list[Any] = []

    def now(self) -> float:
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == WARM:
            self.start = self.now()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
        self.batches += [batch] * (index < WARM)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.step_ms = (self.now() - self.start) / self.steps * 1000
        self.peak_mib = torch.cuda.max_memory_allocated() / 2**20 if GPU else 0.0
        pl_module.eval()
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            for _ in range(2):  # the first of them warms up
                start = self.now()
                for batch in 5 * self.batches:
                    pl_module(batch)
                self.rate = 5 * sum(len(batch["labels"]) for batch in self.batches) / (self.now() - start)
        self.batches.clear()  # which takes memory of those that are still to come


class Kernels(pl.Callback):
    """Adds up what kernels take of the last step."""

    def __init__(self, steps: int) -> None:
        self.last = steps - 1
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, index: int) -> None:
        if index == self.last:
            torch.cuda.synchronize()
            self.profile.start()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        torch.cuda.synchronize()
        self.profile.stop()
        self.ms = sum(event.self_device_time_total for event in self.profile.key_averages()) / 1000


def train(study: Study, name: str, args: argparse.Namespace, steps: int, callback: pl.Callback) -> None:
    """So many steps of a method `name:argument=value,...`, or of HF PEFT's."""
    gc.collect()
    torch.cuda.empty_cache()
    pl.seed_everything(0, verbose=False)
    own = name.removeprefix(THEIRS)
    given = {"--config": study.recipe, "--model.backbone": args.backbone, "--data.path": args.data}
    given |= {"--model.learning_rate": "1e-4"}
    words = [word for key, value in given.items() if value is not None for word in (key, value)]
    recipe = settings([*words, *study.own.get(base_name(own), ()), *args.rest])
    recipe["data"]["init_args"]["limit_train"] = recipe["data"]["init_args"]["batch_size"] * steps
    callbacks = [callback]
    if name.startswith(THEIRS):
        model, data = task_and_data(own, recipe)
    else:
        method = yaml.safe_load(configs()[f"methods/{base_name(own)}"].read_text())["method"]
        changed = dict(argument.split("=", 1) for argument in own_arguments(own))
        arguments = method["init_args"] | {key: yaml.safe_load(value) for key, value in changed.items()}
        callbacks.append(imported(method["class_path"])(**arguments))
        model, data = (imported(recipe[part]["class_path"])(**recipe[part]["init_args"]) for part in ("model", "data"))
    alone: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": False, "max_steps": steps}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(precision=args.precision, gradient_clip_val=1.0, callbacks=callbacks, **alone, **quiet)
    trainer.fit(model, data)


def kernels_ms(study: Study, name: str, args: argparse.Namespace) -> str:
    """Milliseconds of a step that a method's kernels take, to print; nothing where there is no GPU."""
    if not GPU:
        return ""
    kernels = Kernels(WARM)
    train(study, name, args, WARM, kernels)
    return f"{kernels.ms:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    first = parser(__doc__, sst2.STUDY)
    first.add_argument("--study", choices=STUDIES, required=True)
    study = STUDIES[first.parse_known_args(argv)[0].study]
    options = parser(__doc__, study)
    options.add_argument("--study", choices=STUDIES, required=True)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("rest", nargs="*", help="after --: what to change in the recipe")
    args = options.parse_args(argv)
    names = [*args.methods, *(THEIRS + method for method in args.theirs)]
    clocks: dict[str, list[Clock]] = {name: [] for name in names}
    for i in range(args.rounds):
        at = i % len(names)
        for name in names[at:] + names[:at]:
            clock = Clock(args.steps)
            train(study, name, args, WARM + args.steps, clock)
            clocks[name].append(clock)
            print(f"{name}: {clock.step_ms:.2f} ms, {clock.peak_mib:,.0f} MiB, {clock.rate:,.0f}/s", flush=True)
    rows = []
    for name, found in clocks.items():
        steps = [clock.step_ms for clock in found]
        times = [
            f"{statistics.median(steps):.2f}",
            f"{min(steps):.2f} to {max(steps):.2f}",
            kernels_ms(study, name, args),
        ]
        peak, rate = max(clock.peak_mib for clock in found), statistics.median(clock.rate for clock in found)
        rows.append([name, *times, f"{peak:,.0f}", f"{rate:,.0f}"])
    head = ["method", "ms a step", "least to most", "kernels ms", "peak MiB", "inference, examples/s"]
    print(table(head, rows))


if __name__ == "__main__":
    main()
