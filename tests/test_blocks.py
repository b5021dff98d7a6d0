"""Blocks, evaluation windows and packed rows, against what their definitions say token by token."""

import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lit_peft.data.blocks import Marks, best_fit, evaluation_windows, packed, pad_rows, table, training_blocks
from lit_peft.data.token_rows import blocks, packed_samples
from lit_peft.labels import IGNORED

BARE = Marks(separator=1, eos=1, special=(0, 1))
FRAMED = Marks(before=(2,), after=(3,), separator=3, special=(0, 2, 3, 4))
NO_SEPARATOR = Marks(before=(2,), special=(2,))
ALL_MARKS = [BARE, FRAMED, NO_SEPARATOR]
LENGTHS = [[1], [2], [9], [10], [23], [3, 4, 5], [0, 7, 0, 12, 1, 1, 0], [10, 10], [1] * 25]
FIRST = 100  # tokens of texts are numbered from here, so that each can be found again


def texts(lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(FIRST, FIRST + sum(lengths)), np.array(lengths)


def lists(rows: pa.Table) -> list[tuple[list[int], list[int]]]:
    """(ids, labels) of each row."""
    assert [len(row) for row in rows["input_ids"].to_pylist()] == rows["length"].to_pylist()
    return list(zip(rows["input_ids"].to_pylist(), rows["labels"].to_pylist(), strict=True))


def check_row(ids: list[int], labels: list[int], size: int, marks: Marks) -> list[int]:
    """A row's marks and labels are as they should be; its tokens between the marks."""
    assert len(ids) <= size and len(ids) == len(labels)
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    assert not {*labels} & {*marks.special}
    before, after = len(marks.before), len(marks.after)
    assert ids[:before] == [*marks.before] and ids[len(ids) - after :] == [*marks.after]
    return ids[before : len(ids) - after]


@pytest.mark.parametrize("marks", ALL_MARKS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_blocks_hold_every_token_once(lengths: list[int], marks: Marks) -> None:
    for size in range(marks.size + 1, 14):
        rows = lists(training_blocks(*texts(lengths), size, marks))
        bodies = [check_row(ids, labels, size, marks) for ids, labels in rows]
        assert all(len(ids) == size for ids, _ in rows[:-1]) and bodies[-1]
        joined, number = [], itertools.count(FIRST)
        for length in filter(None, lengths):  # the oracle: documents, and a separator between two of them
            joined += [marks.separator] * bool(joined and marks.separator is not None)
            joined += itertools.islice(number, length)
        assert [*itertools.chain(*bodies)] == joined
        scored = [label for _, labels in rows for label in labels if label != IGNORED]
        assert scored == [*range(FIRST, FIRST + sum(lengths))]


@pytest.mark.parametrize("marks", ALL_MARKS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_windows_score_every_token_once(lengths: list[int], marks: Marks) -> None:
    """Against the usual procedure, written as the loop that it is."""
    ids = list(range(FIRST, FIRST + sum(lengths)))
    for size, stride in itertools.product(range(marks.size + 1, 13), [None, 1, 2, 3, 7, 12]):
        body = size - marks.size
        expected = []
        for end, length in zip(np.cumsum(lengths).tolist(), lengths, strict=True):
            begin = end - length
            reached = begin
            for start in range(begin, end, min(stride or body, body)):
                stop = min(start + body, end)
                labels = [token if at >= reached else IGNORED for at, token in enumerate(ids[start:stop], start)]
                expected.append((ids[start:stop], labels))
                reached = stop
                if stop == end:
                    break
        rows = lists(evaluation_windows(*texts(lengths), size, stride, marks))
        before, after = len(marks.before), len(marks.after)
        found = [(check_row(row, labels, size, marks), labels[before : len(labels) - after]) for row, labels in rows]
        assert found == expected
        assert [label for _, labels in found for label in labels if label != IGNORED] == ids


def test_what_a_causal_model_leaves_out() -> None:
    """The first token of each document, of disjoint windows that of each window; none behind a mark."""

    def scored(size: int, stride: int | None, marks: Marks) -> list[int]:
        rows = lists(evaluation_windows(*texts([10, 3]), size, stride, marks))
        return [label for _, labels in rows for label in labels[1:] if label != IGNORED]

    everything = [*range(FIRST, FIRST + 13)]
    assert scored(4, 3, BARE) == [n for n in everything if n not in (FIRST, FIRST + 10)]
    assert scored(4, None, BARE) == [n for n in everything if n not in (FIRST, FIRST + 4, FIRST + 8, FIRST + 10)]
    assert scored(4, None, NO_SEPARATOR) == everything


def test_marks_that_a_text_spells_out_are_not_scored() -> None:
    ids, lengths = np.array([100, 3, 101, 0, 102]), np.array([5])
    for rows in (training_blocks(ids, lengths, 9, FRAMED), evaluation_windows(ids, lengths, 9, None, FRAMED)):
        ((row, labels),) = lists(rows)
        assert row == [2, 100, 3, 101, 0, 102, 3]
        assert labels == [IGNORED, 100, IGNORED, 101, IGNORED, 102, IGNORED]


# Packing


@pytest.mark.parametrize("seed", range(5))
def test_best_fit(seed: int) -> None:
    """Each sample once, no row over its size, and each sample where it fits best, by brute force."""
    lengths = np.random.default_rng(seed).integers(1, 21, 60).tolist()
    rows = best_fit(lengths, 20)
    assert sorted(itertools.chain(*rows)) == [*range(60)]
    sizes: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [size for size in sizes if size + length <= 20]
        if fitting:
            sizes.remove(max(fitting))
        sizes.append(max(fitting, default=0) + length)
    assert sorted(sum(lengths[i] for i in row) for row in rows) == sorted(sizes)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 20) + 4
    assert best_fit(lengths, 20) == rows


@pytest.mark.parametrize(
    "lengths, expected",
    [([], []), ([5], [[0]]), ([5, 5], [[0, 1]]), ([6, 6], [[0], [1]]), ([1, 9, 4, 6], [[1, 0], [3, 2]])],
)
def test_best_fit_of_a_few(lengths: list[int], expected: list[list[int]]) -> None:
    assert best_fit(lengths, 10) == expected


def test_packed_rows() -> None:
    ids, lengths = texts([3, 5, 2, 4])
    labels = np.where(ids % 2, ids, IGNORED)
    rows = packed(ids, labels, lengths, 8)
    assert lists(rows) == [
        ([103, 104, 105, 106, 107, 100, 101, 102], [103, -100, 105, -100, 107, -100, 101, -100]),
        ([110, 111, 112, 113, 108, 109], [-100, 111, -100, 113, -100, 109]),
    ]
    assert rows["position_ids"].to_pylist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1]]


