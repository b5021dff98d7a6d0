"""From tokens to rows of language modelling: blocks, evaluation windows, packed samples, and batches of these.

A row is a list of token ids, `input_ids`, and of `labels` aligned with it: the token itself where it is to be scored,
else `IGNORED`. Functions here take and give flat arrays, rows one behind the other, which is how Arrow keeps lists.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lit_peft.labels import IGNORED

MOST_TOKENS = 2**31 - 1
"""What the offsets of Arrow's lists reach."""


@dataclass(frozen=True)
class Marks:
    """The special tokens that a tokenizer's model expects around and between texts.

    Attributes:
        before: Ids before the tokens of a row, such as [CLS] or a <s>.
        after: Ids after them, such as [SEP].
        separator: Id between two documents of a block: the eos token, else the sep token; None where there is neither.
        eos: Id that closes a completion.
        special: All ids that are marks. Not that of unknown words, which stands for words of the text.
        masked: Whether the tokenizer is one of masked models, whose prompts are closed by `after`, too.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    separator: int | None = None
    eos: int | None = None
    special: tuple[int, ...] = ()
    masked: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> "Marks":
        """Found by tokenising a text with and without them.

        Raises:
            ValueError: The one does not contain the other.
        """
        for text in ("a", "A", "0"):  # an alphabet of proteins has no small letters, and may have no unknown token
            plain, full = (tokenizer(text, add_special_tokens=marked)["input_ids"] for marked in (False, True))
            size = len(plain)
            at = next((i for i in range(len(full) + 1) if plain and full[i : i + size] == plain), None)
            if at is not None:
                break
        else:
            raise ValueError(
                f"The tokenizer {tokenizer.name_or_path} makes {plain} of {text!r}, and with special tokens {full}, "
                "expected the former within the latter: blocks are made for tokenizers that put theirs around a text."
            )
        eos, sep = tokenizer.eos_token_id, tokenizer.sep_token_id
        ends = {tokenizer.bos_token_id, eos, sep, tokenizer.cls_token_id, tokenizer.mask_token_id}
        padding = {tokenizer.pad_token_id} - {tokenizer.unk_token_id}
        return cls(
            before=tuple(full[:at]),
            after=tuple(full[at + size :]),
            separator=sep if eos is None else eos,
            eos=eos,
            special=tuple(sorted((ends | padding | {*full[:at], *full[at + size :]}) - {None})),
            masked=tokenizer.mask_token_id is not None,
        )

    @property
    def size(self) -> int:
        """Tokens of a row that are marks."""
        return len(self.before) + len(self.after)

    def check_room(self, size: int, completions: bool) -> None:
        """Raises ValueError when rows of that size have no room for marks and a text, or a prompt and a completion."""
        marks, text = (len(self.before), 2) if completions else (self.size, 1)
        if size < marks + text:
            raise ValueError(
                f"data.block_size is {size}, expected at least {marks + text}: {counted(marks, 'mark')} of the "
                f"tokenizer and {counted(text, 'token')} of text."
            )


def counted(count: int, what: str) -> str:
    """A number with its noun."""
    return f"{count:,} {what}" + ("s" if count != 1 else "")


def check_tokens(count: int) -> None:
    """Raises ValueError when there are more tokens than `MOST_TOKENS`."""
    if count > MOST_TOKENS:
        raise ValueError(
            f"There are {count:,} tokens in the rows of one split, expected at most {MOST_TOKENS:,}: give less text, "
            "or, of windows that overlap, a larger data.stride."
        )


def table(lengths: np.ndarray, **columns: np.ndarray) -> pa.Table:
    """Rows as Arrow's lists.

    Args:
        lengths: Values of each row, (rows,), all columns alike.
        columns: Flat values.
    """
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    lists = {name: pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32())) for name, values in columns.items()}
    return pa.table({**lists, "length": pa.array(lengths, pa.int32())})


def training_blocks(ids: np.ndarray, lengths: np.ndarray, size: int, marks: Marks) -> pa.Table:
    """Joins documents, with a separator between two of them, and cuts the whole into disjoint blocks.

    Every token of a document is in one block. The last block holds what is left, and may be shorter.

    Args:
        ids: Tokens of all documents.
        lengths: Tokens of each.
        size: Tokens of a block, marks included.
        marks: The tokenizer's; around each block, and not scored, neither is the separator.

    Returns:
        `input_ids`, `labels` and `length`.
    """
    labels, ends = _labels(ids, marks), np.cumsum(lengths[lengths > 0])[:-1]
    if marks.separator is not None:
        ids, labels = np.insert(ids, ends, marks.separator), np.insert(labels, ends, IGNORED)
    body = size - marks.size
    starts = np.arange(0, len(ids), body)
    return _rows(ids, labels, starts, np.minimum(starts + body, len(ids)), starts, marks)


def evaluation_windows(ids: np.ndarray, lengths: np.ndarray, size: int, stride: int | None, marks: Marks) -> pa.Table:
    """Windows over each document by itself, which score each token in the first window that it is in.

    A window begins `stride` tokens after the one before it and scores what that one had not reached; the rest is
    context. So every token of a document has a label in one window. A causal model cannot score the first token of a
    row that no mark precedes: of disjoint windows it leaves out the first of each, of overlapping ones only the first
    of a document.

    Args:
        ids: Tokens of all documents.
        lengths: Tokens of each.
        size: Tokens of a window, marks included.
        stride: Tokens from one window's begin to the next; null, or more than a window holds: disjoint windows.
        marks: The tokenizer's; around each window, and not scored.

    Returns:
        `input_ids`, `labels` and `length`.
    """
    lengths = lengths[lengths > 0]
    body = size - marks.size
    step = min(stride or body, body)
    windows = 1 + np.maximum(0, -(-(lengths - body) // step))
    ends = np.repeat(np.cumsum(lengths), windows)
    index = _counted(windows)
    starts = np.repeat(np.cumsum(lengths) - lengths, windows) + index * step
    reached = np.where(index > 0, starts - step + body, starts)
    return _rows(ids, _labels(ids, marks), starts, np.minimum(starts + body, ends), reached, marks)


def packed(ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, size: int) -> pa.Table:
    """Packs samples into as few rows as `best_fit` finds.

    Args:
        ids: Tokens of all samples.
        labels: Their labels.
        lengths: Tokens of each sample, none more than `size`.
        size: Most tokens of a row.

    Returns:
        `input_ids`, `labels`, `position_ids`, which begin with 0 in each sample, and `length`.
    """
    rows = best_fit(lengths.tolist(), size)
    order = np.array([sample for row in rows for sample in row], dtype=np.int64)
    position = _counted(lengths[order])
    source = np.repeat((np.cumsum(lengths) - lengths)[order], lengths[order]) + position
    sizes = np.array([lengths[row].sum() for row in rows], dtype=np.int64)
    return table(sizes, input_ids=ids[source], labels=labels[source], position_ids=position)


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Packs by best fit, the longest first: each goes to the fullest row that still has room for it, else to a new one.

    Needs at most 11/9 of the fewest rows possible, and 4 more (Johnson, Demers, Ullman, Garey and Graham 1974,
    "Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J. Comput. 3).

    Args:
        lengths: Length of each sample, at most `size`.
        size: Most that a row holds.

    Returns:
        Rows of indices of samples.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # room -> rows
    rooms: list[int] = []  # those that some row has, sorted
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[sample])
        if at < len(rooms):
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(sample)
        room -= lengths[sample]
        if not with_room[room]:
            insort(rooms, room)
        with_room[room].append(row)
    return rows


def pad_rows(rows: pa.Table, *, pad: int, longest: int) -> dict[str, torch.Tensor]:
    """A batch of rows, padded to the longest of them, rounded up to a multiple of 8.

    Rows without labels, which are prompts, are padded on the left, so that what is generated follows them, and no wider
    than the longest, so that it finds room; others on the right. Packed rows have no attention mask: where transformers
    finds, with neither a mask nor a cache (`use_cache=False`), that positions begin anew, it keeps attention within
    each sample; padding is one more sample.

    Args:
        rows: A table with "length" and "input_ids"; maybe "labels" and "position_ids".
        pad: Id of the padding token.
        longest: The width is not rounded beyond this.

    Returns:
        int64 tensors, (batch, width): `input_ids`, `labels` where the rows have them, and `position_ids` or else
        `attention_mask`.
    """
    lengths = rows["length"].to_numpy()
    most = int(lengths.max())
    left = "labels" not in rows.column_names
    width = most if left else max(most, min(-(-most // 8) * 8, longest))
    column = np.arange(width)
    inside = column >= width - lengths[:, None] if left else column < lengths[:, None]
    filling: dict[str, Any] = {"input_ids": pad, "labels": IGNORED, "position_ids": column - lengths[:, None]}
    batch = {}
    for name, value in filling.items():
        if name in rows.column_names:
            padded = np.broadcast_to(np.asarray(value, dtype=np.int64), inside.shape).copy()
            padded[inside] = rows[name].combine_chunks().flatten().to_numpy()
            batch[name] = torch.from_numpy(padded)
    if "position_ids" not in batch:
        batch["attention_mask"] = torch.from_numpy(inside.astype(np.int64))
    return batch


def _labels(ids: np.ndarray, marks: Marks) -> np.ndarray:
    return np.where(np.isin(ids, marks.special), IGNORED, ids)


def _counted(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... within each row, flat."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _rows(
    ids: np.ndarray, labels: np.ndarray, starts: np.ndarray, stops: np.ndarray, scored: np.ndarray, marks: Marks
) -> pa.Table:
    """Rows of `ids[start:stop]` between marks, with labels from `scored` on."""
    sizes = stops - starts
    lengths = sizes + marks.size
    check_tokens(int(lengths.sum()))
    begins = np.cumsum(lengths) - lengths
    position = _counted(sizes)
    source = np.repeat(starts, sizes) + position
    target = np.repeat(begins + len(marks.before), sizes) + position
    row_ids, row_labels = np.empty(lengths.sum(), np.int32), np.full(lengths.sum(), IGNORED, np.int32)
    row_ids[target] = ids[source]
    row_labels[target] = np.where(source >= np.repeat(scored, sizes), labels[source], IGNORED)
    for at, mark in enumerate(marks.before):
        row_ids[begins + at] = mark
    for at, mark in enumerate(marks.after):
        row_ids[begins + len(marks.before) + sizes + at] = mark
    return table(lengths, input_ids=row_ids, labels=row_labels)
