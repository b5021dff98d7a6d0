"""Columns that are checked before anything is learned from them: texts and labels."""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Value

LONGEST = 1_000_000  # characters; a novel is shorter, and tokenising a broken file would take minutes
MISSING, UNKNOWN = -1, -2
SHOWN = 20  # names in a message

# Of at most 40 digits: longer ones are names, whatever they are meant to be.
_WHOLE = re.compile(r"[+-]?\d{1,40}(\.0*)?")
_NUMBER = re.compile(r"[+-]?(\d{1,40}(\.\d*)?|\.\d+)(e[+-]?\d+)?", re.I)
EXACT = 2**53  # whole numbers from here on are no longer all floats


def nearest(name: str, names: Iterable[str]) -> str:
    """The second half of an error message: what there is, and which of it is closest to `name`."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    rest = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"there are: {', '.join(names[:SHOWN])}{rest}" + (f"; did you mean {near[0]!r}?" if near else "")


def check_text(split: Dataset, column: str, where: str, *, option: str = "", numbers: bool = True) -> None:
    """Check that a column is there and holds a text in every row, and none that is blank or endless.

    Args:
        split: The rows.
        column: Name of the column.
        where: What `split` is called in messages.
        option: Argument of the data that names the column.
        numbers: Whether the texts may all be numbers; csv files cannot tell these from a column of numbers.

    Raises:
        ValueError: The column is missing or of another type, or some text is null, blank or of more than a
            million characters. Rows are counted from 1.
    """
    texts = texts_of(split, column, where, option=option)
    lengths = pc.utf8_length(texts)
    longest = pc.max(lengths).as_py() or 0
    if longest > LONGEST:
        raise ValueError(
            f"Row {pc.index(lengths, longest).as_py() + 1} of {where} has {longest:,} characters in column "
            f"{column!r}, expected at most {LONGEST:,}: a quote or a line break is probably missing there."
        )
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(texts), ""), True)
    _refuse_rows(blank, "empty {}", column, where)
    if not numbers and pc.all(pc.match_substring_regex(texts, r"^\s*[-+]?[0-9.]+\s*$")).as_py():
        raise ValueError(f"Column {column!r} of {where} holds numbers alone, such as {texts[0]}, expected text.")


def check_documents(split: Dataset, column: str, where: str, *, option: str = "") -> None:
    """Refuses a column whose texts, some of which may be blank, are no documents; see `check_text`.

    Raises:
        ValueError: The column is missing or of another type, has a null, or blank texts alone.
    """
    texts = texts_of(split, column, where, option=option)
    _refuse_rows(texts.is_null(), "{} of null", column, where)
    if pc.all(pc.equal(pc.utf8_trim_whitespace(texts), "")).as_py():
        raise ValueError(f"There are only blank texts in column {column!r} of {where}.")


def _refuse_rows(are_bad: pa.ChunkedArray, what: str, column: str, where: str) -> None:
    """Raises ValueError when some rows are bad: how many, what they are (`what`, of "texts") and which is the first."""
    if count := pc.sum(are_bad).as_py():
        told = what.format("text" if count == 1 else "texts")
        raise ValueError(
            f"Column {column!r} of {where} has {count:,} {told}, the first in row "
            f"{pc.index(are_bad, True).as_py() + 1} of {len(are_bad):,}."
        )


def texts_of(split: Dataset, column: str, where: str, *, option: str = "") -> pa.ChunkedArray:
    """A column of texts, which may be null or blank, as large strings; see `check_text`.

    Raises:
        ValueError: The column is missing or of another type.
    """
    if column not in split.column_names:
        chosen = f" (--data.{option})" if option else ""
        raise ValueError(f"No column {column!r} in {where}{chosen}; {nearest(column, split.column_names)}")
    feature = split.features[column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")):
        raise ValueError(f"Column {column!r} of {where} holds {_kind(feature)}, expected text.")
    return split.with_format("arrow").select_columns([column])[:][column].cast(pa.large_string())


def check_classes(names: Sequence[str], where: str) -> None:
    """Raises ValueError when there is one class alone, from which nothing can be learnt."""
    if len(names) == 1:
        raise ValueError(f"There is one class alone, {names[0]!r}, in {where}; expected two or more.")


def given_texts(texts: Sequence[str], pairs: Sequence[str] | None, column: str, pair_column: str | None) -> Dataset:
    """A split of texts from elsewhere than a file, with a column for each text of a row.

    Raises:
        ValueError: There are no texts, or one is blank or too long; `pairs` is missing, is not expected, or is of
            another length.
    """
    if (pairs is None) != (pair_column is None):
        come = "alone" if pairs is None else "in pairs"
        raise ValueError(f"The texts come {come}, but data.text_pair_column is {pair_column!r}.")
    columns = {column: texts} | ({str(pair_column): pairs} if pairs is not None else {})
    for name, values in columns.items():
        if isinstance(values, str) or not values or not all(isinstance(value, str) for value in values):
            raise ValueError(f"use_texts expects one text or more in a list, not {str(values)[:60]!r} as {name}.")
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"There are {len(texts):,} texts and {len(pairs):,} second ones, expected one for each.")
    given = Dataset.from_dict({name: list(values) for name, values in columns.items()})
    for name in columns:
        check_text(given, name, "the texts given")
    return given


def _kind(feature: Any) -> str:
    return getattr(feature, "dtype", None) or str(feature)


def _number(word: str) -> str:
    """`1` for `01`, `+1` and `1.0`; another word as it is."""
    return str(int(word.partition(".")[0])) if _WHOLE.fullmatch(word) else word


def _words(split: Dataset, column: str) -> list[str | None]:
    """How each label is written, None where there is none (null, an empty text, a ClassLabel of -1).

    A file may say "1" where another says 1 or 1.0: whatever the type, these are one word.
    """
    feature = split.features[column]

    def word(value: Any) -> str | None:
        if value is None or value != value:
            return None
        if isinstance(feature, ClassLabel):
            return feature.names[value] if value >= 0 else None
        if isinstance(value, float):
            return str(int(value)) if value.is_integer() else str(value)
        return str(value).strip() or None

    return [word(value) for value in split[column][:]]


def has_labels(split: Dataset, column: str) -> bool:
    """Whether any row has a label. A column of nothing but -1, as in GLUE's published tests, has none."""
    if column not in split.column_names:
        return False
    return bool({_number(word) for word in _words(split, column) if word is not None} - {"-1"})


