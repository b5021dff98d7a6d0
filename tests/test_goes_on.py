"""What a run holds on to: a resumed fit goes on with its data and its rates, and held-out rows stay held out."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import fit
from toys import Module, net_lora
from toys import fit as train

from lit_peft import cli
from lit_peft.arguments import resolve
from lit_peft.data import TextClassificationDataModule
from lit_peft.data.held_out import content
from lit_peft.data.splits import load_splits
from lit_peft.demo import ENCODER
from lit_peft.lightning_cli import run
from lit_peft.runs import lock_folder, unlock_folders

QUESTIONS = (("who", "HUM"), ("where", "LOC"), ("when", "NUM"))


def write(path: Path, count: int, first: int = 0) -> Path:
    numbers = range(first, first + count)
    rows = [f"{word} it is {number},{label}\n" for number in numbers for word, label in QUESTIONS]
    path.write_text("text,label\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `my.csv` and a run of two steps on it, `runs/version_0`, that began in that folder.

    Data and base are named as seen from there.
    """
    root = tmp_path_factory.mktemp("goes on")
    write(root / "my.csv", 20)
    shutil.copytree(ENCODER, root / "models" / "tiny")
    with chdir(root):
        fit(
            *(Path("runs"), "--config", "text_classification/lora", "--data.path", "my.csv"),
            *("--model.backbone", "models/tiny", "--data.batch_size", "8"),
            *("--trainer.max_steps", "2", "--base_test", "false"),
        )
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Iterator[Path]:
    """That folder, as it was; a run knows its data by their path."""
    shutil.copytree(trained, tmp_path / "kept")
    yield trained
    shutil.rmtree(trained)
    shutil.move(tmp_path / "kept", trained)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name}


HELD = "Which rows had been held out of it can no longer be told: name a split to score, --data.test_split NAME"
GOES_ON = "A fit that resumes goes on with the data that it began with; "


