"""Rows that were trained on are known again, in whatever file they stand."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from data_helpers import rows, text, write
from datasets import Dataset

from lit_peft.data import TextClassificationDataModule
from lit_peft.data.held_out import digests, trained_data


def module(path: Path, tokenizer: str, verb: str, **options: Any) -> TextClassificationDataModule:
    """A data module whose trainer is at a verb."""
    data = TextClassificationDataModule(str(path), tokenizer=tokenizer, **options)
    trainer: Any = SimpleNamespace(state=SimpleNamespace(fn=verb), distributed_sampler_kwargs={}, lightning_module=None)
    data.trainer = trainer
    return data


def trained(path: Path, tokenizer: str, **options: Any) -> dict[str, Any]:
    """What the checkpoints of a fit hold of its data, as read from a file."""
    data = module(path, tokenizer, "fit", **options)
    data.setup("fit")
    torch.save(data.state_dict(), path.with_suffix(".pt"))
    return torch.load(path.with_suffix(".pt"), weights_only=True)


def loaded(data: TextClassificationDataModule, state: dict[str, Any]) -> str:
    """The warnings of scoring what a checkpoint with this state was trained on, or was not."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data.load_state_dict(state)
        data.val_dataloader() if data.trainer.state.fn == "validate" else data.test_dataloader()  # type: ignore[union-attr]
    return "; ".join(str(warning.message) for warning in told if "trained on" in str(warning.message))


REST = (
    " this run was trained on: their score would say nothing of new texts. Give other rows, --data.path FILE, or name "
    "the split, --data.test_split train, to score them all the same."
)


@pytest.mark.parametrize(
    "numbers, refused",
    [
        ([*range(60, 80)], False),
        ([3, *range(60, 80), 5, 3], False),
        ([*range(59, -1, -1), *range(60, 80)], True),  # shuffled and added to
        ([*range(10, 50)], True),
        ([*range(120)], False),
    ],
)
def test_another_file(tmp_path: Path, tokenizer: str, numbers: list[int], refused: bool) -> None:
    """More than half of it: refused, whatever its labels, its case and its spaces are; fewer: counted."""
    mine = write(tmp_path / "mine.csv", rows(*range(60)))
    state = trained(mine, tokenizer)
    kept = set(module(mine, tokenizer, "fit")._rows("train")[1])
    columns = {"text": [f" {text(n)}".replace(" ", "  ").upper() for n in numbers], "label": ["bad"] * len(numbers)}
    data = module(write(tmp_path / "new.jsonl", columns), tokenizer, "test")
    seen = sum(n in kept for n in numbers)
    count = f"{seen} of {len(numbers)} rows to test have a text that"
    if refused:
        with pytest.raises(ValueError) as told:
            loaded(data, state)
        assert str(told.value) == count + REST
    else:
        assert loaded(data, state) == (f"{count} was trained on." if seen else "")


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, ""),  # cut from train
        ({"test_split": "train"}, "48 of 60 rows to test have a text that was trained on."),
        ({"test_split": "train", "limit_test": 60}, "48 of 60 rows to test have a text that was trained on."),
    ],
)
def test_the_file_of_the_run(tmp_path: Path, tokenizer: str, options: dict[str, Any], expected: str) -> None:
    path = write(tmp_path / "mine.csv", rows(*range(60)))
    state = trained(path, tokenizer)
    assert len(state["trained"]) == 48 and state["trained"].dtype == torch.int64
    assert loaded(module(path, tokenizer, "test", **options), state) == expected
    assert loaded(module(path, tokenizer, "test", **options), state | {"trained": torch.tensor([])}) == ""


def test_a_file_that_repeats_itself_ends_its_fit_with_a_warning(tmp_path: Path, tokenizer: str) -> None:
    """After hours of training it is late for an error: its rows were held out, though others say the same."""
    columns = {"text": ["w1", "w2"] * 30, "label": ["a", "b"] * 30}
    path = write(tmp_path / "mine.csv", columns)
    state = trained(path, tokenizer)
    assert loaded(module(path, tokenizer, "test"), state) == "6 of 6 rows to test have a text that was trained on."
    other = module(write(tmp_path / "other.csv", columns | {"text": ["w2", "w1"] * 30}), tokenizer, "validate")
    with pytest.raises(ValueError, match=r"^60 of 60 rows to validate .* --data.val_split train, to score"):
        loaded(other, state)


