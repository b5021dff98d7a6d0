"""What a label is: how it is read, by which classes it is encoded, and which files a trained model can be scored on."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data_helpers import text, write
from datasets import ClassLabel, Dataset

from lit_peft import LoRA
from lit_peft.callbacks import RunReport
from lit_peft.data import SST2DataModule, TextClassificationDataModule
from lit_peft.tasks import TextClassification

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def column(values: list[Any]) -> Dataset:
    return Dataset.from_dict({"text": [text(n) for n in range(len(values))], "label": values})


@pytest.mark.parametrize(
    "train, names, other, codes",
    [
        ([-1, 1, -1], ["-1", "1"], [1, -1], [1, 0]),
        ([1, 0, -1], ["-1", "0", "1"], [-1, -1], [-1, -1]),  # all -1: published without labels
        ([0, 1, 1], ["0", "1"], [1, -1], [1, -1]),  # -1 is not a class in train
        (["-1", "1"], ["-1", "1"], [1, -1], [1, 0]),
        ([10, 9, 100], ["9", "10", "100"], ["100", "9"], [2, 0]),
        (["10", "9", "x"], ["9", "10", "x"], [9, 10], [0, 1]),
        (["b", "a", "a"], ["a", "b"], [" a ", None, ""], [0, -1, -1]),
        ([0, 1, None, 0], ["0", "1"], [1.0, None], [1, -1]),  # a gap makes integers floats
        (["01", "2"], ["1", "2"], [1, 2], [0, 1]),
        (["01", "x"], ["01", "x"], ["01", "1"], [0, -2]),
        ([True, False], ["False", "True"], ["True", "False"], [1, 0]),
        ([2**62, 3], ["3", str(2**62)], [3], [0]),
        (["9" * 30, "5" * 5000, "3"], ["3", "9" * 30, "5" * 5000], ["9" * 30, "5" * 5000], [1, 2]),
        (["Good ", "good"], ["Good", "good"], ["good  ", "GOOD"], [1, -2]),  # spaces do not count, case does
    ],
)
def test_labels(train: list[Any], names: list[str], other: list[Any], codes: list[int]) -> None:
    data = TextClassificationDataModule("here")
    data._splits = {"train": column(train), "other": column(other)}
    assert data.label_names == names
    assert data._codes("other").tolist() == codes


@pytest.mark.parametrize(
    "values, codes", [([1, -1, 0], [1, -1, 0]), (["bad", "good"], [0, 1]), (["1", "2"], [1, -2]), ([-1], [-1])]
)
def test_declared_classes_go_by_name_or_code_and_have_no_minus_one(values: list[Any], codes: list[int]) -> None:
    data = TextClassificationDataModule("here")
    declared = column([0, -1, 1]).cast_column("label", ClassLabel(names=["bad", "good"]))
    swapped = column([0, 1]).cast_column("label", ClassLabel(names=["good", "bad"]))
    data._splits = {"train": declared, "other": column(values), "swapped": swapped}
    assert data.label_names == ["bad", "good"] and data._codes("train").tolist() == [0, -1, 1]
    assert data._codes("other").tolist() == codes
    assert data._codes("swapped").tolist() == [1, 0]


def test_minus_one_is_trained_where_train_has_it(tmp_path: Path, tokenizer: str) -> None:
    columns = {"text": [text(n) for n in range(40)], "label": [n % 2 * 2 - 1 for n in range(40)]}
    data = TextClassificationDataModule(str(write(tmp_path / "mine.csv", columns)), tokenizer=tokenizer)
    labels = torch.cat([batch["labels"] for batch in data.train_dataloader()])
    assert labels.bincount().tolist() == [16, 16] and data.class_counts == [20, 20]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("labels", [["new", "old"], [0.5, 0.7], [7, 8], ["", ""]])
def test_labels_do_not_matter_to_predict(tmp_path: Path, suffix: str, labels: list[Any]) -> None:
    """Neither what the file calls classes, nor how many, nor of what type."""
    path = write(tmp_path / f"new{suffix}", {"text": ["w1 w2", "w3"], "label": labels})
    model = TextClassification(label_names=["a", "b", "c"], class_weights="balanced")
    trainer = pl.Trainer(**QUIET, accelerator="cpu", callbacks=[LoRA(r=2)])
    (batch,) = trainer.predict(model, TextClassificationDataModule(str(path)))
    assert [set(row["probabilities"]) for row in batch] == [{"a", "b", "c"}] * 2


# Files that a trained model is scored on


class Trained(pl.LightningModule):
    """Knows its classes, and keeps the labels that it is shown, by the first token of their texts."""

    def __init__(self, tokenizer: str, label_names: list[str]) -> None:
        super().__init__()
        self.backbone, self.label_names = tokenizer, label_names
        self.seen: dict[int, int] = {}

    def test_step(self, batch: dict[str, torch.Tensor], index: int) -> None:
        self.seen |= dict(zip((batch["input_ids"][:, 1] - 5).tolist(), batch["labels"].tolist(), strict=True))

    validation_step = test_step

    def codes(self, data: pl.LightningDataModule, verb: str = "test", *callbacks: pl.Callback) -> list[int]:
        """What each text's label is to the model, in the order of the file."""
        self.seen = {}
        trainer = pl.Trainer(**QUIET, accelerator="cpu", callbacks=list(callbacks))
        getattr(trainer, verb)(self, data, verbose=False)
        return [self.seen[number] for number in sorted(self.seen)]


