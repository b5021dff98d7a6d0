"""The scripts under examples/, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_lora_in_ten_lines(tmp_path):
    source = (ROOT / "examples" / "lora_in_ten_lines.py").read_text().partition('"""\n')[2]
    assert len([line for line in source.splitlines() if line]) == 10
    out = run("lora_in_ten_lines.py", tmp_path)
    assert float(re.search(r"test/acc\D+([\d.]+)", out)[1]) > 0.7
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
