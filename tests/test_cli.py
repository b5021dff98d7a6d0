"""`lit-peft` as a user types it: fast answers, every configuration, what a run leaves."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lit_peft import cli
from lit_peft.arguments import configs, resolve
from lit_peft.callbacks import RunReport
from lit_peft.lightning_cli import run
from lit_peft.runs import claim_folder

SMALL = [
    "--data.limit_train",
    "64",
    "--data.limit_val",
    "32",
    "--data.limit_test",
    "32",
    "--data.batch_size",
    "16",
]


def fit(root: Path, *arguments: str) -> Path:
    """Runs `lit-peft fit` in this process and returns the run's folder."""
    run(
        [
            *resolve(["fit", *arguments]),
            "--trainer.default_root_dir",
            str(root),
            "--trainer.accelerator",
            "cpu",
        ]
    )
    return max(root.glob("version_*"), key=lambda p: int(p.name.rpartition("_")[2]))


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """The folder of one short quickstart."""
    root = tmp_path_factory.mktemp("quick")
    return fit(
        root,
        "--config",
        "quickstart",
        *SMALL,
        "--trainer.max_epochs",
        "2",
        "--trainer.log_every_n_steps",
        "1",
    )


def test_a_run_leaves_everything_in_one_folder(quick):
    names = {str(p.relative_to(quick)) for p in quick.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= names
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} <= names
    assert any("tfevents" in name for name in names)
    assert {p.name for p in quick.parent.iterdir()} == {quick.name}


def test_metrics_json_holds_what_it_must(quick):
    metrics = json.loads((quick / "metrics.json").read_text())
    for stage in ("val", "test"):
        assert {f"{stage}/{m}" for m in ("acc", "f1", "ece", "brier", "nll")} <= set(metrics)
    for key in (
        *("base/test/acc", "params/trainable", "params/adapter", "params/head", "params/total"),
        *("params/trainable_share", "time/train_s", "throughput/examples_per_s", "memory/peak_bytes"),
        *("checkpoint/bytes", "adapter/bytes"),
    ):
        assert metrics[key] is not None and metrics[key] > 0, key
    assert metrics["params/trainable"] == metrics["params/adapter"] + metrics["params/head"]
    checkpoint = torch.load(quick / "checkpoints" / "best.ckpt", weights_only=True)
    assert sum(t.numel() for t in checkpoint["state_dict"].values()) == metrics["params/trainable"]
    assert metrics["checkpoint/bytes"] == (quick / "checkpoints" / "best.ckpt").stat().st_size


