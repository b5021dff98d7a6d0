"""`lit-peft merge` and `lit-peft export`: what a run leaves, in the hands of somebody without this package."""

import json
import logging
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import BytesIO, TextIOWrapper
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from models import hf_peft_classifier, tiny
from safetensors import safe_open
from test_cli import SMALL, fit
from torch.utils.data import DataLoader

import lit_peft
from lit_peft import (
    BitFit,
    BottleneckAdapter,
    FullFineTuning,
    LinearProbe,
    LoRA,
    PrefixTuning,
    PTuning,
    SparseLoRA,
    VeRA,
    cli,
)
from lit_peft.callbacks.logits import LogitsComparison
from lit_peft.demo import ENCODER
from lit_peft.handover.paths import place
from lit_peft.handover.trainer import Trainer
from lit_peft.quiet import be_quiet
from lit_peft.tasks import TextClassification
from lit_peft.testing.conformance import perturb

TEXTS = ["a great movie", "a dull and empty film", "the story is bad but the acting is a wonder"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("handed")
    return fit(root, "--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_epochs", "1")


@pytest.fixture(scope="module")
def handed(run, tmp_path_factory) -> tuple[Path, str]:
    """A merged run, and what was printed."""
    out = tmp_path_factory.mktemp("merged") / "it's out"
    with redirect_stdout(TextIOWrapper(BytesIO(), "utf-8")) as printed:
        cli.main(["merge", str(run), str(out), *CPU])
        printed.flush()
    return out, printed.buffer.getvalue().decode()  # type: ignore[attr-defined]


@pytest.fixture
def merged(handed) -> Path:
    return handed[0]


@pytest.fixture
def printed(handed) -> str:
    return handed[1]


def report(out: Path) -> dict:
    return json.loads((out / "merge_report.json").read_text())


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a refused command says."""
    with pytest.raises(SystemExit) as end:
        cli.main([*map(str, arguments)])
    assert end.value.code == 2
    return " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------------------- merge

ALONE = """
import json, sys
for name in ("lit_peft", "lightning", "pytorch_lightning", "peft"):
    sys.modules[name] = None  # there is no such package
exec(sys.argv[1])
texts = json.loads(sys.argv[3])
print(json.dumps(pipeline("text-classification", model=sys.argv[2], truncation=True, max_length=64)(texts)))
"""


def test_without_this_package_the_predictions_are_the_same(run, merged, printed, capsys):
    """And the line that is printed runs."""
    python, flag, code = shlex.split(printed.strip().splitlines()[-1])
    assert (python, flag) == ("python", "-c")
    command = [sys.executable, "-c", ALONE, code, merged, json.dumps(TEXTS)]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert found.returncode == 0, found.stderr
    line, rows = found.stdout.splitlines()[-2], json.loads(found.stdout.splitlines()[-1])
    cli.main(["predict", "--run", str(run), *CPU, *(word for text in TEXTS for word in ("--text", text))])
    lines = [re.fullmatch(r"(\w+) +(\d\.\d{4})  .*", line) for line in capsys.readouterr().out.strip().splitlines()]
    assert [row["label"] for row in rows] == [line[1] for line in lines if line]
    assert [row["score"] for row in rows] == pytest.approx([float(line[2]) for line in lines if line], abs=6e-5)
    assert f"'label': '{rows[0]['label']}'" in line


def test_nothing_of_ours_is_in_the_folder(merged):
    names = {path.name for path in merged.iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "merge_report.json",
    }
    assert {path.name for path in merged.parent.iterdir()} == {"it's out"}
    base = tf.AutoModelForSequenceClassification.from_pretrained(ENCODER, num_labels=2)
    with safe_open(merged / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(base.state_dict())
    for name in names - {"merge_report.json", "model.safetensors"}:
        assert "peft" not in (merged / name).read_text().lower()
        assert str(Path.cwd()) not in (merged / name).read_text()
    config = json.loads((merged / "config.json").read_text())
    assert config["architectures"] == ["DistilBertForSequenceClassification"]
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    assert {path.stat().st_mode & 0o777 for path in merged.iterdir()} == {
        (merged / "config.json").stat().st_mode & 0o777
    }


def test_the_report_holds_what_was_measured(run, merged):
    found = report(merged)
    scores = json.loads((run / "metrics.json").read_text())
    tests = {key: value for key, value in scores.items() if key.startswith("test/")}
    assert found["metrics"]["before"] == pytest.approx(tests, abs=1e-6)
    assert found["metrics"]["after"] == pytest.approx(tests, abs=1e-4)
    assert found["metrics"]["difference"] == {
        key: found["metrics"]["after"][key] - value for key, value in found["metrics"]["before"].items()
    }
    assert (found["rows"], found["measured_on"], found["compared"]) == (32, "test set", "logits")
    assert 0 < found["max_logit_difference"] < 1e-4 < found["largest_logit"]
    assert (found["label_flips"], found["reloaded_max_logit_difference"], found["dtype"]) == (0, 0.0, "float32")
    assert found["folded"]["count"] == len(found["folded"]["layers"]) == 16
    assert found["methods"]["default"]["class_path"] == "lit_peft.methods.LoRA"
    assert found["methods"]["default"]["init_args"]["r"] == 4
    assert found["base"] == "demo" and re.fullmatch(r"[0-9a-f]{32}", found["base_fingerprint"])
    assert found["checkpoint"] == str(run / "checkpoints" / "best.ckpt") and found["adapter"] is None
    assert found["left_out"] == []


def test_a_checkpoint_and_the_adapter_of_a_run_are_scored_on_its_data(run, merged, tmp_path):
    for i, source in enumerate((run / "checkpoints" / "last.ckpt", run / "adapter")):
        out = tmp_path / str(i)
        cli.main(["merge", str(source), str(out), *CPU])
        found = report(out)
        assert found["rows"] == 32 and found["metrics"]["before"].keys() == report(merged)["metrics"]["before"].keys()
    assert found["adapter"] == str(run / "adapter") and found["checkpoint"] is None
    assert (tmp_path / "1" / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()


def test_an_adapter_from_elsewhere_is_asked_fixed_texts_or_new_data(run, merged, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), *CPU])
    found = report(tmp_path / "out")
    assert (found["rows"], found["measured_on"], found["metrics"]) == (4, "fixed inputs", None)
    assert found["label_flips"] == 0 and found["max_logit_difference"] < 1e-4
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    (tmp_path / "new.csv").write_text("text,label\n" + "a great film,positive\na dull film,negative\n" * 3)
    data = ["--data.path", str(tmp_path / "new.csv")]
    cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "scored"), *data, *CPU])
    assert report(tmp_path / "scored")["rows"] == 6
    assert report(tmp_path / "scored")["metrics"]["before"]["test/acc"] >= 0


def test_an_adapter_of_hf_peft_is_merged_as_there(tmp_path):
    torch.manual_seed(0)
    theirs = hf_peft_classifier(tmp_path / "adapter").eval()
    cli.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "out"), *CPU])
    plain = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    inputs = tf.AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    torch.testing.assert_close(plain(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert plain.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_what_trained_may_not_be_scored_as_new(run, tmp_path, capsys):
    """As in `test`."""
    rows = [f"a fine film number {n},positive\na dull film number {n},negative" for n in range(20)]
    (tmp_path / "own.csv").write_text("sentence,label\n" + "\n".join(rows) + "\n")
    own = fit(
        tmp_path / "runs",
        "--config",
        "quickstart",
        *SMALL,
        "--trainer.max_steps",
        "1",
        "--base_test",
        "false",
        "--data.path",
        str(tmp_path / "own.csv"),
    )
    (tmp_path / "copy.csv").write_text("sentence,label\n" + "\n".join(reversed(rows)) + "\n")
    copy = ["--data.path", tmp_path / "copy.csv"]
    capsys.readouterr()
    assert "have a text that this run was trained on" in told(capsys, "merge", own, tmp_path / "out", *copy, *CPU)
    assert not (tmp_path / "out").exists()
    cli.main(["merge", str(own), str(tmp_path / "out"), *CPU])
    assert report(tmp_path / "out")["rows"] == 4  # what was cut off
    (tmp_path / "own.csv").unlink()
    answer = told(capsys, "merge", own, tmp_path / "late", *CPU)
    assert "own.csv" in answer and "--data.path FILE, or --score false" in answer


def folder(tmp_path: Path, method, backbone: str = "demo") -> Path:
    """An adapter folder of a method on the demo, whose tensors are not where they start."""
    task = TextClassification(backbone, label_names=["no", "yes"])
    task.configure_model()
    method.attach(task)
    perturb(task)
    return lit_peft.save(task, tmp_path / "adapter")


@pytest.mark.parametrize(
    "method", [BottleneckAdapter(), PrefixTuning(num_virtual_tokens=2)], ids=lambda m: type(m).__name__
)
def test_a_method_that_does_not_fold_is_refused_before_the_base_is_read(method, tmp_path, capsys, monkeypatch):
    adapter = folder(tmp_path, method)
    monkeypatch.setattr(tf.AutoModelForSequenceClassification, "from_pretrained", None)
    answer = told(capsys, "merge", adapter, tmp_path / "out", *CPU)
    assert f"{type(method).__name__} cannot be merged: " in answer and "Keep its adapter beside the base" in answer
    assert ("`lit-peft export` it" in answer) is (type(method) is PrefixTuning)
    assert not (tmp_path / "out").exists()


def test_a_written_model_that_is_another_is_not_kept(run, tmp_path, capsys, monkeypatch):
    save = tf.PreTrainedModel.save_pretrained

    def wrong(self, *args, **kwargs):
        self.config.activation = "relu"  # the weights are right
        save(self, *args, **kwargs)

    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", wrong)
    answer = told(capsys, "merge", run, tmp_path / "out", *CPU)
    assert re.search(r"out was not written, .* another model: its logits differ by [\d.]+ from those in memory", answer)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_end_is_told_and_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    def full(self, folder, **_):
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(tf.PreTrainedModel, "save_pretrained", full)
    assert "No space left on device" in told(capsys, "merge", run, tmp_path / "out", *CPU)
    assert not list(tmp_path.iterdir())


class Net(pl.LightningModule):
    """Somebody's module around a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny("bert")

    def test_step(self, batch, _):
        logits = self.encoder(input_ids=batch).logits
        self.log("test/mean", logits.mean())


class Numbers(pl.LightningDataModule):
    def test_dataloader(self):
        return DataLoader(torch.arange(48).reshape(8, 6), batch_size=3)


def test_a_module_of_ones_own_is_merged(tmp_path, capsys):
    module, method = Net(), LoRA(r=2, target_modules=["query"], train_also=["encoder.classifier"])
    method.attach(module)
    perturb(module)
    trainer = Trainer(callbacks=[method], logger=False, accelerator="cpu", enable_progress_bar=False)
    trainer.merge(module.eval(), Numbers(), str(tmp_path / "out"))
    found = report(tmp_path / "out")
    assert (found["rows"], found["architecture"], found["label_flips"]) == (8, "BertForSequenceClassification", 0)
    assert found["metrics"]["before"]["test/mean"] == pytest.approx(found["metrics"]["after"]["test/mean"], abs=1e-5)
    assert "none was found: put that of the base beside it" in capsys.readouterr().out
    plain = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(plain(torch.arange(6)[None]).logits, module.encoder(torch.arange(6)[None]).logits)


class Late(Net):
    """Is built in `setup`, by what its data say."""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)

    def setup(self, stage):
        self.encoder = tiny(self.trainer.datamodule.model)


