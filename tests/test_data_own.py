"""A user's own files: which split plays which role, texts that are given, pairs, and what is wrong with a file."""

import gzip
import io
import json
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data_helpers import numbers_of, rows, save_tokenizer, text, write
from datasets import Dataset
from models import TINY

from lit_peft import LoRA
from lit_peft.callbacks import RunReport
from lit_peft.data import SST2DataModule, TextClassificationDataModule
from lit_peft.data.splits import load_splits
from lit_peft.tasks import TextClassification

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def module(path: Path | str, tokenizer: str, **options: Any) -> TextClassificationDataModule:
    return TextClassificationDataModule(str(path), tokenizer=tokenizer, **options)


# Roles

NUMBERS = {"train": range(60), "validation": range(60, 70), "test": range(70, 85)}


@pytest.mark.parametrize(
    "splits, options, expected",
    [
        ("train", {}, {"train": (48, "train"), "val": (6, "train"), "test": (6, "train"), "predict": (60, "train")}),
        (
            "train validation test",
            {},
            {"train": (60, "train"), "val": (10, "validation"), "test": (15, "test"), "predict": (15, "test")},
        ),
        (
            "train -test",
            {},
            {"train": (48, "train"), "val": (6, "train"), "test": (6, "train"), "predict": (15, "test")},
        ),
        ("train -validation test", {}, {"train": (54, "train"), "val": (6, "train"), "test": (15, "test")}),
        ("train validation", {}, {"train": (54, "train"), "val": (10, "validation"), "test": (6, "train")}),
        (
            "train validation -test",
            {"test_split": "validation"},
            {"train": (54, "train"), "val": (6, "train"), "test": (10, "validation"), "predict": (10, "validation")},
        ),
        (
            "train test",
            {"val_split": "test"},
            {"train": (54, "train"), "val": (15, "test"), "test": (6, "train"), "predict": (15, "test")},
        ),
        ("test", {}, {"test": (15, "test"), "predict": (15, "test")}),
    ],
)
def test_which_rows_a_role_reads(
    tmp_path: Path, tokenizer: str, splits: str, options: dict[str, Any], expected: dict[str, tuple[int, str]]
) -> None:
    """A minus stands for a split without labels."""
    for split in splits.split():
        columns = rows(*NUMBERS[split.strip("-")])
        write(tmp_path / f"{split.strip('-')}.csv", columns if split[0] != "-" else {"text": columns["text"]})
    data = module(tmp_path, tokenizer, **options)
    found = {role: (len(data._rows(role)[1]), data._rows(role)[0]) for role in expected}
    assert found == expected
    seen = [set(data._rows(role)[1]) for role in ("train", "val", "test") if expected.get(role, "")[1:] == ("train",)]
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_two_examples_are_too_few_to_cut(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(ValueError, match=r"2 examples in split 'train' of .*mine\.csv are too few to cut"):
        module(write(tmp_path / "mine.csv", rows(0, 1)), tokenizer).setup("fit")


@pytest.mark.parametrize(
    "names, splits",
    [
        (["trec_train.csv", "trec-test.csv", "labels.csv"], {"train": 1, "test": 1}),
        (["train_a.csv", "train_b.csv", "my_test.csv"], {"train": 2}),
        (["a.csv", "b.csv"], {"train": 2}),
        (["mine.csv", "about.json"], {"train": 1}),
        (["train/a.csv", "train/b.csv", "val/a.csv"], {"train": 2, "validation": 1}),
    ],
)
def test_names_of_files_in_a_folder(tmp_path: Path, names: list[str], splits: dict[str, int]) -> None:
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, rows(number))
    assert {split: part.num_rows for split, part in load_splits(str(tmp_path)).items()} == splits


@pytest.mark.parametrize(
    ("names", "lines", "left"),
    [
        (["train.csv", "eval.csv", "README.txt"], True, "eval.csv"),
        (["a.txt", "b.csv"], True, "a.txt"),
        (["a.txt", "b.csv"], False, None),
        (["train.csv", "test.csv"], False, None),
    ],
)
def test_files_that_are_in_no_split_are_told(tmp_path: Path, names: list[str], lines: bool, left: str | None) -> None:
    for name in names:
        (tmp_path / name).write_text("text,label\na film,1\n")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        load_splits(str(tmp_path), lines=lines)
    told = [str(w.message) for w in found if "Not read" in str(w.message)]
    assert [f"Not read in {tmp_path}: {left}, whose" in one for one in told] == [True] * (left is not None)


