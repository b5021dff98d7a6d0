"""A fit that is killed and taken up again ends where an uninterrupted one ends, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from test_cli import fit

# 3 epochs of 6 batches, dropout on, two batches a step: checkpoints at every step fall inside epochs.
ARGUMENTS = [
    *("--data.limit_val", "32", "--data.limit_test", "32", "--trainer.max_epochs", "3"),
    *("--trainer.accumulate_grad_batches", "2", "--resume_every", "1", "--method.dropout", "0.1"),
]
RECIPES = {
    "classes": ["--config", "quickstart", "--data.limit_train", "96", "--data.batch_size", "16"],
    "packed completions": ["--config", "quickstart_lm", "--data.limit_train", "24", "--data.batch_size", "4"],
    "masked tokens": [
        *("--config", "wikitext2/lora_masked", "--config", "offline", "--data.block_size", "16"),
        *("--data.limit_train", "96", "--data.batch_size", "16"),
    ],
}


class KillAt(pl.Callback):
    """Ends the process without a word, as a scheduler does, when the given batch of the run begins."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, float]]:
    last, best = (
        torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("last", "best")
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    return last, best, {k: v for k, v in metrics.items() if k.split("/")[0] in ("val", "test", "base")}


@pytest.mark.parametrize(
    "recipe, batches",
    [("classes", [6, 10]), ("packed completions", [10]), ("masked tokens", [10])],  # after an epoch, and within one
)
def test_a_killed_fit_resumes_exactly(recipe, batches, tmp_path, monkeypatch):
    arguments = [*RECIPES[recipe], *ARGUMENTS]
    uninterrupted = outcome(fit(tmp_path / "whole", *arguments))
    for batch in batches:
        check_resume(arguments, batch, uninterrupted, tmp_path / str(batch), monkeypatch)


def check_resume(arguments, batch, uninterrupted, root, monkeypatch):
    killer = [
        *("--trainer.callbacks", "test_resume.KillAt", "--trainer.callbacks.batch", str(batch)),
        *("--trainer.default_root_dir", str(root), "--trainer.accelerator", "cpu"),
    ]
    killed = subprocess.run(
        [sys.executable, "-m", "lit_peft.cli", "fit", *arguments, *killer],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    folder = root / "version_0"
    assert not (folder / "metrics.json").exists()
    monkeypatch.chdir(root)  # the same folder by another name
    resumed = fit(root, *arguments, "--ckpt_path", "version_0/checkpoints/last.ckpt")
    assert resumed == folder  # the run goes on in its own folder
    for ours, theirs in zip(outcome(folder)[:2], uninterrupted[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert outcome(folder)[2] == uninterrupted[2]
