"""The scripts under examples/, run as a user runs them."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(name: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_any_module(tmp_path):
    out = run("any_module.py", tmp_path)
    before, after, again = map(float, re.findall(r"(\d\.\d+) (?:before|after|in a fresh)", out))
    assert before < 0.6 and after > 0.9 and again == after
    checkpoint, model = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) the", out))
    assert checkpoint < 0.25 * model


def test_many_tasks(tmp_path):
    out = run("many_tasks.py", tmp_path)
    rows = re.findall(r"(\w+): accuracy (\d\.\d+), as trained (\d\.\d+)", out)
    assert [task for task, _, _ in rows] == ["reviews", "questions"] * 2
    assert all(found == trained and float(found) > 0.8 for _, found, trained in rows)
    base, adapters, two = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) (?:the|two)", out))
    assert two == 2 * base and base + adapters < 0.6 * two


def test_lora_in_ten_lines(tmp_path):
    source = (ROOT / "examples" / "lora_in_ten_lines.py").read_text().partition('"""\n')[2]
    assert len([line for line in source.splitlines() if line]) == 10
    out = run("lora_in_ten_lines.py", tmp_path)
    assert float(re.search(r"test/acc\D+([\d.]+)", out)[1]) > 0.7
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


END = "-- end of a command"
XS = ["--method.r", "4", "--data.limit_train", "64", "--data.limit_val", "16", "--data.limit_test", "16"]
XS += ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]


def lit_peft(folder: Path, path: Path, *commands: list[str]) -> list[str]:
    """What each command prints in a folder, with another one on the path; in one process, which takes long to start."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    code = f"from lit_peft import cli\nfor command in {commands}:\n    cli.main(command)\n    print({END!r})"
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split(f"{END}\n")[:-1]


def test_a_method_of_ones_own_by_its_class_path(tmp_path):
    source = (ROOT / "examples" / "your_own_method.py").read_text()
    assert len([line for line in source.splitlines() if line.strip()]) < 40
    shutil.copy(ROOT / "examples" / "your_own_method.py", tmp_path)
    (tmp_path / "own.yaml").write_text("method:\n  class_path: your_own_method.LoRAXS\n")
    fit = ["fit", "--config", "quickstart", "--config", "own.yaml", *XS]
    predict = ["predict", "--run", "runs/quickstart/version_0", "--text", "a good film"]
    said = lit_peft(tmp_path, tmp_path, fit, predict)[1]
    (state,) = tmp_path.glob("runs/quickstart/version_0/checkpoints/best.ckpt")
    keys = torch.load(state, weights_only=True)["state_dict"]
    assert any(key.endswith(".peft.default.R") for key in keys)
    assert re.fullmatch(r"(negative|positive) +0\.\d{4}  a good film\n", said)


def test_a_method_of_an_installed_package(tmp_path):
    site = tmp_path / "site"
    package = ROOT / "examples" / "third_party"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(package)], check=True, cwd=tmp_path)
    fit = ["fit", "--config", "quickstart", "--config", str(package / "lora_xs.yaml"), *XS[2:]]
    methods, described, _ = lit_peft(tmp_path, site, ["methods"], ["methods", "LoRAXS"], fit)
    assert "[lit-peft-lora-xs]" in methods and "R [r, r] trains" in described
    assert json.loads((tmp_path / "runs/quickstart/version_0/metrics.json").read_text())["test/acc"] is not None


@pytest.mark.slow
def test_its_suite(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}
    suite = ROOT / "examples" / "third_party" / "test_lora_xs.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "--rootdir",
        str(tmp_path),
        str(suite),
    ]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