def test_text_files_in_folders_that_are_no_splits_are_refused(tmp_path: Path) -> None:
    """`datasets` would make a document of each line."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("The film is good.\n")
    with pytest.raises(
        ValueError, match=r"one/a\.txt is in a folder whose name tells no split: expected text files in"
    ):
        load_splits(str(tmp_path), lines=True)
    (tmp_path / "one").rename(tmp_path / "train")
    (tmp_path / "two").rename(tmp_path / "test")
    assert {name: len(split) for name, split in load_splits(str(tmp_path), lines=True).items()} == {
        "train": 1,
        "test": 1,
    }


def test_a_licence_beside_data_of_another_kind_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "LICENSE.txt").write_text("Do what you want.\n")
    with gzip.open(tmp_path / "data" / "train.jsonl.gz", "wt") as file:
        file.write('{"text": "a film"}\n')
    assert load_splits(str(tmp_path), lines=True)["train"]["text"][:] == ["a film"]


def test_describe(tmp_path: Path, tokenizer: str) -> None:
    path = write(
        tmp_path / "mine.csv", {"text": [text(n) for n in range(1500)], "label": ["HUM", "ABBR", "HUM", "10"] * 375}
    )
    assert module(path, tokenizer, limit_val=100).describe() == [
        "Classes: 0 10 (375), 1 ABBR (375), 2 HUM (750)",
        "Data: 1,200 to train, 100 of 150 to validate (cut from train), 150 to test (cut from train)",
    ]
    write(tmp_path / "train.csv", {"text": [text(n) for n in range(100)], "label": [n % 25 for n in range(100)]})
    write(tmp_path / "dev.csv", {"text": ["w1"], "label": [3]})
    classes, where = module(tmp_path, tokenizer, test_split="tset").describe()
    assert classes.startswith("Classes: 0 (4), 1 (4), 2 (4)") and classes.endswith("19 (4), 5 more")
    assert where == "Data: 100 to train, 1 to validate (split validation), none to test"
    (tmp_path / "train.csv").unlink()
    (tmp_path / "dev.csv").rename(tmp_path / "test.csv")
    assert module(tmp_path, tokenizer).describe()[1] == "Data: none to train, none to validate, 1 to test (split test)"


@pytest.mark.parametrize("quiet", [False, True])
def test_the_report_begins_with_the_data(tmp_path: Path, quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "mine.csv", rows(*range(40)))
    trainer = pl.Trainer(**QUIET, accelerator="cpu", max_steps=1, callbacks=[LoRA(r=2), RunReport(quiet=quiet)])
    trainer.fit(TextClassification(), TextClassificationDataModule(str(path)))
    printed = capsys.readouterr().out
    if quiet:
        assert not printed
    else:
        assert printed.startswith("Classes: 0 bad (26), 1 good (14)\nData: 32 to train, 4 to validate (cut from train)")
        assert "What trains" in printed.partition("\nData: ")[2]


# Texts that are given


def test_given_texts(tokenizer: str, tmp_path: Path) -> None:
    data = module("gone/nowhere/at.csv", tokenizer, eval_batch_size=2)
    for numbers in ([5, 3, 8], [4]):
        data.use_texts([text(n) for n in numbers])
        data.setup("predict")
        assert numbers_of(*data.predict_dataloader()) == numbers
    with pytest.raises(FileNotFoundError):
        data.setup("fit")


@pytest.mark.parametrize("kind", [TextClassificationDataModule, SST2DataModule])
def test_given_texts_are_predicted_by_a_model(kind: Any) -> None:
    data = kind("no-such/data-set")
    data.use_texts(["w1 w2", "w3"])
    trainer = pl.Trainer(**QUIET, accelerator="cpu", callbacks=[LoRA(r=2)])
    (batch,) = trainer.predict(TextClassification(label_names=["a", "b"]), data)
    assert len(batch) == 2


def test_given_pairs(tokenizer: str) -> None:
    data = module("gone.csv", tokenizer, text_pair_column="b")
    data.use_texts(["w1", "w2"], ["w3 w4", "w5"])
    (batch,) = data.predict_dataloader()
    assert batch["input_ids"].tolist() == [[2, 6, 3, 8, 9, 3, 0, 0], [2, 7, 3, 10, 3, 0, 0, 0]]


@pytest.mark.parametrize(
    "column, texts, pairs, message",
    [
        (None, ["w1"], ["w2"], "come in pairs, but data.text_pair_column is None"),
        ("b", ["w1"], None, "come alone, but data.text_pair_column is 'b'"),
        ("b", ["w1", "w2"], ["w2"], "2 texts and 1 second ones, expected one for each"),
        (None, "w1", None, "one text or more in a list, not 'w1' as text"),
        (None, [], None, "one text or more in a list"),
        (None, ["w1", 3], None, "one text or more in a list"),
        (None, ["w1", " "], None, "'text' of the texts given has 1 empty text, the first in row 2 of 2"),
        ("b", ["w1"], [""], "'b' of the texts given has 1 empty text"),
    ],
)
def test_given_texts_that_are_refused(column: str | None, texts: Any, pairs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextClassificationDataModule("gone.csv", text_pair_column=column).use_texts(texts, pairs)


# Pairs


def test_a_model_of_pairs_learns_which_text_is_which(tmp_path: Path) -> None:
    """The same words in both orders: only token_type_ids, or positions, tell the classes apart."""
    folder = save_tokenizer(tmp_path / "bert", words=40)
    TINY["bert"].make().save_pretrained(folder)
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(config | {"type_vocab_size": 2}))
    pairs = [(f"w{n % 4}", f"w{n % 4 + 4}") for n in range(40)]
    label = [["swapped", "straight"][n // 4 % 2] for n in range(40)]
    order = [pair if name == "straight" else pair[::-1] for pair, name in zip(pairs, label, strict=True)]
    path = write(tmp_path / "pairs.csv", {"a": [a for a, _ in order], "b": [b for _, b in order], "same": label})
    data = TextClassificationDataModule(
        str(path), text_column="a", text_pair_column="b", label_column="same", batch_size=8
    )
    seen = []

    class Model(TextClassification):
        def forward(self, batch: Any) -> torch.Tensor:
            seen.append(batch["token_type_ids"][0].tolist())
            return super().forward(batch)

    model = Model(backbone=folder, learning_rate=2e-2)
    trainer = pl.Trainer(**QUIET, accelerator="cpu", callbacks=[LoRA(r=4)], max_epochs=10)
    trainer.fit(model, data)
    assert [0, 0, 0, 1, 1, 0, 0, 0] in seen
    (scores,) = trainer.test(model, data, verbose=False)
    assert scores["test/acc"] == 1
    data.use_texts(["w0", "w4"], ["w4", "w0"])
    (predicted,) = trainer.predict(model, data)
    assert [row["label"] for row in predicted] == ["straight", "swapped"]


# Errors

CSV = "text,label\nw1,a\nw2,b\n"


def parquet_without_rows() -> bytes:
    file = io.BytesIO()
    Dataset.from_dict({"text": [], "label": []}).to_parquet(file)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("x.csv", b"", "x.csv is empty: it has 0 bytes"),
        ("x.csv", b"text,label\n", "x.csv is empty: it has a header at most"),
        ("x.csv", b"\n\n", "x.csv is empty: it has a header at most"),
        ("x.jsonl", b"", "x.jsonl is empty: it has 0 bytes"),
        ("x.jsonl", b"\n\n", "x.jsonl is empty: it has no rows"),
        ("x.json", b"[]", "x.json is empty: it has no rows"),
        ("x.parquet", b"", "x.parquet is empty: it has 0 bytes"),
        ("x.parquet", parquet_without_rows(), "x.parquet is empty: it has no rows"),
        ("x.parquet", b"nonsense", "Cannot read .*x.parquet: Parquet"),
        ("x.csv", CSV.encode() + b"w\xff3,a\n", r"x.csv is not UTF-8: byte 0xff at offset 22, in line 4\."),
        ("x.tsv", "text\tlabel\nw1\ta\n".encode("utf-16"), "x.tsv is not UTF-8: byte 0xff at offset 0, in line 1"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "x.jsonl is not UTF-8: byte 0xe9 at offset 24, in line 2"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "b\n', "x.jsonl: line 3 is not JSON .*character 12"),
        ("x.json", b'[{"text": "a"}', "Cannot read .*x.json: "),
        ("x.csv", CSV.encode() + b"w3,w4,a\n", r"x.csv: the row of line 4 has 3 cells, expected 2 \(text, label\)"),
        ("x.csv", CSV.encode() + b'"w3\nw4",a\nw5\n', "x.csv: the row of line 6 has 1 cells, expected 2"),
        ("x.csv", b"text,label\nw1,w2,a\nw3,w4,b\n", "x.csv: the row of line 2 has 3 cells"),
        ("x.csv", CSV.encode() + b'"w3,a\nw4,b', "x.csv: the quote opened in the row of line 4 is never closed"),
        (
            "x.csv",
            CSV.encode() + b'"w3,a\nw4,b\nw1,a\n"w2,b\n',
            "the quote opened in the row of line 4 is closed in line 7, and more text follows",
        ),
        (
            "x.csv",
            CSV.encode() + b'"w3,a\r\nw4,b\r\nw5",a\r\nw6,b\r\n',
            "x.csv: the quote opened in the row of line 4 takes in [23] lines, each of which is a row by itself",
        ),
        ("x.csv", CSV.encode() + b'"w3,a\n', "x.csv: the quote opened in the row of line 4 is never closed"),
        ("x.csv", b"text, text\nw1,a\n", "x.csv has two columns 'text'"),
        (
            "x.csv",
            b"text;label\nw1;a\n",
            "x.csv has one column, 'text;label': cells of a .csv file are parted by ',', these by ';'",
        ),
        (
            "x.csv",
            b"text,label\nw1,a\n ,b\n,a\n",
            "'text' of split 'train' .* has 2 empty texts, the first in row 2 of 3",
        ),
        ("x.csv", b"text,label\n1,a\n2.5,b\n", "holds numbers alone, such as 1, expected text"),
        ("x.jsonl", b'{"text": 1, "label": 1}\n{"text": 2, "label": 0}\n', "'text' .* holds int64, expected text"),
        ("x.jsonl", b'{"text": "a", "label": [1]}\n' * 2, r"Label column 'label' .* holds List.*, expected class"),
        ("x.jsonl", b'{"text": "a", "label": 9223372036854775809}\n' * 2, "too large to be told apart, such as 9.22"),
        ("x.csv", b"text,label\nw1,0.5\nw2,1\n", "'label' .* holds fractions such as 0.5, expected class names"),
        ("x.csv", b"text,label\nw1,a\nw2,a\nw3,a\nw4,a\n", "one class alone, 'a'"),
        ("x.csv", b"text,label\nw1,a\nw2,\nw3,b\n", "1 of 3 examples .* have no label .*; the first is row 2"),
    ],
)
def test_errors_name_the_file_and_the_place(
    tmp_path: Path, tokenizer: str, name: str, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        module(tmp_path / name, tokenizer).setup("fit")
    assert str(tmp_path / name) in str(told.value) and len(str(told.value).splitlines()) <= 3
    printed = capfd.readouterr().err
    assert "Traceback" not in printed and "ERROR" not in printed and "Failed" not in printed


@pytest.mark.parametrize("stage, role", [("fit", "validation"), ("test", "test"), ("predict", "test")])
@pytest.mark.parametrize("blank", ["", "  "])
def test_blank_texts_are_refused_in_all_roles(
    tmp_path: Path, tokenizer: str, stage: str, role: str, blank: str
) -> None:
    write(tmp_path / "train.csv", rows(*range(20)))
    write(tmp_path / f"{role}.csv", {"text": ["w1", blank], "label": ["bad", "good"]})
    with pytest.raises(ValueError, match=rf"'text' of split '{role}' .* 1 empty text, the first in row 2 of 2"):
        module(tmp_path, tokenizer).setup(stage)


def test_labels_that_train_does_not_know(tmp_path: Path, tokenizer: str) -> None:
    write(
        tmp_path / "train.csv", {"text": [text(n) for n in range(60)], "label": [f"class{n % 30}" for n in range(60)]}
    )
    write(tmp_path / "test.csv", {"text": ["w1", "w2", "w3"], "label": ["class1", "clas2", "zzz"]})
    with pytest.raises(ValueError, match=r"2 of 3 .* 'clas2' in row 2; .* and 10 more; did you mean 'class2'"):
        module(tmp_path, tokenizer).setup("test")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_an_endless_text_is_refused_at_once(
    tmp_path: Path, tokenizer: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / f"x{suffix}", {"text": ["w1", "w " * 5_000_000, "w2"], "label": ["a", "b", "a"]})
    monkeypatch.setattr("lit_peft.data.text_classification.tokenise", None)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"Row 2 of .* has 10,000,000 characters .*: a quote or a line break"):
        module(path, tokenizer).setup("fit")
    assert time.perf_counter() - start < 5


def test_files_of_one_split_must_have_the_same_columns(tmp_path: Path) -> None:
    write(tmp_path / "train_a.csv", {"text": ["w1"], "label": [1]})
    write(tmp_path / "train_b.csv", {"label": [1], "txt": ["w1"]})
    with pytest.raises(ValueError, match=r"train_b.csv has the columns label, txt; .*train_a.csv, .* has label, text"):
        load_splits(str(tmp_path))
    write(tmp_path / "train_b.csv", {"label": [0], "text": ["w2"]})
    assert load_splits(str(tmp_path))["train"].to_dict() == {"text": ["w1", "w2"], "label": ["1", "0"]}


def test_a_blank_line_among_texts_alone_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("text\nw1\n\nw2\n\n")
    assert load_splits(str(tmp_path / "x.csv"))["train"]["text"][:] == ["w1", "", "w2"]
    (tmp_path / "y.csv").write_text("text,label\nw1,a\n\nw2,b\n")
    assert load_splits(str(tmp_path / "y.csv"))["train"]["text"][:] == ["w1", "w2"]


@pytest.mark.parametrize(
    "content, swallows",
    [
        ('text,label\n"w1,a\nw2,b\nw3",a\nw4,b\nw5,a\n', True),
        ('label,text\na,"w1\nb,w2\na,w3"\nb,w4\na,w5\n', True),
        ('id,text,label\n1,"w1,a\n2,w2,b\n3,w3",a\n4,w4,b\n5,w5,a\n', True),
        ('text,label\n"w1,a\nw2,b\n""w3"", w4",a\nw4,b\nw5,a\n', False),  # three cells in a line
        ('text,label\n"w1,a\nw2",b\nw4,b\nw5,a\n', True),
        ('text,label\n"w1, a\nw2",b\nw4,b\nw5,a\n', False),  # as a text has it
        ('text,label\n"w1,w9\nw2,b\nw3",a\nw4,b\nw5,a\n', False),
        ('text,label\n"w1, a\nw2, b\nw3",a\nw4,b\nw5,a\n', False),
        ('text,label\n"w1,a\nw2,b\nw3",c\nw4,c\nw5,a\n', False),
        ('text,label\n"w1,\nw2,\nw3",\nw4,\nw5,\n', False),  # a poem without a label
        ('text\n"w1\nw2\nw3"\nw1\nw2\nw3\n', False),
    ],
)
def test_a_text_of_lines_is_none_of_rows(tmp_path: Path, content: str, swallows: bool) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    if swallows:
        with pytest.raises(
            ValueError, match=r"x\.csv: the quote opened in the row of line 2 takes in [23] lines, each of"
        ):
            load_splits(str(path))
    else:
        assert "\n" in load_splits(str(path))["train"][0]["text"]


def test_every_cell_of_a_csv_file_is_a_text(tmp_path: Path) -> None:
    """Whatever the rest of the file looks like: bytes before the header, numbers, quotes, Windows' line ends."""
    path = tmp_path / "x.csv"
    path.write_bytes('\ufefftext, label\r\n"a ""b"", c\nd",01\r\nit\'s "so", NA\r\n\r\n2012,1'.encode())
    assert load_splits(str(path))["train"].to_list() == [
        {"text": 'a "b", c\nd', "label": "01"},
        {"text": 'it\'s "so"', "label": " NA"},
        {"text": "2012", "label": "1"},
    ]
    path.write_text("text,label\nother,x\n")
    assert load_splits(str(path))["train"].to_list() == [{"text": "other", "label": "x"}]
