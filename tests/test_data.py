"""TextClassificationDataModule: files, labels, splits, batches, errors."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data_helpers import numbers_of, rows, save_tokenizer, text
from datasets import ClassLabel, Dataset, DatasetDict

from lit_peft.data import TextClassificationDataModule
from lit_peft.data.splits import load_splits


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """90 training, 10 validation and 20 test examples."""
    for name, numbers in (("train", range(90)), ("validation", range(90, 100)), ("test", range(100, 120))):
        Dataset.from_dict(rows(*numbers)).to_json(tmp_path / f"{name}.jsonl")
    return str(tmp_path)


def write(path: Path, columns: dict[str, list[Any]]) -> str:
    table = Dataset.from_dict(columns)
    {
        ".csv": table.to_csv,
        ".tsv": lambda file: table.to_csv(file, sep="\t"),
        ".jsonl": table.to_json,
        ".parquet": table.to_parquet,
    }[path.suffix](path)
    return str(path)


# Files


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_single_file_is_the_train_split(tmp_path: Path, tokenizer: str, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}", rows(*range(40)))
    data = TextClassificationDataModule(path, tokenizer=tokenizer)
    train, val, test = data.train_dataloader(), data.val_dataloader(), data.test_dataloader()
    assert sorted(numbers_of(*train, *val, *test)) == list(range(40))
    assert list(map(len, (numbers_of(*train), numbers_of(*val), numbers_of(*test)))) == [32, 4, 4]
    assert data.label_names == ["bad", "good"]


def test_words_that_pandas_takes_for_missing_values_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.csv", {"text": ["null", "NA", "nan"], "label": [0, 1, 0]})
    assert load_splits(path)["train"]["text"][:] == ["null", "NA", "nan"]


def test_folder_as_glue_unpacks_it(tmp_path: Path) -> None:
    """Splits of different columns, and `dev` for validation."""
    (tmp_path / "train.tsv").write_text('sentence\tlabel\na fine film \t1\nit\'s "dull" \t0\n')
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\nfine \t1\n")
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\tdull \n")
    splits = load_splits(str(tmp_path))
    assert {name: split.num_rows for name, split in splits.items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert splits["train"]["sentence"][:] == ["a fine film ", 'it\'s "dull" ']


def test_folders_of_other_layouts(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / "nested" / name).mkdir(parents=True)
        write(tmp_path / "nested" / name / "a.csv", rows(1, 2))
    assert set(load_splits(str(tmp_path / "nested"))) == {"train", "test"}
    DatasetDict(train=Dataset.from_dict(rows(1, 2, 3))).save_to_disk(tmp_path / "saved")
    assert load_splits(str(tmp_path / "saved"))["train"].num_rows == 3
    write(tmp_path / "train-00000-of-00002.parquet", rows(1, 2))
    write(tmp_path / "train-00001-of-00002.parquet", rows(3))
    assert load_splits(str(tmp_path))["train"]["text"][:] == [text(n) for n in (1, 2, 3)]


@pytest.mark.parametrize(
    "files, given, message",
    [
        (["notes.txt"], "notes.txt", r"notes.txt: expected a file of type .csv, .tsv, .json, .jsonl or .parquet\."),
        (["notes"], "notes", "notes: expected a file of type .csv"),
        (["train.csv", "train.parquet"], ".", r"train.csv, .*train.parquet as one split: expected files of one type"),
        (["a.csv", "b.jsonl"], ".", r"a.csv, .*b.jsonl as one split: expected files of one type, or names such as"),
        ([".hidden.csv"], ".", "no file in .*, expected .csv, .tsv, .json, .jsonl or .parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, files: list[str], given: str, message: str) -> None:
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    for name in files:
        (tmp_path / name).write_text("text,label\nw1,a\n")
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / given))


def test_missing_files_name_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", rows(1))
    with pytest.raises(FileNotFoundError, match=r"nearest: .*train\.csv"):
        load_splits(str(tmp_path / "trian.csv"))
    (tmp_path / "dead.csv").symlink_to("gone.csv")
    with pytest.raises(FileNotFoundError, match=r"dead\.csv is a link to gone\.csv, which is not there"):
        load_splits(str(tmp_path / "dead.csv"))


@pytest.mark.parametrize("name", ["a b/my file.csv", "TRAIN.CSV", "link.csv", "train[1].jsonl", "x*/[a].parquet"])
def test_names_of_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    target = Path(write(tmp_path / f"target{path.suffix.lower()}", rows(1, 2)))
    path.symlink_to(target) if name == "link.csv" else target.rename(path)
    assert load_splits(str(path))["train"].num_rows == 2
    assert name == "link.csv" or load_splits(str(path.parent))["train"].num_rows == 2


# Labels


@pytest.mark.parametrize(
    "values, names, codes",
    [
        ([5, 1, 3, 1], ["1", "3", "5"], [2, 0, 1, 0]),
        (["pos", "neg", "pos", "neg"], ["neg", "pos"], [1, 0, 1, 0]),
        ([True, False, False, True], ["False", "True"], [1, 0, 0, 1]),
    ],
)
def test_labels_are_sorted(
    tmp_path: Path, tokenizer: str, values: list[Any], names: list[str], codes: list[int]
) -> None:
    path = write(tmp_path / "mine.parquet", {"text": [text(n) for n in range(4)], "label": values})
    data = TextClassificationDataModule(path, tokenizer=tokenizer, val_split="train", predict_split="train")
    (batch,) = data.predict_dataloader()
    assert batch["labels"].tolist() == codes
    assert (data.label_names, data.num_labels) == (names, len(names))
    assert data.class_counts == [codes.count(code) for code in range(len(names))]


def test_class_label_keeps_its_names(tmp_path: Path, tokenizer: str) -> None:
    split = Dataset.from_dict({"text": [text(0), text(1)], "label": [0, 1]})
    split.cast_column("label", ClassLabel(names=["zero", "one", "two"])).save_to_disk(tmp_path / "saved")
    data = TextClassificationDataModule(str(tmp_path / "saved"), tokenizer=tokenizer)
    assert data.label_names == ["zero", "one", "two"]


def test_labels_of_other_types_are_refused(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "mine.parquet", {"text": ["w1", "w2"], "label": [0.5, 1.5]})
    with pytest.raises(ValueError, match=r"holds fractions such as 0\.5, expected class names"):
        _ = TextClassificationDataModule(path, tokenizer=tokenizer).label_names


# Cuts and subsets


def test_the_cut_is_stratified_seeded_and_disjoint(folder: str, tokenizer: str) -> None:
    (Path(folder) / "validation.jsonl").unlink()

    def cut(seed: int) -> tuple[list[int], list[int], torch.Tensor]:
        data = TextClassificationDataModule(folder, tokenizer=tokenizer, seed=seed, val_fraction=0.2)
        batches = list(data.val_dataloader())
        train = numbers_of(*data.train_dataloader())
        return train, numbers_of(*batches), torch.cat([batch["labels"] for batch in batches])

    train, val, labels = cut(0)
    assert sorted(train + val) == list(range(90))
    assert len(val) == 18 and labels.sum() == 6  # a third of all are good
    assert val == cut(0)[1] and set(val) != set(cut(1)[1])


def test_limits_keep_the_shares_of_labels(folder: str, tokenizer: str) -> None:
    data = TextClassificationDataModule(folder, tokenizer=tokenizer, limit_train=30, limit_val=5, limit_test=9)
    assert data.class_counts == [60, 30]
    train = torch.cat([batch["labels"] for batch in data.train_dataloader()])
    assert train.bincount().tolist() == [20, 10]
    (val,), (test,) = data.val_dataloader(), data.test_dataloader()
    assert (len(val["labels"]), len(test["labels"]), int(test["labels"].sum())) == (5, 9, 3)
    assert len(set(numbers_of(test))) == 9 and set(numbers_of(test)) <= set(range(100, 120))


def test_predict_reads_the_test_split_or_the_only_one(folder: str, tmp_path: Path, tokenizer: str) -> None:
    def predicted(path: str, **options: Any) -> list[int]:
        data = TextClassificationDataModule(path, tokenizer=tokenizer, eval_batch_size=7, **options)
        return numbers_of(*data.predict_dataloader())

    assert predicted(folder) == list(range(100, 120))
    assert predicted(folder, predict_split="validation") == list(range(90, 100))
    new = write(tmp_path / "new.csv", {"text": [text(3), text(1)]})
    assert predicted(new) == [3, 1]
    data = TextClassificationDataModule(new)
    assert data.label_names == data.class_counts == []


# Batches


def test_batches(folder: str, tokenizer: str) -> None:
    data = TextClassificationDataModule(folder, tokenizer=tokenizer, eval_batch_size=6)
    data.setup("predict")
    first = next(iter(data.predict_dataloader()))
    assert set(first) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert {tensor.dtype for tensor in first.values()} == {torch.int64}
    longest = max(len(text(n).split()) for n in range(100, 106)) + 2
    assert first["input_ids"].shape == (6, -(-longest // 8) * 8)
    expected = data.tokenizer([text(n) for n in range(100, 106)], padding="max_length", max_length=16)
    assert longest > 8 and first["input_ids"].tolist() == expected["input_ids"]
    assert first["attention_mask"].tolist() == expected["attention_mask"]
    assert first["labels"].tolist() == [int(n % 3 == 0) for n in range(100, 106)]
    assert list(map(numbers_of, data.predict_dataloader())) == [
        [*range(100, 106)], [*range(106, 112)], [*range(112, 118)], [118, 119]
    ]  # fmt: skip


def test_evaluation_batches_hold_texts_of_one_length_in_a_shuffled_order(folder: str, tokenizer: str) -> None:
    data = TextClassificationDataModule(folder, tokenizer=tokenizer, eval_batch_size=4)
    batches = list(data.test_dataloader())
    assert sorted(numbers_of(*batches)) == list(range(100, 120))
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]
    spans = sorted((min(batch), max(batch)) for batch in lengths)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans)) and spans[0][0] < spans[-1][1]
    assert [min(batch) for batch in lengths] != sorted(min(batch) for batch in lengths)
    assert [numbers_of(batch) for batch in batches] == [numbers_of(batch) for batch in data.test_dataloader()]


def test_inputs_that_the_tokenizer_does_not_name_are_left_out(folder: str, tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "two", model_input_names=["input_ids", "attention_mask"])
    batch = next(iter(TextClassificationDataModule(folder, tokenizer=tokenizer).train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_no_text_is_longer_than_the_tokenizer_allows(folder: str, tmp_path: Path) -> None:
    """Nor padded beyond it: there are no positions there."""
    tokenizer = save_tokenizer(tmp_path / "short", model_max_length=10)
    for max_length, width in ((128, 10), (6, 6)):
        data = TextClassificationDataModule(folder, tokenizer=tokenizer, max_length=max_length)
        assert max(batch["input_ids"].shape[1] for batch in data.train_dataloader()) == width
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for stage in ("test", "fit", "fit"):
                data.setup(stage)
        messages = [str(w.message) for w in told if "max_length" in str(w.message)]
        assert len(messages) == (max_length > width)
        assert not messages or messages[0].startswith("data.max_length is 128; texts have at most 10 tokens")


def test_classes_are_known_before_there_is_a_tokenizer() -> None:
    data = TextClassificationDataModule("demo")
    data.prepare_data()
    data.setup()
    assert data.num_labels == 2


def test_pairs_of_texts(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "pairs.csv", {"a": ["w1", "w2"], "b": ["w3 w4", "w5"], "label": [0, 1]})
    data = TextClassificationDataModule(path, text_column="a", text_pair_column="b", tokenizer=tokenizer)
    (batch,) = data.predict_dataloader()
    assert batch["input_ids"].tolist() == [[2, 6, 3, 8, 9, 3, 0, 0], [2, 7, 3, 10, 3, 0, 0, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0, 0]]


def test_a_tokenizer_without_padding_token_gets_one(folder: str, tmp_path: Path) -> None:
    name = save_tokenizer(tmp_path / "decoder")
    config = json.loads((tmp_path / "decoder" / "tokenizer_config.json").read_text())
    config |= {"pad_token": None, "eos_token": "[SEP]"}
    (tmp_path / "decoder" / "tokenizer_config.json").write_text(json.dumps(config))
    data = TextClassificationDataModule(folder, tokenizer=name)
    batch = next(iter(data.train_dataloader()))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == data.tokenizer.eos_token_id).all()


def test_training_batches_hold_texts_of_similar_length(folder: str, tokenizer: str) -> None:
    data = TextClassificationDataModule(folder, tokenizer=tokenizer, batch_size=8)
    batches = list(data.train_dataloader())
    spread = [int(lengths.max() - lengths.min()) for lengths in (b["attention_mask"].sum(1) for b in batches)]
    assert sum(spread) / len(spread) < 2
    widths = [batch["input_ids"].shape[1] for batch in batches]
    assert widths != sorted(widths)


def test_workers_give_the_same_batches(folder: str, tokenizer: str) -> None:
    data = TextClassificationDataModule(folder, tokenizer=tokenizer, batch_size=8)
    alone = list(map(numbers_of, data.train_dataloader()))
    data.num_workers = 1
    loader = data.train_dataloader()
    assert list(map(numbers_of, loader)) == alone
    loader.sampler.set_epoch(1)
    assert list(map(numbers_of, loader)) != alone


# Tokenising


def test_the_tokenised_data_are_cached(folder: str, tokenizer: str, tmp_path: Path) -> None:
    def files(**options: Any) -> set[str]:
        data = TextClassificationDataModule(folder, **{"tokenizer": tokenizer, **options})
        data.setup("fit")
        return {file["filename"] for role in ("train", "val") for file in data._encoded(role).cache_files}

    def written() -> dict[str, int]:
        return {file: Path(file).stat().st_mtime_ns for file in first}

    first = files()
    before = written()
    assert len(first) == 2 and files() == first and written() == before
    assert not files(max_length=5) & first
    assert not files(tokenizer=save_tokenizer(tmp_path / "other", words=150)) & first


def test_processes_give_the_same_tokens(folder: str, tokenizer: str) -> None:
    one, two = (TextClassificationDataModule(folder, tokenizer=tokenizer, num_proc=n)._encoded("train") for n in (1, 2))
    assert one["input_ids"][:] == two["input_ids"][:]


def test_the_tokenizer_is_the_backbones(folder: str, tokenizer: str, tmp_path: Path) -> None:
    class Model(pl.LightningModule):
        backbone = tokenizer

        def predict_step(self, batch: Any, index: int) -> list[int]:
            return numbers_of(batch)

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = TextClassificationDataModule(folder, eval_batch_size=8)
    predicted = trainer.predict(Model(), data)
    assert predicted == [[*range(100, 108)], [*range(108, 116)], [*range(116, 120)]]
    other = Model()
    other.backbone = save_tokenizer(tmp_path / "other", words=110)
    predicted = trainer.predict(other, data)
    assert predicted and predicted[1] == [108, 109] + [-4] * 6  # the rest are unknown words there
    with pytest.raises(ValueError, match=r"no `backbone` to take it from: set data.tokenizer"):
        _ = TextClassificationDataModule(folder).tokenizer


# Errors


@pytest.mark.parametrize(
    "options, stage, message",
    [
        (
            {"text_column": "txt"},
            "fit",
            r"No column 'txt' in split .* \(--data.text_column\); .* mean 'text'",
        ),
        ({"text_pair_column": "score"}, "fit", "'score' of split 'train' of here holds int64, expected text"),
        ({"label_column": "lable"}, "fit", "No label column 'lable' in split 'train'.* mean 'label'"),
        (
            {"val_split": "valid"},
            "fit",
            r"No split 'valid' in here \(--data.val_split; .* mean 'validation'",
        ),
        ({"test_split": "blank"}, "test", "nothing in split 'blank'"),
        ({"test_split": "unlabelled"}, "test", "2 of 3 examples in split 'unlabelled' .* only `predict`"),
        ({"test_split": "bare"}, "test", "No label column 'label' in split 'bare'.*; there are: text"),
        ({"test_split": "strange"}, "test", "1 of 1 examples in split 'strange' .* 'godo' in row 1; .* mean 'good'"),
        ({"test_split": "gap"}, "test", "'text' of split 'gap' .* has 1 empty text, the first in row 2 of 2"),
    ],
)
def test_errors_name_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tokenizer: str, options: dict[str, Any], stage: str, message: str
) -> None:
    train = rows(*range(6)) | {"score": [0, 1, 2, 3, 4, 5]}
    splits = {
        "train": train,
        "validation": train,
        "blank": {"text": [], "label": []},
        "unlabelled": {"text": ["w1", "w2", "w3"], "label": ["good", "", None]},
        "bare": {"text": ["w1"]},
        "strange": {"text": ["w1"], "label": ["godo"]},
        "gap": {"text": ["w1", None], "label": ["good", "bad"]},
    }
    data = TextClassificationDataModule("here", tokenizer=tokenizer, **options)
    monkeypatch.setattr(data, "load", lambda: {name: Dataset.from_dict(split) for name, split in splits.items()})
    with pytest.raises(ValueError, match=message):
        data.setup(stage)


def test_published_test_splits_can_be_predicted(tmp_path: Path, tokenizer: str) -> None:
    write(tmp_path / "train.csv", {"text": ["w1", "w2"], "label": [0, 1]})
    write(tmp_path / "test.csv", {"text": ["w3", "w4"], "label": [-1, -1]})
    data = TextClassificationDataModule(str(tmp_path), tokenizer=tokenizer, test_split="test")
    (batch,) = data.predict_dataloader()
    assert numbers_of(batch) == [3, 4] and "labels" not in batch
    with pytest.raises(ValueError, match="2 of 2 examples in split 'test'"):
        data.setup("test")


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"limit_val": 0}, {"seed": -1}, {"val_fraction": 0.5}, {"max_length": 0}]
)
def test_arguments_out_of_range(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"data.{name} is {value}, expected"):
        TextClassificationDataModule(**options)


def test_one_class_cannot_be_learned(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "mine.csv", {"text": ["w1", "w2", "w3"], "label": ["good"] * 3})
    with pytest.raises(ValueError, match="one class alone, 'good'"):
        TextClassificationDataModule(path, tokenizer=tokenizer).setup("fit")


def test_the_demo_needs_no_file(tokenizer: str) -> None:
    data = TextClassificationDataModule(tokenizer=tokenizer, limit_train=50, limit_val=20, limit_test=20)
    for stage in ("fit", "test", "predict"):
        data.setup(stage)
    assert data.num_labels == 2 and sum(data.class_counts) == 8000
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 50
