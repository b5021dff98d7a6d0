"""The command line and a user's own modules: finding them, what is told where one cannot be used, callbacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_cli import SMALL, fit

from lit_peft import cli

FILES = {
    "__init__.py": """
        import lightning.pytorch as pl
        import torch

        class Net(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

            def training_step(self, batch, _):
                return torch.nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

            def validation_step(self, batch, index):
                self.log("val_loss", self.training_step(batch, index))

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters())

        class Data(pl.LightningDataModule):
            def train_dataloader(self):
                rows = torch.utils.data.TensorDataset(torch.randn(32, 8), torch.arange(32) % 2)
                return torch.utils.data.DataLoader(rows, batch_size=8)

            val_dataloader = train_dataloader
        """,
    "old.py": """
        import pytorch_lightning as pl

        class Net(pl.LightningModule):
            def __init__(self, width: int = 4):
                super().__init__()

        class Data(pl.LightningDataModule):
            pass
        """,
    "broken.py": """
        NAMES = {}
        NAMES["missing"]
        """,
    "needs.py": "import no_such_dependency",
    "syntax.py": "def f(:",
    "plain.py": "class Net: pass",
    "kept.py": """
        from own_package import Net as Plain

        class Size:
            pass

        class Net(Plain):
            def __init__(self):
                super().__init__()
                size = Size()
                self.save_hyperparameters({"width": 8, "size": size})
        """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder that holds the user's package, and a file whose name an installed package has."""
    from textwrap import dedent

    root = tmp_path_factory.mktemp("user")
    (root / "own_package").mkdir()
    for name, text in FILES.items():
        (root / "own_package" / name).write_text(dedent(text))
    (root / "datasets.py").write_text("raise RuntimeError('this is not the package')")
    return root


def test_the_console_script_finds_a_module_in_the_working_directory(folder):
    """With -P, as in a console script, the working directory is not on the path, which it is with -c and -m."""
    command = [sys.executable, "-P", "-c", "from lit_peft.cli import main; main()", "fit"]
    names = ["--model", "own_package.Net", "--data", "own_package.Data", "--method", "LoRA", "--method.r", "2"]
    more = ["--method.target_modules", "body", "--trainer.max_steps", "3", "--trainer.accelerator", "cpu"]
    monitors = ["--early_stopping.monitor", "val_loss", "--checkpoint.monitor", "val_loss"]
    result = subprocess.run(
        [*command, *names, *more, *monitors],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "runs" / "version_0" / "metrics.json").read_text())["val_loss"] > 0


@pytest.mark.parametrize(
    ("key", "path", "expected"),
    [
        ("model", "own_packge.Net", "There is no module 'own_packge' in {folder} nor among the installed packages. "),
        ("model", "own_packge.Net", "Did you mean 'own_package'?"),
        ("model", "own_package.brokn.Net", "There is no module 'own_package.brokn' in own_package. Did you mean 'br"),
        ("model", "own_package.Nett", "Module 'own_package' ({folder}/own_package/__init__.py) has no class 'Nett'. "),
        ("model", "own_package.Nett", "Did you mean 'Net'?"),
        ("model", "own_package.Unlike", "Its own: Net, Data."),
        ("data", "own_package.Dota", "has no class 'Dota'. Did you mean 'Data'?"),
        ("method", "own_package.Method", "has no class 'Method'."),
        ("model", "own_package.broken.Net", "{folder}/own_package/broken.py, line 3:\nKeyError: 'missing'"),
        ("model", "own_package.needs.Net", "needs.py, line 1:\nModuleNotFoundError: No module named 'no_such_dep"),
        ("model", "own_package.syntax.Net", "syntax.py, line 1:\nSyntaxError: "),
        ("model", "own_package.plain.Net", "own_package.plain.Net is not a LightningModule."),
        ("model", "own_package.old.Net", "own_package.old.Net is a LightningModule of pytorch_lightning"),
        ("model", "own_package.old.Net", "In own_package.old, write `import lightning.pytorch as pl`"),
        ("data", "own_package.old.Data", "is a LightningDataModule of pytorch_lightning"),
    ],
)
def test_a_class_that_cannot_be_used_is_told(folder, monkeypatch, capsys, key, path, expected):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {"model": "own_package.Net", "data": "own_package.Data", "method": "LoRA"} | {key: path}
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", *(word for name, value in names.items() for word in (f"--{name}", value))])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert expected.format(folder=folder) in error
    assert len(error[error.index("lit-peft:") :].strip().splitlines()) <= 3


@pytest.mark.parametrize("way", ["file", "argument"])
def test_so_is_one_whose_arguments_are_given(folder, monkeypatch, capsys, way):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "run.yaml").write_text("model:\n  class_path: own_package.old.Net\n  init_args: {width: 3}\n")
    model = ["--config", "run.yaml"] if way == "file" else ["--model", "own_package.old.Net", "--model.width", "3"]
    with pytest.raises(SystemExit):
        cli.main(["fit", *model, "--data", "own_package.Data", "--method", "LoRA"])
    assert "own_package.old.Net is a LightningModule of pytorch_lightning" in capsys.readouterr().err


def test_an_object_among_the_hyperparameters_is_refused_before_training(folder, monkeypatch, capsys):
    """Twice in one folder: what was refused has left nothing there that would look like a run."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = ["--model", "own_package.kept.Net", "--data", "own_package.Data", "--method", "LoRA"]
    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "logs"]
    version = ["--trainer.logger.name", "mine", "--trainer.logger.version", "one"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            cli.main(["fit", *names, "--method.r", "2", "--method.target_modules", "body", *logger, *version])
        assert "Net keeps 'size', of the class Size, as a hyperparameter" in capsys.readouterr().err
    assert not (folder / "logs" / "mine" / "one").exists()


# ----------------------------------------------------------------------------------------- Lightning's callbacks


def with_callback(root: Path, name: str, *arguments: str) -> Path:
    short = ("--trainer.max_epochs", "4", "--base_test", "false")
    return fit(root, "--config", "quickstart", *SMALL, *short, "--trainer.callbacks", name, *arguments)


def test_weight_averaging(tmp_path):
    run = with_callback(tmp_path, "EMAWeightAveraging", "--trainer.callbacks.decay", "0.5")
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["state_dict"].keys() == content["current_model_state"].keys()
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    averaged = {key: value for key, value in content["state_dict"].items() if key.endswith("lora_B")}
    for key, value in averaged.items():
        name = key.removeprefix("model.").replace(".peft.default.lora_B", ".lora_B.weight")
        assert torch.equal(adapter[f"base_model.model.{name}"], value)
        assert not torch.equal(content["current_model_state"][key], value)
    cli.main(["test", "--config", str(run / "config.yaml")])


def test_learning_rate_finder(tmp_path, capsys):
    run = with_callback(tmp_path, "LearningRateFinder", "--trainer.callbacks.num_training_steps", "14")
    assert json.loads((run / "metrics.json").read_text())["test/acc"] is not None
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt")])
    assert "LearningRateFinder would make the resumed fit start anew" in capsys.readouterr().err


def test_batch_size_finder(tmp_path):
    run = with_callback(tmp_path, "BatchSizeFinder", "--trainer.callbacks.max_trials", "3")
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4 * 64 // 8
