"""The wheel, installed into an environment of its own and used from an empty folder."""

import json
import os
import re
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object, folder: Path, **environment: str) -> str:
    """Output of a command that must succeed, with nothing of this process's environment but the path."""
    clean = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if key in os.environ}
    result = subprocess.run(
        [str(word) for word in command], cwd=folder, env=clean | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert not [line for line in result.stderr.splitlines() if "torchao" in line or "_pytree" in line]
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The `bin` folder of an environment into which the wheel was installed.

    Its dependencies are those of the running one, through a .pth file; .pth files of that one, an editable install of
    this package among them, are not read from there.
    """
    root = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", root, ROOT, folder=root)
    venv.create(root / "env", with_pip=False, symlinks=True)
    scripts = root / "env" / "bin"
    (wheel,) = root.glob("lit_peft-*.whl")
    run(*pip, "--python", scripts / "python", "install", *offline, wheel, folder=root)
    packages = run(scripts / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=root)
    Path(packages.strip(), "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return scripts


def test_it_is_the_wheel_that_runs(installed, tmp_path):
    where = run(installed / "python", "-c", "import lit_peft; print(lit_peft.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_configurations_come_with_it(installed, tmp_path):
    names = {
        line.split()[0]: line.split()[1]
        for line in run(installed / "lit-peft", "configs", folder=tmp_path).splitlines()
    }
    assert {"quickstart", "offline", "sst2/lora"} <= set(names)
    assert all(Path(path).is_relative_to(installed.parent) for path in names.values())


SHORT = ["--data.limit_train", "256", "--data.limit_val", "64", "--trainer.max_epochs", "1"]


@pytest.mark.parametrize("more", [SHORT, pytest.param([], marks=pytest.mark.slow)], ids=["short", "whole"])
def test_the_quickstart_runs_as_the_readme_says(installed, tmp_path, more):
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [installed / "lit-peft", "fit", "--config", "quickstart", *more]
    out = run(*command, folder=tmp_path, OMP_NUM_THREADS="1", **offline)
    folder = tmp_path / "runs" / "quickstart" / "version_0"
    accuracy = json.loads((folder / "metrics.json").read_text())["test/acc"]
    assert accuracy > (0.6 if more else 0.85)
    assert f"{accuracy:.4f}" in re.search(r"test accuracy.*", out)[0]
    assert (folder / "checkpoints" / "best.ckpt").is_file()
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= {"runs", "cache"}
