"""A run that is killed at random moments, twenty times over, and taken up again each time."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import fit
from test_resume import outcome

from lit_peft.core.files import check_archive
from lit_peft.runs import LOCK

KILLS = 20
# Long enough to be killed that often, with a checkpoint at every step, a validation every few, and dropout on.
ARGUMENTS = [
    *("--config", "quickstart", "--data.limit_train", "640", "--data.limit_val", "64", "--data.limit_test", "64"),
    *("--data.batch_size", "16", "--trainer.max_epochs", "4", "--trainer.val_check_interval", "10"),
    *(
        "--resume_every",
        "1",
        "--method.dropout",
        "0.1",
        "--trainer.accelerator",
        "cpu",
        "--early_stopping.patience",
        "99",
    ),
]


def whole(folder: Path) -> None:
    """Every file of the run under its own name can be read to its end."""
    for path in folder.rglob("*"):
        if path.name.startswith("."):
            assert path.suffix == ".part" or path.name == LOCK  # what a killed writer leaves never has a file's name
        elif path.suffix == ".ckpt":
            check_archive(path)
            torch.load(path, weights_only=True)
        elif path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix in (".json", ".yaml"):
            assert path.read_text().endswith("\n")


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    expected = outcome(fit(tmp_path / "whole", *ARGUMENTS))
    rng = random.Random(0)
    root = tmp_path / "killed"
    folder, last = root / "version_0", root / "version_0" / "checkpoints" / "last.ckpt"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    kills, progress = 0, []
    while True:
        words = ["--run", str(folder)] if last.is_file() else [*ARGUMENTS, "--trainer.default_root_dir", str(root)]
        process = subprocess.Popen(
            [sys.executable, "-m", "lit_peft.cli", "fit", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kills < KILLS:
            if last.is_file() and rng.random() < 0.3:  # while it starts, reads the checkpoint, or makes its first steps
                time.sleep(rng.uniform(0.0, 8.0))
            else:
                _wait_for_steps(process, last)
                time.sleep(rng.uniform(0.0, 0.6))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            whole(root)
            progress.append(torch.load(last, weights_only=True)["global_step"])
            assert progress == sorted(progress)  # no file is lost, none goes back
            if process.returncode == 0:
                break
        else:
            _, error = process.communicate()
            assert process.returncode == 0, error
            break
    assert kills == KILLS, f"the run ended after {kills} kills: {progress}"
    assert {path.name for path in root.iterdir()} == {"version_0"}
    assert not list(root.rglob("*.part"))
    whole(root)
    found = outcome(folder)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert found[2] == expected[2]


def _wait_for_steps(process: "subprocess.Popen[str]", last: Path) -> None:
    """Waits until the process has written a checkpoint of its own, or has ended."""
    before = last.stat().st_mtime_ns if last.is_file() else 0
    deadline = time.monotonic() + 120
    while process.poll() is None and (not last.is_file() or last.stat().st_mtime_ns == before):
        assert time.monotonic() < deadline
        time.sleep(0.02)
