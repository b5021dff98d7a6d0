"""IMDBDataModule: reviews without HTML, a cut of a sorted set, and no row without a label."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import numbers_of
from datasets import ClassLabel, Dataset, DatasetDict
from jsonargparse import ArgumentParser

from lit_peft.data import IMDBDataModule, TextClassificationDataModule

SHARED = Path(os.environ.get("LIT_PEFT_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "imdb"


def split(texts: list[Any], labels: list[int]) -> Dataset:
    return Dataset.from_dict({"text": texts, "label": labels})


def reviews(start: int, size: int) -> Dataset:
    """Different reviews, the negative ones first."""
    return split([f"w{n} of it" for n in range(start, start + size)], [n * 2 // size for n in range(size)])


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tokenizer: str) -> Any:
    """Makes a data module of splits in memory."""

    def make(splits: dict[str, Dataset], **options: Any) -> IMDBDataModule:
        monkeypatch.setattr(TextClassificationDataModule, "load", lambda self: splits)
        return IMDBDataModule("here", tokenizer=tokenizer, **options)

    return make


@pytest.mark.parametrize(
    "written, cleaned",
    [
        ("w1<br /><br />w2", "w1\n\nw2"),
        ("w1<br>w2<br/>w3</br>w4", "w1\nw2\nw3\nw4"),
        ("w1 <BR /> w2< br >w3<Br\n/>w4", "w1 \n w2\nw3\nw4"),
        ('w1<br clear="all" />w2', "w1\nw2"),
        ("w1&lt;br /&gt;w2", "w1\nw2"),
        ("w1 <i>w2</i> <brand> 3 < 4 and br />", "w1 <i>w2</i> <brand> 3 < 4 and br />"),
    ],
)
def test_line_breaks_become_newlines(module: Any, written: str, cleaned: str) -> None:
    data = module({"train": split([written, "w9"], [0, 1])}, predict_split="train")
    assert data._splits["train"]["text"][:] == [cleaned, "w9"]
    data.use_texts([written])
    assert data._given["text"][:] == [cleaned]


def test_tokens_on_both_sides_of_a_line_break_are_apart(module: Any) -> None:
    data = module({"train": split(["w1<br />w2", "w3"], [0, 1])}, predict_split="train")
    (batch,) = data.predict_dataloader()
    assert batch["input_ids"][0, :5].tolist() == [2, 6, 7, 3, 0]


@pytest.mark.parametrize("text", ["<br />", None])
def test_a_review_of_line_breaks_alone_is_an_empty_one(module: Any, text: str | None) -> None:
    with pytest.raises(ValueError, match="has 1 empty text, the first in row 2 of 3"):
        module({"train": split(["w1", text, "w2"], [0, 0, 1])}).setup("fit")


def test_columns_that_hold_no_texts_are_told_as_ever(module: Any) -> None:
    with pytest.raises(ValueError, match="Column 'text' of split 'train' of here holds int64, expected text"):
        module({"train": split([1, 2], [0, 1])}).setup("fit")
    with pytest.raises(ValueError, match=r"No column 'review' in .*; there are: text, label"):
        module({"train": split(["w1", "w2"], [0, 1])}, text_column="review").setup("fit")


def test_a_sorted_set_is_cut_by_labels_and_tested_on_its_test(module: Any) -> None:
    data = module({"train": reviews(0, 100), "test": reviews(100, 20)}, val_fraction=0.2, limit_train=40)
    data.setup("fit")
    cut, labels = data._cut, data._codes("train")
    assert sorted([*cut["train"], *cut["val"]]) == list(range(100))
    assert np.bincount(labels[cut["val"]]).tolist() == [10, 10]
    assert np.bincount(labels[data._rows("train")[1]]).tolist() == [20, 20]
    assert sorted(numbers_of(*data.test_dataloader())) == list(range(100, 120))
    assert data.describe()[-1] == ("Data: 40 of 80 to train, 20 to validate (cut from train), 20 to test (split test)")


def test_no_text_validates_that_trains(module: Any) -> None:
    """Of 60 reviews 20 are there twice; white space and case make no other text."""
    train = reviews(0, 60)
    texts = [*train["text"][:20], *train["text"][40:]]
    texts = [*texts, *(f"{text.upper()} " for text in texts[:10]), *texts[30:]]
    data = module(
        {"train": split(texts, [0] * 20 + [1] * 20 + [0] * 10 + [1] * 10)}, val_fraction=0.3, test_split="train"
    )
    held = {texts[row] for row in data._cut["val"]}
    assert len(held) == 18 and held <= {*texts[10:30]}
    crowded = module({"train": split(texts, [0, 1] * 30)}, val_fraction=0.4, test_split="train")
    with pytest.raises(ValueError, match=r"Only 20 of 60 texts of here are there once, too few to cut 24 off"):
        _ = crowded._cut


def test_the_split_without_labels_is_neither_trained_nor_scored(module: Any) -> None:
    labelled = ClassLabel(names=["neg", "pos"])
    splits = {"train": reviews(0, 40), "test": reviews(40, 20), "unsupervised": split(["w150", "w151"], [-1, -1])}
    splits = {name: part.cast_column("label", labelled) for name, part in splits.items()}
    data = module(splits)
    seen = {role: {*numbers_of(*getattr(data, f"{role}_dataloader")())} for role in ("train", "val", "test", "predict")}
    assert seen["train"] | seen["val"] == {*range(40)} and not seen["train"] & seen["val"]
    assert seen["test"] == seen["predict"] == {*range(40, 60)}
    assert numbers_of(*module(splits, predict_split="unsupervised").predict_dataloader()) == [150, 151]
    for role, stage in (("val", "fit"), ("test", "test")):
        with pytest.raises(ValueError, match="2 of 2 examples in split 'unsupervised' of here have no label"):
            module(splits, **{f"{role}_split": "unsupervised"}).setup(stage)


@pytest.mark.parametrize("declared", [True, False])
def test_the_classes_have_the_names_of_the_hub(module: Any, declared: bool) -> None:
    train = reviews(0, 10)
    data = module({"train": train.cast_column("label", ClassLabel(names=["neg", "pos"])) if declared else train})
    assert data.label_names == ["neg", "pos"] and data.class_counts == [5, 5]


def test_files_and_folders_are_read(tmp_path: Path, tokenizer: str) -> None:
    DatasetDict(train=reviews(0, 20), test=reviews(20, 4))["train"].to_parquet(tmp_path / "train.parquet")
    reviews(20, 4).to_parquet(tmp_path / "test.parquet")
    for _ in range(2):  # the second time from the cache
        data = IMDBDataModule(str(tmp_path), tokenizer=tokenizer)
        assert len(numbers_of(*data.train_dataloader())) == 18 and len(numbers_of(*data.test_dataloader())) == 4


def test_the_command_line_knows_every_argument() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextClassificationDataModule, "data")
    options = ["--data=IMDBDataModule", "--data.truncation=head+tail", "--data.windows=true", "--data.path=here"]
    data = parser.instantiate(parser.parse_args(options)).data
    assert isinstance(data, IMDBDataModule)
    expected = dict(TextClassificationDataModule(path="here", truncation="head+tail", windows=True).hparams)
    assert dict(data.hparams) == expected | {"max_length": 512}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published IMDB is not in $LIT_PEFT_SHARED or ../shared")
def test_the_published_data() -> None:
    data = IMDBDataModule(str(SHARED))
    train, test = (data._splits[name]["text"][:] for name in ("train", "test"))
    assert not any("<br" in text.lower() for text in (*train, *test))
    assert (len(train), len({*train}), len({*train} & {*test})) == (25_000, 24_904, 123)
    cut, labels = data._cut, data._codes("train")
    assert labels[:12_500].max() == 0 and labels[12_500:].min() == 1
    assert len(cut["train"]) == 22_500
    assert (
        np.abs(np.bincount(labels[cut["val"]]) - 1_250).max() <= 4
    )  # 134 negative and 58 positive reviews are there more than once
    held = {train[row] for row in cut["val"]}
    assert len(held) == 2_500 and not held & {train[row] for row in cut["train"]}
