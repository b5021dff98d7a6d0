"""From a path to named splits with checked columns, and fair subsets of them."""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset, load_from_disk

from lit_peft import hub

# Empty cells stay empty strings: pandas would turn the words "null" and "NA" into missing values.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
# First word of a file's name -> its split.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
UNLABELLED = frozenset({None, -1, ""})


def load_splits(path: str, name: str | None = None) -> dict[str, Dataset]:
    """Read the splits of a data set.

    Args:
        path: A file (.csv, .tsv, .json, .jsonl, .parquet), which is the split `train`; a folder with one file
            a split (`train.parquet`, `dev.tsv`, `test-00000-of-00002.parquet`, ...; splits may differ in
            columns), or laid out in any other way that `datasets.load_dataset` reads, or written by
            `save_to_disk`; or a hub id.
        name: Configuration of a hub data set.

    Raises:
        FileNotFoundError: A local path that does not exist.
        ConnectionError: A hub data set that can be neither reached nor found in the cache.
        ValueError: A file of an unknown type.
    """
    found = Path(hub.locate(path, what="dataset"))
    if found.is_file():
        return {"train": _read([found])}
    if found.is_absolute() and found.is_dir():
        if (found / "dataset_dict.json").exists() or (found / "state.json").exists():
            data = load_from_disk(found)
            return {"train": data} if isinstance(data, Dataset) else dict(data)
        files: dict[str, list[Path]] = {}
        for file in sorted(found.iterdir()):
            split = SPLIT_WORDS.get(re.split("[^a-z]", file.stem.lower())[0])
            if split and file.suffix in READERS:
                files.setdefault(split, []).append(file)
        if files:
            return {split: _read(parts) for split, parts in files.items()}
    data = load_dataset(str(found), name)
    assert isinstance(data, DatasetDict)
    return {str(split): part for split, part in data.items()}


def _read(files: list[Path]) -> Dataset:
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= READERS.keys():
        names = ", ".join(map(str, files))
        raise ValueError(f"Cannot read {names}: expected files of one type, out of {', '.join(READERS)}.")
    builder, options = READERS[suffixes.pop()]
    return load_dataset(builder, data_files=[str(file) for file in files], split="train", **options)


def nearest(name: str, names: Iterable[str]) -> str:
    """The second half of an error message: what there is, and which of it is closest to `name`."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"there are: {', '.join(names)}" + (f"; did you mean {near[0]!r}?" if near else "")


def check_text(split: Dataset, column: str, where: str) -> None:
    """Check that a column is there and holds a text in every row.

    Raises:
        ValueError: The column is missing, of another type, or null in some row.
    """
    if column not in split.column_names:
        raise ValueError(f"No column {column!r} in {where}; {nearest(column, split.column_names)}")
    feature = split.features[column]
    if not (isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")):
        raise ValueError(f"Column {column!r} of {where} holds {getattr(feature, 'dtype', feature)}, expected text.")
    if nulls := split.data.column(column).null_count:
        first = split.data.column(column).is_null().index(True).as_py()
        raise ValueError(f"Column {column!r} of {where} has {nulls} empty rows, the first is row {first}.")


def label_codes(split: Dataset, column: str, where: str) -> tuple[dict[Any, int], list[str]]:
    """Number the labels of a split.

    Returns:
        Code of each value of the column, and the classes' names in the order of their codes. A `ClassLabel`
        column keeps its own; other values, whole numbers, booleans or texts, are sorted.

    Raises:
        ValueError: The column holds something else.
    """
    feature = split.features[column]
    if isinstance(feature, ClassLabel):
        return {i: i for i in range(feature.num_classes)}, list(feature.names)
    if not (isinstance(feature, Value) and re.match("u?int|bool|(large_)?string", feature.dtype)):
        raise ValueError(
            f"Label column {column!r} of {where} holds {getattr(feature, 'dtype', feature)}, "
            "expected class names or whole numbers."
        )
    values = sorted(set(split.unique(column)) - UNLABELLED)
    return {value: code for code, value in enumerate(values)}, [str(value) for value in values]


def encode_labels(split: Dataset, column: str, codes: Mapping[Any, int], where: str) -> np.ndarray:
    """Codes of a split's labels, -1 where there is none (null, -1 or an empty text).

    Raises:
        ValueError: A label that `codes` does not know.
    """
    unknown = set(split.unique(column)) - UNLABELLED - codes.keys()
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the labels in {where} are not in train, such as {next(iter(unknown))!r}; "
            f"in train {nearest(str(next(iter(unknown))), map(str, codes))}"
        )
    return np.array([codes.get(value, -1) for value in split[column]], dtype=np.int64)


def check_labels(split: Dataset, column: str, codes: np.ndarray, where: str) -> None:
    """Check that rows to learn from or to score have labels.

    Args:
        split: The split that they are from.
        column: Its label column.
        codes: Codes of the rows' labels.
        where: The split's name, for messages.

    Raises:
        ValueError: The column is missing, or some rows have no label.
    """
    if column not in split.column_names:
        raise ValueError(f"No label column {column!r} in {where}; {nearest(column, split.column_names)}")
    if missing := int((codes < 0).sum()):
        raise ValueError(
            f"{missing} of {len(codes)} examples in {where} have no label (-1, null or empty in {column!r}), "
            "which only `predict` allows. The published test splits of GLUE are such: choose another split."
        )


def stratified_subset(strata: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `size` of the rows at random so that each stratum keeps its share, to within one row.

    Systematic sampling: rows are shuffled, sorted by stratum, and taken at equal steps.

    Args:
        strata: Stratum of each row, an integer.
        size: Number of rows to draw.
        rng: Source of chance.

    Returns:
        Row numbers in rising order.
    """
    if size >= len(strata):
        return np.arange(len(strata))
    order = rng.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    return np.sort(order[((np.arange(size) + 0.5) * len(order) / size).astype(np.int64)])