# Batches


def batch(columns: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    lengths = np.array([len(row) for row in columns["input_ids"]])
    flat = {name: np.array([*itertools.chain(*rows)]) for name, rows in columns.items()}
    return pad_rows(table(lengths, **flat), pad=9, **options)


def test_padding() -> None:
    rows: dict[str, Any] = {"input_ids": [[1, 2, 3], [4]], "labels": [[1, -100, 3], [4]]}
    found = batch(rows, longest=4)
    assert {name: values.tolist() for name, values in found.items()} == {
        "input_ids": [[1, 2, 3, 9], [4, 9, 9, 9]],
        "labels": [[1, -100, 3, -100], [4, -100, -100, -100]],
        "attention_mask": [[1, 1, 1, 0], [1, 0, 0, 0]],
    }
    assert {values.dtype for values in found.values()} == {torch.int64}
    assert batch(rows, longest=100)["input_ids"].shape == (2, 8)
    assert batch(rows, longest=3)["input_ids"].shape == (2, 3)


def test_prompts_are_padded_on_the_left() -> None:
    found = batch({"input_ids": [[1, 2, 3], [4]]}, longest=4)
    assert {name: values.tolist() for name, values in found.items()} == {
        "input_ids": [[1, 2, 3], [9, 9, 4]],
        "attention_mask": [[1, 1, 1], [0, 0, 1]],
    }


def test_padding_of_a_packed_row_is_one_more_sample() -> None:
    rows = {"input_ids": [[5, 6, 7], [8]], "labels": [[5, 6, 7], [8]], "position_ids": [[0, 1, 0], [0]]}
    found = batch(rows, longest=5)
    assert {name: values.tolist() for name, values in found.items()} == {
        "input_ids": [[5, 6, 7, 9, 9], [8, 9, 9, 9, 9]],
        "labels": [[5, 6, 7, -100, -100], [8, -100, -100, -100, -100]],
        "position_ids": [[0, 1, 0, 0, 1], [0, 0, 1, 2, 3]],
    }


class Odd:
    """A tokenizer that knows some texts, and may not put its special tokens around them."""

    name_or_path = "odd"
    bos_token_id = cls_token_id = pad_token_id = unk_token_id = mask_token_id = eos_token_id = None
    sep_token_id = 9

    def __init__(self, known: str, within: bool) -> None:
        self.known, self.within = known, within

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        ids = [3, 4] if text in self.known else []
        return {"input_ids": (([1, *ids, 9] if self.within else [3, 1, 4]) if add_special_tokens else ids)}


def test_marks_of_odd_tokenizers() -> None:
    assert Marks.of(Odd("A", within=True)) == Marks((1,), (9,), separator=9, special=(1, 9))  # none of small letters
    with pytest.raises(ValueError, match=r"tokenizer odd makes \[3, 4\] of '0', and with special tokens \[3, 1, 4\]"):
        Marks.of(Odd("aA0", within=False))
    with pytest.raises(ValueError, match=r"tokenizer odd makes \[\] of '0', and with special tokens \[1, 9\]"):
        Marks.of(Odd("", within=True))


def test_more_tokens_than_offsets_reach_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_peft.data.blocks.MOST_TOKENS", 20)
    ids, lengths = texts([20])
    training_blocks(ids, lengths, 5, Marks())
    message = "There are {} tokens in the rows of one split, expected at most 20: give less text"
    with pytest.raises(ValueError, match=message.format(28)):
        training_blocks(ids, lengths, 7, Marks((1,), (2,)))
    with pytest.raises(ValueError, match=message.format("[0-9]+") + ".* larger data.stride"):
        evaluation_windows(ids, lengths, 5, 2, Marks())
    rows = table(np.array([21]), input_ids=np.arange(21), labels=np.arange(21))
    for lay_out in (lambda: blocks(rows, 5, Marks(), True), lambda: packed_samples(rows, 21)):
        with pytest.raises(ValueError, match=message.format(21)):
            lay_out()
