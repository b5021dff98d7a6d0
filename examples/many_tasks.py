"""One base, two tasks: an adapter and a head for each, trained in turn, kept apart, and swapped in place."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import torch
from questions import questions
from torch import nn
from transformers import AutoModel

import lit_peft
from lit_peft import LoRA
from lit_peft.data import TextClassificationDataModule
from lit_peft.demo import ENCODER


class Tasks(pl.LightningModule):
    """An encoder with a head for each task; nothing in it knows of adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(ENCODER).train()
        width = self.encoder.config.hidden_size
        torch.manual_seed(0)  # new heads belong to the base until they are trained: alike in every process
        self.heads = nn.ModuleDict({"reviews": nn.Linear(width, 2), "questions": nn.Linear(width, 6)})
        self.task = "reviews"

    def training_step(self, batch, _):
        batch = dict(batch)
        labels, hidden = batch.pop("labels"), self.encoder(**batch).last_hidden_state
        logits = self.heads[self.task](hidden[:, 0])
        self.log("accuracy", (logits.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(logits, labels)

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def trainer(*callbacks: pl.Callback) -> pl.Trainer:
    """A quiet trainer of three epochs."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=list(callbacks), **quiet)


def accuracy(net: Tasks, task: str) -> float:
    """On the test set of a task, with the adapter of that task."""
    net.task = task
    lit_peft.set_active(net, task)  # nothing is loaded: its layers run its changes, and its head is in place
    return trainer().test(net, data[task], verbose=False)[0]["accuracy"]


pl.seed_everything(0, verbose=False)
with Path("questions.csv").open("w", newline="", encoding="utf-8") as file:
    csv.writer(file).writerows([("text", "label"), *questions(1200)])
common = {"tokenizer": str(ENCODER), "batch_size": 32, "limit_train": 800}
data = {
    task: TextClassificationDataModule(path=path, **common)
    for task, path in (("reviews", "demo"), ("questions", "questions.csv"))
}

net = Tasks()
for net.task in ("reviews", "questions"):
    method = LoRA(r=8, target_modules="attention", train_also=f"heads.{net.task}", name=net.task)
    fit = trainer(method)
    fit.fit(net, data[net.task])  # alone on the base: what was there before is set aside
    fit.save_checkpoint(f"{net.task}.ckpt", weights_only=True)
trained = {task: accuracy(net, task) for task in data}

fresh = Tasks()
for task in data:
    lit_peft.load(fresh, f"{task}.ckpt", name=task)
for task in [*data, *data]:
    print(f"{task}: accuracy {accuracy(fresh, task):.3f}, as trained {trained[task]:.3f}")

adapters = sum(Path(f"{task}.ckpt").stat().st_size for task in data)
base = sum(p.numel() * p.element_size() for p in Tasks().parameters())
print(f"bytes: {base:,} the base and {adapters:,} two adapters, {2 * base:,} two full models")
