"""What a run leaves when something cannot be written."""

import json

import lightning.pytorch as pl
import pytest
from toys import Module, loader, net_lora, trainer

import lit_peft
import lit_peft.data
from lit_peft.callbacks.checkpoints import TestSetCheck as SetCheck  # not to be collected
from lit_peft.callbacks.report import RunReport
from lit_peft.core.folder_files import read_files
from lit_peft.core.records import RECORD
from lit_peft.tasks import TextClassification


def finished(module, tmp_path, capsys, *methods) -> tuple[dict, str]:
    """metrics.json and the summary of a fit."""
    report = RunReport(str(tmp_path))
    report.console.width = 200
    run = trainer(*methods, report, max_steps=1)
    run.fit(module, loader())
    report.finish(run, module, {"val/nll": 0.5}, None, [])
    return json.loads((tmp_path / "metrics.json").read_text()), capsys.readouterr().out


class Named(Module):
    """Attributes that a task of ours has too, with something else in them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.label_names = self.net, {1, 2}


def test_a_modules_own_attributes_do_not_go_into_a_folder(tmp_path, capsys):
    metrics, text = finished(Named(), tmp_path, capsys, net_lora())
    assert metrics["adapter/bytes"] > 0 and "not written: no TensorBoard" in text
    assert json.loads(read_files(tmp_path / "adapter")[2][RECORD])["model"] == {}
    lit_peft.load(Named(), tmp_path / "adapter")


class Renamed(TextClassification):
    pass


@pytest.mark.parametrize("task", [TextClassification, Renamed])
def test_a_task_of_ours_says_what_it_starts_from(task, tmp_path):
    module = task(label_names=["bad", "good"])
    module.configure_model()
    lit_peft.attach(module, lit_peft.LoRA(r=2))
    record = json.loads(read_files(lit_peft.save(module, tmp_path))[2][RECORD])
    assert record["model"] == {"backbone": "demo", "label_names": ["bad", "good"]}


@pytest.mark.parametrize("error", [TypeError("no JSON"), KeyError("gone"), OSError(5, "I/O error"), ValueError("so")])
def test_metrics_are_written_whatever_becomes_of_the_adapter(error, tmp_path, capsys, monkeypatch):
    def fails(module, folder, name, **scores):
        if name == "default":
            raise error
        return lit_peft.save(module, folder, name, **scores)

    monkeypatch.setattr("lit_peft.callbacks.report.save", fails)
    methods = net_lora(), net_lora(name="second")
    metrics, text = finished(Module(), tmp_path, capsys, *methods)
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    assert metrics["val/nll"] == 0.5 and f"not written: {kind}{error}" in text
    assert (tmp_path / "adapter" / "second" / "adapter_config.json").is_file() and "adapter/second" in text


def test_the_network_of_a_module_is_no_name_of_a_tokenizer():
    data = lit_peft.data.TextClassificationDataModule(path="demo")
    data.trainer = type("Trainer", (), {"lightning_module": Named()})()
    with pytest.raises(ValueError, match=r"no `backbone` to take it from: set data\.tokenizer"):
        data.tokenizer  # noqa: B018


@pytest.mark.parametrize(("verb", "told"), [("fit", True), ("test", False)])
def test_only_a_fit_that_is_interrupted_says_what_it_did_not_write(verb, told, tmp_path, capsys):
    run = trainer()
    run.fit(Module(), loader())
    run.state.fn = verb
    RunReport(str(tmp_path)).on_exception(run, run.lightning_module, KeyboardInterrupt())
    assert ("Interrupted after" in capsys.readouterr().out) is told


class Told(pl.LightningDataModule):
    """Says of itself what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.checked: list[str] = []

    def train_dataloader(self):
        return loader()

    test_dataloader = train_dataloader

    def describe(self, roles=("train", "test")):
        return [f"the first data, to {role}" for role in roles]

    def check(self, role):
        self.checked.append(role)


def test_what_is_told_and_checked_is_of_the_data_that_are_read(capsys):
    data, module, report = Told(), Module(), RunReport()
    run = trainer(report, SetCheck(), max_epochs=1)
    run.fit(module, datamodule=data)
    assert "the first data, to train" in capsys.readouterr().out and data.checked == ["test"]
    run.fit_loop.max_epochs = 2
    report._described = None  # a data module is described once
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert "the first data" not in capsys.readouterr().out and data.checked == ["test"]
    run.test(module, datamodule=data, verbose=False)
    assert "the first data, to test" in capsys.readouterr().out