class Model(pl.LightningDataModule):
    model = "bert"


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_a_module_that_is_built_by_its_data_is_handed_over_without_scores(verb, tmp_path):
    method = LoRA(r=2, target_modules=["query"])
    trainer = Trainer(callbacks=[method], logger=False, accelerator="cpu", enable_progress_bar=False)
    getattr(trainer, verb)(Late(), Model(), str(tmp_path / "out"), False if verb == "merge" else "hf-peft")
    if verb == "merge":
        assert (report(tmp_path / "out")["rows"], report(tmp_path / "out")["compared"]) == (3, "logits")
    assert trainer.limit_test_batches == 1.0


def test_a_classifier_of_a_decoder_keeps_its_padding(tokenizer, tmp_path):
    config = tf.GPT2Config(
        vocab_size=210, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=0, bos_token_id=2
    )
    tf.GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "gpt2")
    names = ["input_ids", "attention_mask"]  # as GPT-2's own, without token types
    tf.AutoTokenizer.from_pretrained(tokenizer, model_input_names=names).save_pretrained(tmp_path / "gpt2")
    adapter = folder(tmp_path, LoRA(r=2, target_modules=["attention"]), str(tmp_path / "gpt2"))
    cli.main(["merge", str(adapter), str(tmp_path / "out"), *CPU])
    assert report(tmp_path / "out")["max_logit_difference"] < 1e-4
    texts = ["w1 w2", "w3 w4 w5 w6 w7"]
    together = tf.pipeline("text-classification", model=str(tmp_path / "out"), batch_size=2)(texts)
    task = TextClassification(str(tmp_path / "gpt2"), label_names=["no", "yes"])
    lit_peft.load(task, adapter)
    encoded = tf.AutoTokenizer.from_pretrained(tmp_path / "out")(texts, padding=True, return_tensors="pt")
    rows = task.eval()(encoded).softmax(-1).detach()
    assert [row["label"] for row in together] == [["no", "yes"][int(row.argmax())] for row in rows]
    assert [row["score"] for row in together] == pytest.approx([float(row.max()) for row in rows], abs=1e-5)