@pytest.mark.parametrize(
    ("verb", "rows", "options", "message"),
    [
        ("test", 21, [], "48 of 63 rows to test have a text that this run was trained on"),  # a row more, all scored
        ("validate", 21, [], "48 of 63 rows to validate have a text that this run was trained on"),
        ("test", 20, ["--data.path", "{root}/more.csv"], "48 of 75 rows to test have a text that this run was trained"),
        ("test", 20, ["--data.seed", "1"], "data.seed is 1, and was 0 when this run was trained. " + HELD),
        ("test", 20, ["--data.val_fraction", "0.2"], "data.val_fraction is 0.2, and was 0.1 when"),
        ("fit", 21, [], "has 63 rows, and had 60 when this run was trained. " + GOES_ON),
        ("fit", 20, ["--data.seed", "1"], "data.seed is 1, and was 0"),
        ("fit", 20, ["--data.max_length", "16"], "data.max_length is 16, and was 128"),
        ("fit", 20, ["--data.truncation", "tail"], "data.truncation is 'tail', and was 'head'"),
        ("fit", 20, ["--data.limit_train", "9"], "data.limit_train is 9, and was 48"),
        ("fit", 20, ["--data.path", "{root}/other.csv"], "holds other rows than when this run was trained. "),
        ("fit", 20, ["--model.learning_rate", "0.5"], "The optimizer's learning rate is 0.5, and was 0.001 when this"),
        ("fit", 20, ["--model.weight_decay", "0.5"], "The optimizer's weight_decay is 0.5, and was 0.01 when this"),
        ("fit", 20, ["--model.adapter_weight_decay", "0.5"], "The optimizer's weight_decay is 0.5, and was 0.0 when"),
    ],
)
def test_what_a_run_does_not_change(
    verb: str, rows: int, options: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root / "my.csv", rows)
    write(root / "more.csv", 25)
    write(root / "other.csv", 20).write_text((root / "other.csv").read_text().replace("who it is 7", "who is it 7"))
    folder = root / "runs" / "version_0"
    before = files(folder)
    with pytest.raises(SystemExit) as end:
        words = [word.format(root=root) for word in options]
        cli.main([verb, "--run", str(folder), *words, "--trainer.max_steps", "4"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert files(folder) == before


def test_files_of_their_own_are_scored_whatever_was_trained_on(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A named split, another file, and the run's own file wherever it lies now."""
    folder = root / "runs" / "version_0"
    (root / "more").mkdir()
    write(root / "more" / "train.csv", 21)
    write(root / "more" / "test.csv", 2, first=21)
    write(root / "new.csv", 3, first=21)
    shutil.copy(root / "my.csv", root / "moved.csv")
    found = {}
    for path in ("new.csv", "more", "moved.csv"):
        run(resolve(["test", "--run", str(folder), "--data.path", str(root / path)]))
        found[path] = capsys.readouterr().out.partition("Data: ")[2].partition("\n")[0]
    assert found == {
        "new.csv": "9 to test",
        "more": "6 to test (split test)",
        "moved.csv": "6 to test (cut from train)",
    }


@pytest.mark.parametrize("beside", ["run", "nothing"])
@pytest.mark.parametrize("place", ["adapter", "runs/version_0/adapter"])
def test_an_adapter_folder_is_held_to_the_rows_of_its_run(
    place: str, beside: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which is the one that it lies in, or that is given with it; of neither nothing is known, which is said."""
    shutil.copytree(root / "runs" / "version_0" / "adapter", root / "adapter")
    options = ["--run", str(root / "runs" / "version_0")] * (beside == "run") + ["--adapter", str(root / place)]
    known = beside == "run" or place != "adapter"
    cli.main(["test", *options, "--data.path", str(root / "my.csv")])
    told = capsys.readouterr().out
    assert ("trained on is not known: any" in told) is not known
    assert ("Data: 6 to test (cut from train)\n" if known else "Data: 60 to test\n") in told
    if known:
        with pytest.raises(SystemExit):
            cli.main(["validate", *options, "--data.path", str(write(root / "more.csv", 25))])
        assert "48 of 75 rows to validate have a text that this run was trained on" in capsys.readouterr().err


def test_a_run_goes_on_where_nothing_differs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its file moved, more steps, and another number of rows to validate on; and once ended it says so."""
    folder = root / "runs" / "version_0"
    (root / "my.csv").rename(root / "moved.csv")
    options = ["--data.path", str(root / "moved.csv"), "--trainer.max_steps", "4", "--data.limit_val", "5"]
    words = resolve(["fit", "--run", str(folder)])
    run([*words, *options])
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert "Nothing was left to train" not in capsys.readouterr().out
    metrics = json.loads((folder / "metrics.json").read_text())
    run([*words, *options])
    assert "Nothing was left to train: the run had ended after 4 steps" in capsys.readouterr().out
    again = json.loads((folder / "metrics.json").read_text())
    assert again["memory/peak_bytes"] == metrics["memory/peak_bytes"] > 0


def test_two_processes_do_not_train_in_one_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = root / "runs" / "version_0"
    hold = f"from lit_peft.runs import Path, lock_folder; lock_folder(Path({str(folder)!r}))"
    code = f"import time; {hold}; print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        before = files(folder)
        with pytest.raises(SystemExit):
            cli.main(["fit", "--run", str(folder)])
        assert "another process is training in this folder" in capsys.readouterr().err
        assert files(folder) == before
    finally:
        other.kill()
        other.wait()
    lock_folder(folder)  # the killed process holds it no more
    unlock_folders()


@pytest.mark.parametrize(
    ("options", "message", "left"),
    [
        (["--method.r", "4096"], "r = 4096 exceeds the smaller side of", []),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs is 0: fit would train nothing", []),
        (["--model.learning_rate", "0"], "model.learning_rate must be a number above 0, not 0.0", []),
        (["--data.max_length", "2"], "data.max_length is 2: of that 2 are marks of the tokenizer", []),
        (["--data.label_column", "text"], "data.label_column is 'text', which is the column of a text too", []),
        (["--data.text_pair_column", "text"], "data.text_column and data.text_pair_column are both 'text'", []),
        (["--model.learning_rate", "1e30"], "Has the training diverged?", ["version_0"]),
        (
            ["--trainer.num_sanity_val_steps", "0", "--checkpoint.monitor", "val/los"],
            "validation logs no 'val/los'. Did you mean 'val/nll'?",
            ["version_0"],
        ),
    ],
)
def test_a_fit_that_was_refused_leaves_no_folder(
    options: list[str], message: str, left: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that failed while it trained leaves what it had; both without a traceback."""
    path = str(write(tmp_path / "my.csv", 20))
    words = ["--data.path", path, "--model.backbone", "demo", "--trainer.max_steps", "6", "--data.batch_size", "8"]
    with pytest.raises(SystemExit) as end:
        fit(tmp_path / "runs", "--config", "text_classification/lora", *words, "--base_test", "false", *options)
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "runs").glob("*")] == left


def test_what_somebody_elses_class_raises_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "import lightning.pytorch as pl\n\nclass Net(pl.LightningModule):\n    def __init__(self):\n"
    (tmp_path / "raises.py").write_text(code + "        super().__init__()\n        {}['width']\n")
    with pytest.raises(SystemExit):
        fit(tmp_path / "runs", "--config", "quickstart", "--model", "raises.Net")
    answer = capsys.readouterr().err
    assert f"Building raises.Net failed at {tmp_path}/raises.py, line 6:\nKeyError: 'width'\n" in answer


def test_texts_that_begin_with_dashes_are_texts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["predict", "--run", str(root / "runs" / "version_0"), "--text", "--- who is it"])
    assert capsys.readouterr().out.rstrip().endswith("--- who is it")


def test_the_content_of_a_split_is_that_of_its_rows(tmp_path: Path) -> None:
    rows = load_splits(str(write(tmp_path / "a.csv", 5)))["train"]
    rows.to_parquet(tmp_path / "b.parquet")
    columns = ["text", "label"]
    found = content(rows, columns)
    assert content(load_splits(str(tmp_path / "b.parquet"))["train"], columns) == found
    assert content(rows.select(range(5)), columns) != found
    assert content(rows.select([1, 0, *range(2, 15)]), columns) != found
    assert content(rows, ["text"]) != found


def test_a_data_module_outside_of_a_fit_records_nothing() -> None:
    assert TextClassificationDataModule("nowhere.csv").state_dict() == {}


class Rated(Module):
    """A module whose optimizer takes what it is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), **self.options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.2}, "learning rate is 0.2, and was 0.1 when"),
        ({"lr": 0.1, "momentum": 0.5}, "momentum is 0.5, and was 0 when"),
        ({"lr": 0.1, "maximize": True}, "maximize is True, and was False when"),
    ],
)
def test_any_modules_optimizer_is_held_to_what_it_began_with(
    options: dict[str, float], message: str, tmp_path: Path
) -> None:
    trainer = train(Rated(lr=0.1), net_lora(), max_epochs=9, max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=message):
        train(Rated(**options), net_lora(), max_epochs=9, max_steps=4, ckpt_path=tmp_path / "x.ckpt")
    train(Rated(**options), net_lora(), max_epochs=9, max_steps=2)  # a fit of its own may have it