@pytest.mark.parametrize(
    "kind, known, labels, codes",
    [
        (TextClassificationDataModule, ["a", "b", "c"], ["c", "a", "c"], [2, 0, 2]),
        (TextClassificationDataModule, ["c", "a", "b"], ["c", "a", " b "], [0, 1, 2]),
        (TextClassificationDataModule, ["a", "b"], ["b"], [1]),
        (TextClassificationDataModule, ["1", "2", "10"], [10, 2.0, "02"], [2, 1, 1]),
        (TextClassificationDataModule, ["Good", "good"], ["good", "Good"], [1, 0]),
        (SST2DataModule, ["negative", "positive"], [1, 0, 1], [1, 0, 1]),
        (SST2DataModule, ["negative", "positive"], [1, 1], [1, 1]),
        (SST2DataModule, ["positive", "negative"], [1, 1, 0], [0, 0, 1]),
        (SST2DataModule, ["negative", "positive"], ["positive"], [1]),
        (SST2DataModule, ["0", "1"], [1, 1], [1, 1]),
    ],
)
def test_labels_are_encoded_by_the_models_classes(
    tmp_path: Path, tokenizer: str, kind: Any, known: list[str], labels: list[Any], codes: list[int]
) -> None:
    """Some of them, in any order; and the same data module serves models of other classes."""
    path = write(tmp_path / "new.csv", {"text": [text(n) for n in range(len(labels))], "label": labels})
    data = kind(str(path), text_column="text", test_split="train")
    assert Trained(tokenizer, known).codes(data) == codes
    assert data.label_names == known and data.class_counts == [codes.count(n) for n in range(len(known))]
    other = known[::-1]
    assert Trained(tokenizer, other).codes(data) == [other.index(known[code]) for code in codes]


@pytest.mark.parametrize(
    "kind, known, labels, message",
    [
        (
            TextClassificationDataModule,
            ["good", "bad"],
            ["good", "Bad"],
            "1 of 2 .* are not in the model, such as 'Bad' in row 2; in the model there are: good, bad; .* mean 'bad'",
        ),
        (
            TextClassificationDataModule,
            ["neg", "pos"],
            [0, 1],
            "2 of 2 .* such as '0' in row 1; .* there are: neg, pos",
        ),
        (SST2DataModule, ["negative", "positive"], [0, 2], "2 of 2 .* there are: negative, positive"),
    ],
)
def test_a_label_that_the_model_does_not_know(
    tmp_path: Path, tokenizer: str, kind: Any, known: list[str], labels: list[Any], message: str
) -> None:
    path = write(tmp_path / "new.csv", {"text": ["w1", "w2"], "label": labels})
    with pytest.raises(ValueError, match=message):
        Trained(tokenizer, known).codes(kind(str(path), text_column="text", test_split="train"))


@pytest.mark.parametrize("known", [["a", "b", "c"], ["a"], ["x", "y"]])
def test_other_classes_cannot_be_trained(tmp_path: Path, known: list[str]) -> None:
    path = write(tmp_path / "mine.csv", {"text": [text(n) for n in range(20)], "label": ["a", "b"] * 10})
    trainer = pl.Trainer(**QUIET, accelerator="cpu", callbacks=[LoRA(r=2)])
    with pytest.raises(ValueError, match=f"data's classes are a, b; this model's are {', '.join(known)}"):
        trainer.fit(TextClassification(label_names=known), TextClassificationDataModule(str(path)))


def test_the_order_of_given_classes_is_that_of_the_codes(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", {"text": [text(n) for n in range(20)], "label": ["a", "b"] * 10})
    data = TextClassificationDataModule(str(path), val_split="train", predict_split="train")
    trainer = pl.Trainer(**QUIET, accelerator="cpu", callbacks=[LoRA(r=2)], max_steps=1)
    trainer.fit(TextClassification(label_names=["b", "a"]), data)
    (batch,) = data.predict_dataloader()
    assert batch["labels"].tolist() == [1, 0] * 10


@pytest.mark.parametrize("verb, role", [("test", "test"), ("validate", "validate")])
@pytest.mark.parametrize(
    "options, whole, count, line",
    [
        ({}, True, 40, "Data: 40 to {}"),
        ({"test_split": "validation", "val_split": "cut"}, True, 40, "Data: 40 to {}"),  # as a run's configuration says
        ({"limit_test": 9, "limit_val": 9}, True, 9, "Data: 9 of 40 to {}"),
        ({}, False, 4, "Data: 4 to {} (cut from train)"),
    ],
)
def test_what_is_scored_of_one_file(
    tmp_path: Path,
    tokenizer: str,
    verb: str,
    role: str,
    options: Any,
    whole: bool,
    count: int,
    line: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / "new.csv", {"text": [text(n) for n in range(40)], "label": ["a", "b"] * 20})
    data = TextClassificationDataModule(str(path), **options)
    if whole:
        data.remember({})
    assert len(Trained(tokenizer, ["a", "b"]).codes(data, verb, RunReport())) == count
    assert capsys.readouterr().out == line.format(role) + "\n"


@pytest.mark.parametrize("role, split", [("val", "validation"), ("test", "test")])
def test_a_cut_where_there_is_a_split(tmp_path: Path, tokenizer: str, role: str, split: str) -> None:
    """Asked for by name; and of several splits nothing is changed."""
    for name, numbers in (("train", range(40)), (split, range(40, 60))):
        write(tmp_path / f"{name}.csv", {"text": [text(n) for n in numbers], "label": [n % 2 for n in numbers]})
    for option, expected in ((None, (split, 20)), ("cut", ("train", 4)), ("train", ("train", 40))):
        data = TextClassificationDataModule(str(tmp_path), tokenizer=tokenizer, **{f"{role}_split": option})
        data.remember({})
        assert (data._rows(role)[0], len(data._rows(role)[1])) == expected
