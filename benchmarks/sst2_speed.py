"""Time of a step and of inference, and memory, of every method on SST-2 and of HF PEFT's, one after the other.

    python benchmarks/sst2_speed.py --backbone models/minilm --data data/sst2 --precision bf16-mixed

200 steps of the batches that training would have, after 20 that are not counted; inference on the same batches. Nothing
else may run on the GPU. Needs the dev extra (peft).
"""

import gc
import time
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from comparison import parser
from peft_worker import settings, task_and_data
from sst2 import STUDY

import lit_peft.methods
from lit_peft.arguments import configs
from lit_peft.tasks import TextClassification

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


def main() -> None:
    options = parser(__doc__, STUDY)
    options.add_argument("--steps", type=int, default=200)
    args = options.parse_args()
    given = {"--config": STUDY.recipe, "--model.backbone": args.backbone, "--data.path": args.data}
    given |= {"--model.learning_rate": "1e-4", "--data.limit_train": str(64 * (WARM + args.steps))}
    recipe = settings([word for key, value in given.items() if value is not None for word in (key, value)])
    print("| method | ms a step | peak MiB | inference, examples/s |\n|---|---|---|---|")
    for name in [*args.methods, *(f"HF PEFT {method}" for method in args.theirs)]:
        gc.collect()
        torch.cuda.empty_cache()
        pl.seed_everything(0, verbose=False)
        clock, callbacks = Clock(args.steps), []
        model, data = task_and_data(name.removeprefix("HF PEFT "), recipe)
        if not name.startswith("HF PEFT "):
            config = yaml.safe_load(configs()[f"methods/{name}"].read_text())["method"]
            callbacks = [getattr(lit_peft.methods, config["class_path"].split(".")[-1])(**config["init_args"])]
            model = TextClassification(**recipe["model"]["init_args"])
        alone = {"limit_val_batches": 0, "enable_checkpointing": False, "max_steps": WARM + args.steps}
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = pl.Trainer(
            precision=args.precision, gradient_clip_val=1.0, callbacks=[*callbacks, clock], **alone, **quiet
        )
        trainer.fit(model, data)
        print(f"| {name} | {clock.step_ms:.2f} | {clock.peak_mib:,.0f} | {clock.rate:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