def test_another_optimizer_is_told_by_its_name(tmp_path: Path) -> None:
    class Adamax(Rated):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adamax(self.parameters(), lr=0.1)

    train(Rated(lr=0.1), net_lora(), max_epochs=9, max_steps=2).save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="The optimizer is Adamax, and was SGD when this run began"):
        train(Adamax(), net_lora(), max_epochs=9, max_steps=4, ckpt_path=tmp_path / "x.ckpt")


def test_an_optimizer_without_a_rate_of_its_own_trains(tmp_path: Path) -> None:
    class Own(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            loss = closure()
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad)
            return loss

    class Rateless(Rated):
        def configure_optimizers(self) -> Any:
            return Own(self.parameters(), {"lr": None} if self.options else {})

    for options in ({}, {"named": True}):
        train(Rateless(**options), net_lora(), max_epochs=9, max_steps=2).save_checkpoint(tmp_path / "x.ckpt")
        train(Rateless(**options), net_lora(), max_epochs=9, max_steps=4, ckpt_path=tmp_path / "x.ckpt")


def test_a_run_goes_on_from_another_folder(
    root: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    """With data and base where they were when it began; and with another batch size, which is told."""
    options = ["--data.batch_size", "4", "--trainer.max_steps", "4"]
    run(resolve(["fit", "--run", str(root / "runs" / "version_0"), *options]))
    told = capsys.readouterr().out
    assert f"data.path my.csv: {root}/my.csv\nmodel.backbone models/tiny: {root}/models/tiny\n" in told
    assert any("4 rows a step, and 8 when this run began" in str(warning.message) for warning in recwarn)


def test_an_adapter_finds_its_base_from_another_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = root / "runs" / "version_0" / "adapter"
    cli.main(["predict", "--adapter", str(adapter), "--text", "who is it 3"])
    assert capsys.readouterr().out.rstrip().endswith("who is it 3")
    (root / "models").rename(root / "moved")
    with pytest.raises(SystemExit):
        cli.main(["predict", "--adapter", str(adapter), "--text", "who is it 3"])
    assert "models/tiny" in capsys.readouterr().err
    (root / "moved").rename(root / "models")


def test_a_split_of_trained_rows_is_scored_with_a_warning(
    root: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    run(resolve(["test", "--run", str(root / "runs" / "version_0"), "--data.test_split", "train"]))
    assert "Data: 60 to test\n" in capsys.readouterr().out
    told = [w for w in recwarn if "48 of 60 rows to test have a text that was trained on." in str(w.message)]
    assert [warnings.formatwarning(w.message, w.category, w.filename, w.lineno) for w in told] == [
        "Warning: 48 of 60 rows to test have a text that was trained on.\n"  # without a place in our code
    ]


def test_data_that_a_configuration_names_are_scored_whole(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(root / "new.csv", 3, first=20)
    (root / "more.yaml").write_text(f"data:\n  init_args:\n    path: {root / 'new.csv'}\n")
    run(resolve(["test", "--run", str(root / "runs" / "version_0"), "--config", str(root / "more.yaml")]))
    assert "Data: 9 to test\n" in capsys.readouterr().out


def test_a_rate_that_moved_is_not_taken_for_another_one(tmp_path: Path) -> None:
    """A module that lowers its own rate resumes: what counts is the rate that it was built with."""

    class Lowers(Rated):
        def on_train_batch_end(self, *args: Any) -> None:
            for group in self.optimizers().param_groups:  # type: ignore[union-attr]
                group["lr"] /= 2

    trainer = train(Lowers(lr=0.1), net_lora(), max_epochs=9, max_steps=2)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    resumed = Lowers(lr=0.1)
    trainer = train(resumed, net_lora(), max_epochs=9, max_steps=4, ckpt_path=tmp_path / "x.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 / 16
    trainer.save_checkpoint(tmp_path / "y.ckpt")
    train(Lowers(lr=0.1), net_lora(), max_epochs=9, max_steps=6, ckpt_path=tmp_path / "y.ckpt")
