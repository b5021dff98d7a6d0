"""`lit-peft predict --text`, and `--adapter` in the place of a run's checkpoint."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from models import hf_peft_classifier
from test_cli import SMALL, fit

from lit_peft import cli
from lit_peft.demo import ENCODER
from lit_peft.tasks import TextClassification
from lit_peft.trying import _base

TEXTS = ["a great movie", "a dull and empty film"]
ASKED = [word for text in TEXTS for word in ("--text", text)]
CPU = ["--trainer.accelerator", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("tried")
    return fit(root, "--config", "quickstart", *SMALL, "--base_test", "false", "--trainer.max_epochs", "1")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[Path, list[float]]:
    """A folder that HF PEFT wrote, and the probabilities of the second class that it gives to the texts."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("theirs")
    torch.manual_seed(0)
    model = hf_peft_classifier(folder)
    inputs = AutoTokenizer.from_pretrained(ENCODER)(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        logits = model.eval()(**{key: inputs[key] for key in ("input_ids", "attention_mask")}).logits
    return folder, logits.softmax(-1)[:, 1].tolist()


def answers(capsys: pytest.CaptureFixture[str]) -> list[tuple[str, float, str]]:
    """(label, probability, text) of each line printed; nothing else may be."""
    lines = capsys.readouterr().out.strip().splitlines()
    matches = [re.fullmatch(r"(\w+) +(\d\.\d{4})  (.*)", line) for line in lines]
    assert all(matches), lines
    return [(m[1], float(m[2]), m[3]) for m in matches if m]


def expected(run: Path) -> list[tuple[str, float, str]]:
    from transformers import AutoTokenizer

    model = TextClassification.load_from_checkpoint(run / "checkpoints" / "best.ckpt")
    inputs = AutoTokenizer.from_pretrained(ENCODER)(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        rows = model({key: inputs[key] for key in ("input_ids", "attention_mask")}).softmax(-1)
    return [
        (["negative", "positive"][int(row.argmax())], float(row.max()), text)
        for row, text in zip(rows, TEXTS, strict=True)
    ]


def assert_same(found: list[tuple[str, float, str]], wanted: list[tuple[str, float, str]]) -> None:
    assert [(label, text) for label, _, text in found] == [(label, text) for label, _, text in wanted]
    assert [p for _, p, _ in found] == pytest.approx([p for _, p, _ in wanted], abs=1e-4)


def test_texts_are_answered_with_label_and_probability(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = expected(run)
    capsys.readouterr()
    cli.main(["predict", "--run", str(run), *ASKED, *CPU])
    assert_same(answers(capsys), wanted)
    assert not list(tmp_path.iterdir()) and not list(run.glob("predictions*"))  # answers are printed, not kept


def test_texts_are_written_to_the_file_that_is_named(run, capsys, tmp_path):
    cli.main(["predict", "--run", str(run), *ASKED, *CPU, "--predictions", str(tmp_path / "own.jsonl")])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert len(rows) == len(TEXTS)
    for row, line in zip(rows, printed.splitlines(), strict=False):
        assert row["label"] in line
    assert "Predictions: " in printed


def test_the_data_of_the_run_need_not_be_there(run, capsys):
    cli.main(["predict", "--run", str(run), *ASKED, *CPU, "--data.path", "gone/for/good.csv"])
    assert len(answers(capsys)) == 2


def test_a_base_that_was_moved_is_named(run, capsys, tmp_path):
    shutil.copytree(ENCODER, tmp_path / "moved")
    wanted = expected(run)
    capsys.readouterr()
    cli.main(["predict", "--run", str(run), *ASKED, *CPU, "--model.backbone", str(tmp_path / "moved")])
    assert_same(answers(capsys), wanted)


@pytest.mark.parametrize("with_run", [False, True], ids=["alone", "with the run"])
def test_an_adapter_folder_of_ours_answers_as_its_run(with_run, run, capsys):
    wanted = expected(run)
    capsys.readouterr()
    cli.main(["predict", *(["--run", str(run)] * with_run), "--adapter", str(run / "adapter"), *ASKED, *CPU])
    assert_same(answers(capsys), wanted)


def test_an_adapter_folder_of_hf_peft_answers_as_there(theirs, capsys):
    folder, second = theirs
    cli.main(["predict", "--adapter", str(folder), *ASKED, *CPU])
    found = answers(capsys)
    assert {label for label, _, _ in found} <= {"LABEL_0", "LABEL_1"}
    assert [p if label == "LABEL_1" else 1 - p for label, p, _ in found] == pytest.approx(second, abs=2e-4)


def test_test_scores_an_adapter_folder(run, capsys):
    cli.main(["test", "--run", str(run), "--adapter", str(run / "adapter"), *CPU])
    found = {name: float(value) for name, value in re.findall(r"(test/\w+) +│ +([\d.e-]+)", capsys.readouterr().out)}
    metrics = json.loads((run / "metrics.json").read_text())
    assert found == pytest.approx({key: value for key, value in metrics.items() if key.startswith("test/")}, abs=1e-6)


def test_predict_writes_what_an_adapter_says_of_a_file(run, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("new.csv").write_text("text\n" + "\n".join(TEXTS) + "\n")
    for _ in range(2):  # nothing that was written is lost
        cli.main(["predict", "--adapter", str(run / "adapter"), "--data.path", "new.csv", *CPU])
    assert Path("predictions.jsonl").read_text() == Path("predictions-1.jsonl").read_text()
    named = ["--predictions", "theirs.jsonl", "--model.label_names", "[bad, good]"]
    cli.main(["predict", "--adapter", str(theirs[0]), "--data.path", "new.csv", *named, *CPU])
    rows = [json.loads(line) for line in Path("theirs.jsonl").read_text().splitlines()]
    assert [row["probabilities"]["good"] for row in rows] == pytest.approx(theirs[1], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "--config", "quickstart", "--text", "x"], "--text is for predict, not for fit"),
        (
            ["fit", "--config", "quickstart", "--adapter", "{run}/adapter"],
            "--adapter is for validate, test and predict",
        ),
        (["plan", "--config", "quickstart", "--adapter", "{run}/adapter"], "its run: lit-peft plan --run FOLDER."),
        (["predict", "--adapter", "{run}", "--text", "x"], "is no adapter folder: it has no adapter_config.json"),
        (["predict", "--adapter", "{run}/adapter"], "Nothing says what to predict: give --data.path FILE"),
        (["predict", "--run", "{run}", "--text_pair", "x"], "give the first, --text"),
        (["predict", "--run", "{run}", "--text", "a", "--text", ""], "--text is '', expected a text that is not blank"),
        (["predict", "--run", "{run}", "--text", "a", "--text_pair", " "], "--text_pair is ' ', expected a text that"),
        (["predict", "--run", "{run}", "--text", "x", "--text_pair", "y"], "data.text_pair_column is None"),
        (
            ["predict", "--run", "{run}s", "--text", "x"],
            "--run: there is no folder '{run}s'. Did you mean 'version_0'?",
        ),
        (["predict", "--run", "{root}", "--text", "x"], "The newest run in it: --run {run}"),
    ],
)
def test_mistakes(arguments, message, run, capsys):
    places = {"run": str(run), "root": str(run.parent)}
    with pytest.raises(SystemExit) as end:
        cli.main([word.format(**places) for word in arguments] + CPU)
    assert end.value.code == 2
    assert message.format(**places) in " ".join(capsys.readouterr().err.split())


def test_an_adapter_of_a_finished_classifier_keeps_its_classes(tmp_path, capsys):
    import peft
    from transformers import AutoModelForSequenceClassification

    names = {0: "bad", 1: "good"}
    base = AutoModelForSequenceClassification.from_pretrained(ENCODER, id2label=names, label2id={"bad": 0, "good": 1})
    base.save_pretrained(tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ENCODER / file, tmp_path / "base")
    for head in ([], ["classifier", "pre_classifier"]):
        config = peft.LoraConfig(r=2, target_modules=["q_lin"], modules_to_save=head or None)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        peft.get_peft_model(loaded, config).save_pretrained(tmp_path / f"theirs{len(head)}")
        cli.main(["predict", "--adapter", str(tmp_path / f"theirs{len(head)}"), *ASKED, *CPU])
        assert {label for label, _, _ in answers(capsys)} <= set(names.values())


def test_the_base_that_an_edited_config_names_is_taken_where_the_run_is_not_at_hand(run, tmp_path, capsys, monkeypatch):
    shutil.copytree(ENCODER, tmp_path / "moved")
    folder = shutil.copytree(run / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("lit_peft.trying._base", lambda backbone, absolute, plain=_base: plain("lost/base", absolute))
    cli.main(["predict", "--adapter", str(folder), *ASKED, *CPU])
    assert [text for _, _, text in answers(capsys)] == TEXTS