# -------------------------------------------------------------------------------------------- the comparison


def test_logits_are_compared_as_far_as_they_are_kept():
    model, batches = tiny("bert").eval(), torch.arange(24).reshape(2, 2, 6)
    for most, rows in ((10**6, 4), (5, 2), (1, 1)):
        comparison = LogitsComparison(most)
        for batch in batches:
            comparison.ask(model, {"input_ids": batch})
        comparison.compare()
        with torch.no_grad():
            model.classifier.bias += 0.5
        for batch in batches:
            comparison.ask(model, {"input_ids": batch})
        figures = comparison.figures()
        assert figures["rows"] == rows
        assert figures["max_logit_difference"] == pytest.approx(0.5, abs=1e-6)
        assert figures["label_flips"] == 0
        with torch.no_grad():
            model.classifier.bias -= 0.5


def test_changed_predictions_are_counted():
    model = tiny("bert").eval()
    comparison, batch = LogitsComparison(), {"input_ids": torch.arange(12).reshape(2, 6)}
    comparison.ask(model, batch)
    with torch.no_grad():
        model.classifier.weight.neg_()
        model.classifier.bias.neg_()
    comparison.compare().ask(model, batch)
    figures = comparison.figures()
    assert figures["label_flips"] == 2
    assert figures["max_logit_difference"] == pytest.approx(2 * figures["largest_logit"])