def test_adapter_val_test_and_predict_describe_the_best_checkpoint(quick):
    metrics = json.loads((quick / "metrics.json").read_text())
    best = str(quick / "checkpoints" / "best.ckpt")
    common = [
        "--config",
        str(quick / "config.yaml"),
        "--ckpt_path",
        best,
    ]
    from safetensors.torch import load_file

    state = torch.load(best, weights_only=True)["state_dict"]
    adapter = load_file(quick / "adapter" / "adapter_model.safetensors")
    ours = {k: v for k, v in state.items() if k.endswith("lora_A")}
    assert ours
    for key, value in ours.items():
        name = key.removeprefix("model.").replace(".peft.default.lora_A", ".lora_A.weight")
        assert torch.equal(adapter[f"base_model.model.{name}"], value)
    before = (quick / "config.yaml").read_text()
    run(["predict", *common])
    assert (quick / "config.yaml").read_text() == before
    rows = [json.loads(line) for line in (quick / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    assert all(row["label"] in ("negative", "positive") and 0.5 <= row["probability"] <= 1 for row in rows)
    from lit_peft.data import TextClassificationDataModule

    config = yaml.safe_load((quick / "config.yaml").read_text())["data"]["init_args"]
    data = TextClassificationDataModule(**{**config, "tokenizer": str(Path(cli.__file__).parent / "demo" / "encoder")})
    labels = [i for batch in data.predict_dataloader() for i in batch["labels"].tolist()]
    right = [data.label_names[i] == row["label"] for i, row in zip(labels, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(metrics["test/acc"])


def test_the_other_verbs_take_the_best_checkpoint_of_the_run(quick, capsys):
    run(["test", "--config", str(quick / "config.yaml")])
    accuracy = json.loads((quick / "metrics.json").read_text())["test/acc"]
    assert f"{accuracy:.4f}"[:6] in capsys.readouterr().out


class Net(pl.LightningModule):
    """A user's own module, which knows nothing of this package and has no test_step."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return torch.nn.functional.cross_entropy(self.head(self.body(x)), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def predict_step(self, batch, batch_idx):
        return self.head(self.body(batch[0]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Data(pl.LightningDataModule):
    def loader(self):
        generator = torch.Generator().manual_seed(0)
        rows = torch.utils.data.TensorDataset(torch.randn(32, 8, generator=generator), torch.arange(32) % 2)
        return torch.utils.data.DataLoader(rows, batch_size=8)

    train_dataloader = val_dataloader = predict_dataloader = loader


def test_a_users_own_module_and_data(tmp_path):
    folder = fit(
        *(tmp_path, "--model", "test_cli.Net", "--data", "test_cli.Data", "--method", "LoRA", "--method.r", "2"),
        *("--method.target_modules", "body", "--method.train_also", "head", "--trainer.max_epochs", "2"),
        *("--early_stopping.monitor", "val_loss", "--checkpoint.monitor", "val_loss"),
    )
    state = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"body.peft.default.lora_A", "body.peft.default.lora_B", "head.weight", "head.bias"}
    assert json.loads((folder / "metrics.json").read_text())["val_loss"] > 0
    run(["predict", "--config", str(folder / "config.yaml")])
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and len(rows[0]) == 2


def test_a_monitor_that_is_not_logged_is_refused_before_training(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(
            *(tmp_path, "--model", "test_cli.Net", "--data", "test_cli.Data", "--method", "LoRA", "--method.r", "2"),
            *("--method.target_modules", "body"),
        )
    assert "monitor: validation logs no 'val/nll'. Did you mean 'val_loss'?" in capsys.readouterr().err


def test_runs_started_together_do_not_share_a_folder(tmp_path, monkeypatch):
    assert [claim_folder(tmp_path).name for _ in range(3)] == ["version_0", "version_1", "version_2"]
    monkeypatch.setenv("LOCAL_RANK", "1")  # a further rank goes where the first one went
    assert claim_folder(tmp_path).name == "version_2"
    monkeypatch.delenv("LIT_PEFT_RUN")  # one that torchrun started cannot know, and makes none
    assert claim_folder(tmp_path).name == "version_of_rank_0"
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("NODE_RANK", "1")
    assert claim_folder(tmp_path).name == "version_of_rank_0"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_ranks_that_torchrun_starts_share_a_folder(tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lit_peft.cli", "fit"]
    options = ["--config", "quickstart", *SMALL, "--trainer.max_epochs", "1", "--base_test", "false"]
    options += ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    options += ["--trainer.default_root_dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command, *options], env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    assert {path.name for path in tmp_path.iterdir()} == {"version_0"}
    names = {str(path.relative_to(tmp_path / "version_0")) for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.json", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= names
    assert done.stdout.decode().count("test accuracy") == 1


def test_a_configuration_behind_a_run_changes_its_model(quick, tmp_path):
    """The checkpoint brings what the run's own configuration left open, the classes for instance, and no more."""
    folder = tmp_path / "version_0"
    shutil.copytree(quick, folder)
    (tmp_path / "more.yaml").write_text("model:\n  init_args:\n    schedule: cosine\n    warmup: 0.25\n")
    options = ["--config", str(tmp_path / "more.yaml"), "--model.warmup", "0.5", "--trainer.max_epochs", "3"]
    fit(tmp_path, "--run", str(folder), *options)
    model = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
    assert (model["schedule"], model["warmup"]) == ("cosine", 0.5)
    assert model["label_names"] == ["negative", "positive"]


def test_tensorboard_holds_curves_diagram_and_hyperparameters(quick):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(quick), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    scalars = set(tags["scalars"])
    assert {
        "train/loss",
        "val/nll",
        "val/ece",
        "test/acc",
        "throughput/examples_per_s",
        "memory/peak_bytes",
    } <= scalars
    assert any(tag.startswith("lr-AdamW") for tag in scalars)
    assert "final/test/acc" in scalars
    assert len(events.Scalars("train/loss")) == 8  # 2 epochs of 4 batches
    assert "calibration/test" in tags["images"]
    assert [event.step for event in events.Scalars("val/nll")] == [3, 7]  # scoring the best adds no point
    assert len(events.Scalars("test/acc")) == 1  # the test set is scored once for the record


@pytest.mark.parametrize("name", [name for name in configs() if name not in ("offline", "fsdp2")])
def test_every_configuration_trains_two_steps_offline(name, tmp_path):
    section = name.startswith(("methods/", "quantize/"))  # for any recipe
    recipe = ["--config", "sst2/lora"] if section else []
    folder = fit(tmp_path, *recipe, "--config", name, "--config", "offline", *SMALL, "--trainer.max_steps", "2")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test/acc"] is not None
    assert metrics["params/trainable"] > 0
    assert (folder / "adapter").exists() == (name not in ("sst2/full", "methods/full_fine_tuning"))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """The folder of a run on a file of three classes, `my.csv`, which is beside the runs."""
    root = tmp_path_factory.mktemp("own data")
    rows = [f"{word} it is,{label}\n" for word, label in (("who", "HUM"), ("where", "LOC"), ("when", "NUM"))] * 30
    (root / "my.csv").write_text("text,label\n" + "".join(rows))
    return fit(
        *(root / "runs", "--config", "text_classification/lora", "--data.path", str(root / "my.csv")),
        *("--model.backbone", "demo", "--data.batch_size", "8", "--trainer.max_epochs", "4"),
    )


def test_own_data_are_predicted(own, tmp_path):
    (tmp_path / "new.csv").write_text("text\nwho it is\nwhere it is\n")
    run(["predict", "--config", str(own / "config.yaml"), "--data.path", str(tmp_path / "new.csv")])
    predicted = [json.loads(line) for line in (own / "predictions.jsonl").read_text().splitlines()]
    assert [row["label"] for row in predicted] == ["HUM", "LOC"]


@pytest.mark.parametrize(
    ("verb", "options", "line"),
    [
        ("test", ["--data.path", "new.csv"], "Data: 3 to test"),
        ("validate", ["--data.path", "new.csv"], "Data: 3 to validate"),
        ("test", ["--data.path", "new.csv", "--data.limit_test", "2"], "Data: 2 of 3 to test"),
        ("test", [], "Data: 9 to test (cut from train)"),
        ("test", ["--data.path", "../my.csv"], "Data: 9 to test (cut from train)"),  # the run's own file
        ("validate", ["--data.path", "../my.csv"], "Data: 9 to validate (cut from train)"),
        ("test", ["--data.path", "more.csv", "--data.test_split", "cut"], "Data: 3 to test (cut from train)"),
        ("test", ["--data.path", "folder"], "Data: 1 to test (split test)"),
    ],
)
def test_files_of_some_of_the_classes_are_scored(own, verb, options, line, tmp_path, capsys, monkeypatch):
    """All of another file, the rows that were cut off of the run's own; and that is told."""
    new = "when it is .,NUM\nwho it is .,HUM\nwho it is .,HUM\n"
    (tmp_path / "here").mkdir()
    (tmp_path / "my.csv").symlink_to(own.parents[1] / "my.csv")
    monkeypatch.chdir(tmp_path / "here")
    Path("new.csv").write_text("text,label\n" + new)
    Path("more.csv").write_text("text,label\n" + new * 10)
    Path("folder").mkdir()
    Path("folder/test.csv").write_text("text,label\nwho it is .,HUM\n")
    Path("folder/train.csv").write_text("text,label\n" + new)
    run([*resolve([verb, "--run", str(own), *options])])
    printed = capsys.readouterr().out
    assert [text for text in printed.splitlines() if "Data: " in text] == [line]
    role = "val" if verb == "validate" else "test"
    assert re.search(rf"{role}/acc\W+1\.0\b", printed)


def test_the_checkpoint_knows_the_file_that_was_trained_on(own, capsys):
    """Another configuration names none: the run's own file is not scored whole, training rows included."""
    best, path = own / "checkpoints" / "best.ckpt", own.parents[1] / "my.csv"
    config = resolve(["test", "--config", "text_classification/lora"])
    run([*config, "--ckpt_path", str(best), "--data.path", str(path)])
    assert "Data: 9 to test (cut from train)\n" in capsys.readouterr().out


def test_a_fit_tells_its_data_once_and_a_file_of_other_classes_is_not_scored(own, tmp_path, capsys):
    path = str(own.parents[1] / "my.csv")
    fit(
        *(tmp_path, "--config", "text_classification/lora", "--data.path", path, "--model.backbone", "demo"),
        *("--data.batch_size", "8", "--trainer.max_steps", "2", "--data.limit_val", "5"),
    )
    told = [line for line in capsys.readouterr().out.splitlines() if "Data: " in line]
    assert told == ["Data: 72 to train, 5 of 9 to validate (cut from train), 9 to test (cut from train)"]
    (tmp_path / "new.csv").write_text("text,label\nwho it is,HUM\nwhat it is,ABBR\n")
    with pytest.raises(SystemExit):
        cli.main(["test", "--run", str(own), "--data.path", str(tmp_path / "new.csv")])
    assert "such as 'ABBR' in row 2; in the model there are: HUM, LOC, NUM" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "backbone", "path", "name"),
    [
        ("sst2/lora", "distilbert/distilbert-base-uncased", "stanfordnlp/sst2", None),
        ("imdb/lora", "distilbert/distilbert-base-uncased", "stanfordnlp/imdb", None),
        ("imdb/qlora", "distilbert/distilbert-base-uncased", "stanfordnlp/imdb", None),
        ("wikitext2/lora_causal", "openai-community/gpt2", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("wikitext2/qlora_causal", "openai-community/gpt2", "Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("wikitext2/lora_masked", "distilbert/distilbert-base-uncased", "Salesforce/wikitext", "wikitext-2-raw-v1"),
    ],
)
def test_recipes_name_what_the_hub_has(recipe, backbone, path, name):
    found = yaml.safe_load(configs()[recipe].read_text())
    data = found["data"].get("init_args", {})
    assert found["model"]["init_args"]["backbone"] == backbone
    assert (data.get("path", path), data.get("name")) == (path, name)


def test_every_key_of_every_configuration_has_a_comment():
    for path in configs().values():
        for line in path.read_text().splitlines():
            key = line.strip()
            section = key.endswith(":")  # class_path, init_args and the like hold commented keys
            assert not key or key.startswith("#") or section or "#" in key, f"{path.name}: {line}"


def test_short_names_and_a_method_changed_on_the_command_line(tmp_path):
    folder = fit(
        tmp_path,
        "--config",
        "quickstart",
        "--method",
        "BitFit",
        "--method.name",
        "mine",
        *SMALL,
        "--trainer.max_steps",
        "1",
    )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["method"]["class_path"].endswith(".BitFit")
    assert config["method"]["init_args"]["name"] == "mine"
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(key.endswith("bias") or "classifier" in key for key in checkpoint["state_dict"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["fitt"], "unknown verb 'fitt'. Did you mean 'fit'?"),
        (["fit", "--config", "quickstrat"], "Did you mean 'quickstart'?"),
        (["fit", "--config", "quickstart", "--method.r", "four"], "four"),
        (["fit", "--config", "quickstart", "--method.r", "0"], "r must be at least 1, not 0"),
        (["fit", "--config", "quickstart", "--method", "lora"], "Did you mean LoRA"),
        (["fit", "--config", "quickstart", "--checkpoint.monitor", "val/acc"], "set checkpoint.mode to max"),
        (["fit", "--config", "quickstart", "--early_stopping.monitor", "val/f1"], "set early_stopping.mode to max"),
        (["fit", "--config", "quickstart", "--checkpoint.save_top_k", "3"], "tells the checkpoints apart"),
        (["test", "--config", "quickstart"], "test needs the weights of a run"),
        (["fit", "--config", "quickstart", "--method.target_modules", "[q_proj]"], "use 'query'"),
    ],
)
def test_mistakes_are_told_in_a_few_lines(arguments, expected, capsys, tmp_path):
    if arguments[0] in ("fit", "test"):
        arguments = [*arguments, "--trainer.default_root_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert expected in error
    assert "Traceback" not in error
    assert len(error[error.index("lit-peft:") :].strip().splitlines()) <= 3


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["methods"]])
def test_what_needs_no_trainer_answers_at_once(arguments):
    seconds = []
    for _ in range(3):  # the best of three: the machine may be busy
        start = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "lit_peft.cli", *arguments], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0 and result.stdout
    assert min(seconds) < 0.5
    probe = (
        "import sys; sys.argv = ['lit-peft', *{}]; import lit_peft.cli as c; c.main(); print('torch' in sys.modules)"
    )
    heavy = subprocess.run([sys.executable, "-c", probe.format(arguments)], capture_output=True, text=True)
    assert heavy.stdout.strip().endswith("False")


def test_methods_lists_names_and_first_lines(capsys):
    cli.main(["methods"])
    out = capsys.readouterr().out
    for name in ("LoRA", "BitFit", "LinearProbe", "FullFineTuning"):
        assert any(line.startswith(name) and len(line.split()) > 4 for line in out.splitlines())


@pytest.mark.parametrize("options", [["--method.r", "8"], ["--method", "BitFit"], ["--model.backbone", "{base}"]])
def test_a_refused_resume_leaves_the_run_as_it_was(quick, options, tmp_path):
    folder = tmp_path / "version_0"
    shutil.copytree(quick, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (tmp_path / "more.yaml").write_text("early_stopping:\n  patience: 7\n")
    words = [word.format(base=tmp_path / "nowhere") for word in options]
    with pytest.raises(SystemExit):
        fit(tmp_path, "--run", str(folder), "--config", str(tmp_path / "more.yaml"), *words)
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_without_a_checkpoint_says_how_to_start_it_again(quick, tmp_path, capsys):
    (tmp_path / "version_0").mkdir()
    shutil.copy(quick / "config.yaml", tmp_path / "version_0")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--run", str(tmp_path / "version_0")])
    assert f"Start it again: lit-peft fit --config {tmp_path}/version_0/config.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, taken, told",
    [
        (["best", "last"], "best", ""),
        (["best", "last", "epoch=1"], "best", ""),
        (["a/b", "last"], "a/b", ""),
        (["last"], "last", "holds no best checkpoint: test takes the last one."),
        (["best-epoch=0", "best-epoch=1", "last"], None, "best-epoch=0.ckpt, best-epoch=1.ckpt: choose one"),
    ],
)
def test_the_checkpoint_of_a_run_is_its_best_whatever_it_is_called(names, taken, told, quick, tmp_path, capsys):
    folder = tmp_path / "version_0" / "checkpoints"
    shutil.copytree(quick, folder.parent, ignore=shutil.ignore_patterns("*.ckpt"))
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.ckpt").touch()
    if taken is None:
        with pytest.raises(ValueError, match=told):
            resolve(["test", "--run", str(folder.parent)])
    else:
        assert resolve(["test", "--run", str(folder.parent)])[-2:] == ["--ckpt_path", f"{folder}/{taken}.ckpt"]
        assert capsys.readouterr().out == (f"{folder.parent} {told}\n" if told else "")
        assert resolve(["fit", "--run", str(folder.parent)])[-1] == f"{folder}/last.ckpt"


@pytest.mark.parametrize("arguments", [["predict", "--run"], ["predict", "--adapter"], ["predict", "--text"]])
def test_an_option_without_its_value_is_told(arguments, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert f"{arguments[1]} needs a value." in capsys.readouterr().err


@pytest.mark.parametrize("base_test", ["true", "false"])
@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("a film,good\nthe film,good\n", None, "There is one class alone, 'good', in"),
        ("a film,good\nthe film,bad\n", "that film,ugly\n", "have labels that are not in train"),
    ],
)
def test_data_that_cannot_be_scored_are_refused_before_training(train, test, message, base_test, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("text,label\n" + train * 20)
    if test is not None:
        (tmp_path / "data" / "test.csv").write_text("text,label\n" + test)
    path = str(tmp_path / "data") if test is not None else str(tmp_path / "data" / "train.csv")
    options = ["--data.path", path, "--model.backbone", "demo", "--base_test", base_test, "--trainer.max_steps", "1"]
    with pytest.raises(SystemExit):
        fit(tmp_path / "runs", "--config", "text_classification/lora", *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["quickstart", "quickstart_lm"])
def test_a_split_that_is_not_there_is_told_before_the_test_before_training(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(RunReport, "measure_base", lambda *args: pytest.fail("it was tested"))
    with pytest.raises(SystemExit):
        fit(tmp_path / "runs", "--config", recipe, "--data.val_split", "dev")
    assert "No split 'dev' in demo (--data.val_split" in capsys.readouterr().err


def test_prompts_are_asked_of_a_text_file_with_what_to_set_instead(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("A line.\n" * 60)
    options = ["--config", "quickstart_lm", "--data.path", str(tmp_path / "mine.txt"), "--trainer.max_steps", "1"]
    with pytest.raises(SystemExit):
        fit(tmp_path / "runs", *options)
    names = ("prompt_column", "completion_column", "pack")
    message = "set data.{} and data.{} to null and data.{} to false, which".format(*names)
    assert f"mine.txt is text without columns: {message}" in capsys.readouterr().err
    for name, value in zip(names, ("null", "null", "false"), strict=True):
        options += [f"--data.{name}", value]
    assert (fit(tmp_path / "runs", *options) / "metrics.json").exists()