@dataclass(frozen=True)
class Labels:
    """The classes that a data set tells apart.

    Attributes:
        names: Their names in the order of their codes.
        declared: Names that a label's number stands for, unless it is a name itself: those of a `ClassLabel` column.
        source: Whose they are, in messages.
    """

    names: list[str]
    declared: Sequence[str] = ()
    source: str = "train"

    @classmethod
    def of(cls, split: Dataset, column: str, where: str) -> "Labels":
        """The classes of a label column: its own if it is a `ClassLabel`, else its values, sorted.

        Numbers sort as numbers and come before words. -1 is a class where it stands beside other values.

        Raises:
            ValueError: The column holds neither names nor whole numbers nor booleans, or numbers that reading has
                rounded.
        """
        feature = split.features[column]
        if isinstance(feature, ClassLabel):
            return cls(list(feature.names), declared=feature.names)
        if not all(isinstance(value, str | int | float | None) for value in split[column][:]):
            raise ValueError(
                f"Label column {column!r} of {where} holds {_kind(feature)}, expected class names or whole numbers."
            )
        if rounded := next((v for v in split[column][:] if isinstance(v, float) and abs(v) >= EXACT), None):
            raise ValueError(
                f"Label column {column!r} of {where} holds numbers too large to be told apart, such as {rounded:.15g}: "
                "write them as texts, in quotes."
            )
        words = {word for word in _words(split, column) if word is not None}
        if all(_NUMBER.fullmatch(word) for word in words):
            words = {_number(word) for word in words}
            if fractions := sorted(word for word in words if not _WHOLE.fullmatch(word)):
                raise ValueError(
                    f"Label column {column!r} of {where} holds fractions such as {fractions[0]}, "
                    "expected class names or whole numbers."
                )
        if words == {"-1"}:
            words = set()
        return cls(sorted(words, key=lambda word: (0, int(word), word) if _WHOLE.fullmatch(word) else (1, 0, word)))

    def encode(self, split: Dataset, column: str) -> np.ndarray:
        """Code of each row's label, as int64: MISSING where there is none, UNKNOWN for one that is no class here.

        -1 is no label unless it is one of the classes; where a split has no other, it never is.
        """
        words = _words(split, column)
        known: dict[str | None, int] = {name: code for code, name in enumerate(self.names)}
        unlabelled = not has_labels(split, column)

        def code(word: str | None) -> int:
            if word is None or unlabelled:
                return MISSING
            number = _number(word)
            if word not in known and number.isdecimal() and len(number) < 20 and int(number) < len(self.declared):
                word = self.declared[int(number)]
            return known.get(word, known.get(number, MISSING if number == "-1" else UNKNOWN))

        codes = {word: code(word) for word in set(words)}
        return np.array([codes[word] for word in words], dtype=np.int64)

    def check(self, split: Dataset, column: str, codes: np.ndarray, where: str) -> None:
        """Check that all rows of a split have a label, and none that is no class here.

        Args:
            split: Rows to learn from or to score.
            column: Their label column.
            codes: What `encode` gives for it.
            where: What `split` is called in messages.

        Raises:
            ValueError: The column is missing, or some rows have no label, or one that is no class here.
        """
        if column not in split.column_names:
            there = nearest(column, split.column_names)
            raise ValueError(f"No label column {column!r} in {where} (--data.label_column); {there}")
        if len(missing := np.flatnonzero(codes == MISSING)):
            raise ValueError(
                f"{len(missing):,} of {len(codes):,} examples in {where} have no label (-1, null or empty in "
                f"{column!r}), which only `predict` allows; the first is row {missing[0] + 1}. The published test "
                "splits of GLUE are such: choose another split."
            )
        if len(unknown := np.flatnonzero(codes == UNKNOWN)):
            word = _words(split.select(unknown[:1]), column)[0]
            raise ValueError(
                f"{len(unknown):,} of {len(codes):,} examples in {where} have labels that are not in {self.source}, "
                f"such as {word!r} in row {unknown[0] + 1}; in {self.source} {nearest(str(word), self.names)}"
            )