@pytest.mark.parametrize("verb", ["merge", "export", "test"])
def test_the_help_lists_the_options_that_a_user_may_give(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0 and "--out " not in printed and "--ckpt_path" in printed
    assert (f"Usage: lit-peft {verb} RUN_OR_ADAPTER NEW_FOLDER" in printed) is (verb != "test")
    assert ("--into" in printed, "--format" in printed) == (verb == "merge", verb == "export")


# ------------------------------------------------------------------------------------------------------ export


def opened(out: Path, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits of an exported folder in HF PEFT."""
    import peft

    base = tf.AutoModelForSequenceClassification.from_pretrained(ENCODER, num_labels=2)
    return peft.PeftModel.from_pretrained(base, out).eval()(**inputs).logits


def test_a_run_is_exported_and_the_lines_open_it(run, tmp_path, capsys):
    cli.main(["export", str(run), str(tmp_path / "out"), *CPU])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    lines = capsys.readouterr().out.strip().splitlines()
    names: dict = {}
    exec("\n".join(line.strip() for line in lines[-2:]), names)
    inputs = tf.AutoTokenizer.from_pretrained(ENCODER)(TEXTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    task = TextClassification.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    torch.testing.assert_close(names["model"].eval()(**inputs).logits, task(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [SparseLoRA(r=4), BitFit(), LinearProbe()], ids=lambda m: type(m).__name__)
def test_an_adapter_is_exported(method, tmp_path):
    adapter = folder(tmp_path, method)
    cli.main(["export", str(adapter), str(tmp_path / "out"), "--format", "hf-peft", *CPU])
    task = TextClassification(label_names=["no", "yes"])
    lit_peft.load(task, adapter)
    inputs = {"input_ids": torch.tensor([[2, 40, 50, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    torch.testing.assert_close(opened(tmp_path / "out", **inputs), task.eval()(inputs), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "out"}


REFUSED = [
    (BottleneckAdapter(), "BottleneckAdapter cannot be exported: HF PEFT has no such method"),
    (PTuning(num_virtual_tokens=2), "compute something else; trained with as_hf_peft: true it is the same there."),
    (
        VeRA(r=4, target_modules=["word_embeddings"]),
        "VeRA cannot be exported: HF PEFT does not have it at distilbert.embeddings.word_",
    ),
]


@pytest.mark.parametrize(("method", "message"), REFUSED, ids=lambda case: type(case).__name__)
def test_what_hf_peft_lacks_is_refused(method, message, tmp_path, capsys):
    answer = told(capsys, "export", folder(tmp_path, method), tmp_path / "out", *CPU)
    assert message in answer and "adapter folder holds it, for lit_peft.load" in answer
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_full_fine_tuning_has_no_adapter_to_export(tmp_path):
    trainer = Trainer(callbacks=[FullFineTuning()], logger=False, accelerator="cpu")
    with pytest.raises(
        ValueError, match="trains the model itself, there is no adapter: `lit-peft merge` writes the mod"
    ):
        trainer.export(Net(), None, str(tmp_path / "out"))


# ----------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "{run}", "{run}/adapter"], "adapter exists and is not empty; name another folder"),
        (["export", "{run}/checkpoints/best.ckpt", "{run}/config.yaml"], "config.yaml is a file; name a folder"),
        (["merge", "{root}", "{root}/out"], "The newest run in it: {run}"),
        (["merge", "{run}/checkpoints", "{root}/out"], "It lies in a run: {run}"),
        (["merge", "{run}/adapter/adapter_model.safetensors", "{root}/out"], "It lies in a run: {run}"),
        (["merge", "{run}_", "{root}/out"], "there is no '{run}_'. Did you mean 'version_0'?"),
        (["merge", "{merged}", "{root}/out"], "It is a whole model, with nothing to fold in."),
        (["merge", "{run}", "--out", "{root}/out"], "takes the new folder as its second path, without --out"),
        (["merge", "{run}", "{root}/out", "--out={root}/b"], "takes the new folder as its second path, without --out"),
        (["merge", "--run", "{run}", "{root}/a", "{root}/b", "{root}/c"], "takes two paths, not 3"),
        (["merge", "{run}", "{root}/out", "--scores", "false"], "unknown option --scores. Did you mean 'score'?"),
    ],
)
def test_mistakes(arguments, message, run, merged, capsys):
    places = {"run": str(run), "root": str(run.parent), "merged": str(merged)}
    assert message.format(**places) in told(capsys, *(word.format(**places) for word in arguments))
    assert {path.name for path in run.parent.iterdir()} == {"version_0"}


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_an_adapter_alone_that_is_of_no_classifier_of_texts_is_told(task, run, tmp_path, capsys):
    module = tiny("gpt2").transformer if task is None else tiny("gpt2")
    LoRA(r=2, target_modules=["c_attn"]).attach(module)
    adapter = lit_peft.save(module, tmp_path / "adapter")
    for verb, way in (("merge", "lit_peft.saving.merged.save_merged"), ("export", "lit_peft.save(model")):
        answer = told(capsys, verb, adapter, tmp_path / "out")
        assert (f"is of {task}" if task else "of a module of somebody's own") in answer and way in answer


def test_a_run_may_be_named_as_in_other_verbs(run, tmp_path, capsys):
    words = place(["merge", "--run", str(run), str(tmp_path / "out"), "--score", "false"])
    assert words[1:3] == ["--run", str(run)] and words[-2:] == ["--out", str(tmp_path / "out")]


def test_nothing_is_told_that_others_say_of_every_start(monkeypatch):
    """Which file is restored, which seed is set, that there is no GPU."""
    names = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed")
    for name in names:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.INFO)
        logging.getLogger(name).manager._clear_cache()  # type: ignore[attr-defined]
    be_quiet("merge", False)
    assert not any(logging.getLogger(name).isEnabledFor(logging.INFO) for name in names)


def test_a_run_without_a_checkpoint_or_with_shards_is_told(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    stray = str(shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "stray.ckpt"))
    answer = told(capsys, "merge", stray, tmp_path / "out")
    assert "lies in no run's folder" in answer and "give that one too, --run FOLDER" in answer
    cli.main(["merge", stray, str(tmp_path / "stray"), "--run", str(run), "--score", "false", *CPU])
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert "holds no checkpoint, so that there is nothing to merge" in told(capsys, "merge", tmp_path / "run", "x")
    (tmp_path / "run" / "checkpoints" / "best.ckpt").mkdir(parents=True)
    answer = told(capsys, "merge", tmp_path / "run", tmp_path / "out")
    assert "best.ckpt is a checkpoint in shards" in answer and f"{tmp_path / 'run' / 'adapter'}" in answer


@pytest.mark.slow
def test_a_merge_killed_at_random_moments_leaves_nothing_or_all_of_it(run, tmp_path):
    """Killed while it writes, most of the times: `new_folder` is as slow here as a disk could be."""
    code = (
        "import random, sys, time; from lit_peft import cli; from lit_peft.saving import new_folder as n\n"
        "plain = n._sync\n"
        "def slow(path): time.sleep(.1); plain(path); print('synced', flush=True)\n"
        "n._sync = slow; cli.main(sys.argv[1:])"
    )
    rng, out, ended = random.Random(0), tmp_path / "out", []
    while not (ended and ended[-1] == 0):
        words = ["merge", str(run), str(out), "--score", "false", *CPU]
        process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True)
        if len(ended) < 10:
            assert process.stdout is not None
            for _ in range(rng.randrange(6)):
                process.stdout.readline()
            time.sleep(rng.uniform(0.0, 0.2))
            process.kill()
        process.communicate()
        ended.append(process.returncode)
        if out.exists():
            tf.AutoModelForSequenceClassification.from_pretrained(out)
            assert report(out)["rows"] == 4
            if process.returncode:
                shutil.rmtree(out)  # renamed, and killed then
        assert {path.name for path in tmp_path.iterdir()} <= {"out", ".out.part", ".out.lock"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"} and len(ended) == 11