def test_a_few_texts_that_new_data_repeat_are_no_copy(tmp_path: Path, tokenizer: str) -> None:
    """Most of the rows, but not of what they say, was trained on."""
    state = trained(write(tmp_path / "mine.csv", rows(*range(60))), tokenizer)
    known = next(n for n in range(60) if n in set(module(tmp_path / "mine.csv", tokenizer, "fit")._rows("train")[1]))
    columns = {"text": [text(known)] * 38 + [text(n) for n in range(60, 82)], "label": ["good", "bad"] * 30}
    data = module(write(tmp_path / "new.csv", columns), tokenizer, "test")
    assert loaded(data, state) == "38 of 60 rows to test have a text that was trained on."


@pytest.mark.parametrize("change", [{"seed": 5}, {"val_fraction": 0.2}])
def test_another_cut_of_the_runs_own_rows_is_refused(tmp_path: Path, tokenizer: str, change: dict[str, Any]) -> None:
    """Under whatever name they lie."""
    state = trained(write(tmp_path / "mine.csv", rows(*range(60))), tokenizer)
    copy = write(tmp_path / "copy.csv", rows(*range(60)))
    assert loaded(module(copy, tokenizer, "test"), state) == ""
    with pytest.raises(ValueError, match=f"data.{next(iter(change))} is .* Which rows had been held out"):
        loaded(module(copy, tokenizer, "test", **change), state)


def test_what_is_scored_changes_with_what_is_remembered(tmp_path: Path, tokenizer: str) -> None:
    path = write(tmp_path / "mine.csv", rows(*range(60)))
    state = trained(path, tokenizer)
    data = module(path, tokenizer, "test")
    counts = []
    for history in (None, {}, state, state | {"content": "of others", "trained": torch.tensor([])}, None):
        data.remember(history)
        counts.append(len(data.test_dataloader().dataset))  # type: ignore[arg-type]
    assert counts == [6, 60, 6, 60, 6]
    data.remember({})
    data.setup("fit")  # which cuts off what it is to be tested on
    assert len(data._rows("test")[1]) == 6


@pytest.mark.parametrize("folder", [["test"], ["train", "test"]])
def test_a_split_of_a_folder(tmp_path: Path, tokenizer: str, folder: list[str]) -> None:
    state = trained(write(tmp_path / "mine.csv", rows(*range(60))), tokenizer)
    for number, name in enumerate(folder):
        (tmp_path / "new").mkdir(exist_ok=True)
        write(tmp_path / "new" / f"{name}.csv", rows(*range(1 + number, 60)))
    with pytest.raises(ValueError, match=r"--data\.test_split test, to score"):
        loaded(module(tmp_path / "new", tokenizer, "test"), state)
    assert "to test have a text that was trained on" in loaded(
        module(tmp_path / "new", tokenizer, "test", test_split="test"), state
    )


@pytest.mark.parametrize("split, told", [("test", True), (None, False), ("cut", False)])
def test_one_split_to_choose_by_and_to_test_on_is_told(tmp_path: Path, tokenizer: str, split: Any, told: bool) -> None:
    for name, numbers in (("train", range(30)), ("test", range(40, 50))):
        write(tmp_path / f"{name}.jsonl", rows(*numbers))
    data = module(tmp_path, tokenizer, "fit", val_split=split, test_split=split)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        data.setup("fit")
        data.setup("fit")
    messages = [str(w.message) for w in found if "val_split" in str(w.message)]
    assert len(messages) == told
    assert not told or messages[0].startswith("data.val_split and data.test_split are both 'test': ")


