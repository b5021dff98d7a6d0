"""Every code block of the README does what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from test_cli import SMALL

from lit_peft import cli

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
COMMANDS = [line for language, text in BLOCKS if language == "bash" for line in text.strip().splitlines()]


def test_the_readme_has_blocks_of_both_kinds():
    assert {language for language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.parametrize("source", [text for language, text in BLOCKS if language == "python"])
def test_python_blocks_run(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(
        compile(source.replace("limit_train=512", "limit_train=64, limit_val=32, limit_test=32"), "README.md", "exec"),
        {},
    )
    assert bool(list(tmp_path.rglob("*.ckpt"))) == ("trainer.fit" in source)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command, tmp_path, monkeypatch, capsys):
    program, *arguments = shlex.split(command)
    if program == "make":
        # What they run is tested as such: `fit --config quickstart` in test_cli.py; `check` runs these tests.
        dry = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert {"quickstart": "lit-peft fit --config quickstart", "check": "-m pytest"}[arguments[0]] in dry
        return
    if program == "python" and arguments[0].startswith("examples/"):
        subprocess.run([sys.executable, ROOT / arguments[0], *arguments[1:]], cwd=tmp_path, check=True)
        assert (tmp_path / arguments[1]).stat().st_size > 10_000
        return
    if program == "python":
        # It needs a package index; what it makes is tested in test_make_minilm.py.
        subprocess.run([sys.executable, ROOT / arguments[0], "--help"], capture_output=True, check=True)
        return
    assert program == "lit-peft"
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "fit":
        offline = [] if "offline" in arguments else ["--config", "offline"]
        if "--data.path" in arguments:
            file = Path(arguments[arguments.index("--data.path") + 1])
            kinds = {
                ".csv": ("text,label\n", "number {0},class {1}\n"),
                ".txt": ("", "Number {0} is of class {1}.\n"),
                ".jsonl": ("", '{{"prompt": "Number {0}? ", "completion": "Class {1}."}}\n'),
            }
            head, row = kinds[file.suffix]
            file.write_text(head + "".join(row.format(n, n % 3) for n in range(90)))
            offline = ["--model.backbone", "demo"]
        arguments += [*offline, *SMALL, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"]
    if "fsdp2" in arguments:  # Lightning starts this program once more
        command = [sys.executable, "-m", "lit_peft.cli", *arguments]
        subprocess.run(command, capture_output=True, check=True)
        assert list(tmp_path.rglob("metrics.json"))
        return
    if any(word.startswith("runs/quickstart/version_0") for word in arguments):
        cli.main(["fit", "--config", "quickstart", *SMALL, "--trainer.max_steps", "2", "--trainer.accelerator", "cpu"])
        capsys.readouterr()
    cli.main(arguments)
    assert capsys.readouterr().out
    assert arguments[0] != "fit" or list(tmp_path.rglob("metrics.json"))