def test_of_many_rows_a_sample_is_known(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_peft.data.held_out.MOST_DIGESTS", 200)
    pairs = {
        "text": [text(n % 199) for n in range(1000)],
        "label": ["a", "b"] * 500,
        "b": [f"w{n}" for n in range(1000)],
    }
    state = trained(write(tmp_path / "mine.csv", pairs), tokenizer, text_pair_column="b")
    assert len(state["trained"]) == 200
    (tmp_path / "new").mkdir()
    for name, count, expected in (
        ("other", 0, ""),
        ("some", 300, "rows to test (a sample) have a text that was trained"),
    ):
        columns = {key: values[:count] for key, values in pairs.items()}
        more = {"text": ["w5"] * 700, "label": ["a"] * 700, "b": [f"w{n} w1" for n in range(700)]}
        path = write(tmp_path / "new" / f"{name}.csv", {key: columns[key] + more[key] for key in columns})
        data = module(path, tokenizer, "test", text_pair_column="b")
        told = loaded(data, state)
        assert expected in told and bool(told) == bool(expected)
        if told:
            seen, judged = int(told.split()[0]), int(told.split()[2])
            assert 150 < judged < 350 and abs(seen / judged - 0.24) < 0.08
    data = module(tmp_path / "mine.csv", tokenizer, "test", test_split="train", text_pair_column="b")
    assert loaded(data, state).startswith("200 of 2")


def test_a_changed_choice_of_a_split_is_named(tmp_path: Path, tokenizer: str) -> None:
    for name, numbers in (("train", range(60)), ("validation", range(60, 70))):
        write(tmp_path / f"{name}.csv", rows(*numbers))
    state = trained(tmp_path, tokenizer)
    with pytest.raises(ValueError, match=r"data\.val_split is 'cut', and was 'validation' when this run was trained"):
        module(tmp_path, tokenizer, "fit", val_split="cut").load_state_dict(state)
    cut = trained(tmp_path, tokenizer, val_split="cut")
    with pytest.raises(ValueError, match=r"data\.val_split is 'validation', and was 'cut' when this run was trained"):
        module(tmp_path, tokenizer, "fit").load_state_dict(cut)
    module(tmp_path, tokenizer, "fit").load_state_dict(state | {"val_split": "a split"})  # a checkpoint from before


def test_a_digest_is_of_the_texts_of_a_row() -> None:
    split = Dataset.from_dict({"a": ["x", "x y", "x", " X\n", "y"], "b": ["y", "z", "y z", "y", "x"]})
    one, both = digests(split, ["a"]), digests(split, ["a", "b"])
    assert len(set(one)) == 3 and one[0] == one[2] == one[3]
    assert len(set(both)) == 4 and both[0] == both[3]


@pytest.mark.parametrize("other", [{}, {"A": 1, "B": {"content": "c"}}, {"Data": [1]}])  # somebody else's classes
def test_what_a_checkpoint_tells_of_the_data_of_its_run(other: dict[str, Any]) -> None:
    known = {"content": "c", "trained": [1], "path": "/b/a.csv"}
    assert trained_data(other) == {}
    assert trained_data(other | {"Module": known}) == known


@pytest.mark.parametrize("split, count", [(None, 60), ("train", 60), ("cut", 6)])
def test_a_split_that_is_named_for_other_data_is_read(tmp_path: Path, tokenizer: str, split: Any, count: int) -> None:
    data = module(write(tmp_path / "new.csv", rows(*range(60))), tokenizer, "test", test_split=split)
    data.remember({}, named=True)
    assert len(data.test_dataloader().dataset) == count  # type: ignore[arg-type]
    other = module(tmp_path / "new.csv", tokenizer, "test", test_split="tset")
    other.remember({}, named=True)
    with pytest.raises(ValueError, match=r"No split 'tset' in .* \(--data\.test_split; cut: .*\); there are: train"):
        other.test_dataloader()


def test_a_module_that_only_tested_records_nothing(tmp_path: Path, tokenizer: str) -> None:
    """Its rows did not train, whatever a checkpoint is saved for that holds its state."""
    data = module(write(tmp_path / "mine.csv", rows(*range(60))), tokenizer, "test")
    data.test_dataloader()
    assert data.state_dict() == {}
    data.setup("fit")
    assert data.state_dict()["rows"] == 60
