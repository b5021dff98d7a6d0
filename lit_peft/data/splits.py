"""From a path to named splits, and fair subsets of them."""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from datasets.utils import logging
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_peft import hub

SEPARATORS = {".csv": ",", ".tsv": "\t"}
BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
SUFFIXES = (*SEPARATORS, *BUILDERS)
LINES = ".txt"
AS_LINES = (".raw", ".tokens")
"""Types of the text files that WikiText was published as: read as .txt is."""
ABOUT = re.compile("readme|licen[cs]e|notice|citation|requirements", re.IGNORECASE)
"""How names of files begin that are about others."""
LINE = "text"
"""Column of the lines of a text file."""
# Word in a file's name -> its split.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class FileError(ValueError):
    """Something wrong with a file; says which and where."""


def load_splits(path: str, name: str | None = None, lines: bool = False) -> dict[str, Dataset]:
    """Read the splits of a data set.

    Args:
        path: A file (.csv, .tsv, .json, .jsonl, .parquet), which is the split `train`; a folder of such files,
            whose names, or the folders that they are in, tell their splits (`train.parquet`, `dev.tsv`,
            `trec_test.csv`, `test-00000-of-00002.parquet`, `train/a.csv`, ...; splits may differ in columns),
            or are all train if none does; a folder laid out in any other way that `datasets.load_dataset`
            reads, or written by `save_to_disk`; or a hub id.
        name: Configuration of a hub data set.
        lines: Whether text files (.txt) are read, too, and in a folder that has no other files; a row is then a line
            with its line break, in the column `text`.

    Files of a folder whose names tell no split, beside some that do, are not read, which a warning says.

    Raises:
        FileNotFoundError: A local path that does not exist.
        ConnectionError: A hub data set that can be neither reached nor found in the cache.
        ValueError: A file that is empty, broken or of an unknown type.
    """
    found = Path(hub.locate(path, what="dataset"))
    if found.is_file():
        return {"train": _read([found], lines)}
    if found.is_absolute() and found.is_dir():
        if (found / "dataset_dict.json").exists() or (found / "state.json").exists():
            with _explained(path):
                data = load_from_disk(found)
            return {"train": data} if isinstance(data, Dataset) else dict(data)
        files = _by_split(found, SUFFIXES)
        if not files and lines:
            files = _by_split(found, (LINES,))
        if files:
            _tell_unread(found, files, lines)
            return {split: _read(parts, lines) for split, parts in files.items()}
        within = sorted(file for file in found.rglob("[!.]*") if file.is_file())
        if not within:
            raise FileError(f"There is no file in {path}, expected {_readable(lines)}.")
        data = [file for file in within if not ABOUT.match(file.name)]
        nested = all(_suffix(file) == LINES and file.parent != found for file in data)
        if lines and data and nested and not (found / "README.md").exists():  # which may tell where splits are
            raise FileError(
                f"{data[0]} is in a folder whose name tells no split: expected text files in {found} itself, or all of "
                "them in folders named train, validation and test."
            )
    with hub.explained(path, "dataset"), _explained(path):
        data = load_dataset(str(found), name)
    assert isinstance(data, DatasetDict)
    return {str(split): part for split, part in data.items()}


def is_text(path: str) -> bool:
    """Whether `load_splits` finds nothing but text files (.txt) at a local path."""
    found = Path(path).expanduser()
    if found.is_dir():
        return not _by_split(found, SUFFIXES) and bool(_by_split(found, (LINES,)))
    return _suffix(found) == LINES


def _readable(lines: bool) -> str:
    *names, last = [*SUFFIXES, LINES] if lines else SUFFIXES
    return f"{', '.join(names)} or {last}"


def _by_split(folder: Path, suffixes: tuple[str, ...]) -> dict[str, list[Path]]:
    """Files of each split, of these types; none where the folder is laid out in some other way."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if _suffix(entry) in suffixes and entry.is_file()]
    folders = {entry: SPLIT_WORDS[entry.name] for entry in entries if entry.is_dir() and entry.name in SPLIT_WORDS}
    nested = {
        split: sorted(file for file in entry.iterdir() if _suffix(file) in suffixes) for entry, split in folders.items()
    }
    if nested and all(nested.values()):
        return nested
    for words in (1, None):  # the first word of a file's name, or for want of such names any word of it
        splits: dict[str, list[Path]] = {}
        for file in files:
            named = [SPLIT_WORDS.get(word) for word in re.split("[^a-z]+", file.stem.lower())[:words]]
            if split := next(filter(None, named), None):
                splits.setdefault(split, []).append(file)
        if splits:
            return splits
    # A .json beside folders describes them.
    data = [file for file in files if _suffix(file) != ".json"]
    kinds = {_suffix(file) for file in data}  # of several, which is told, `load_dataset` would read one in silence
    return {"train": data} if len(kinds) > 1 or (data and not any(entry.is_dir() for entry in entries)) else {}


def _tell_unread(folder: Path, files: dict[str, list[Path]], lines: bool) -> None:
    """Warns of files of a folder that could be data and are in no split; a .json may be about them, a README is."""
    types = {*SUFFIXES, *((LINES,) if lines else ())} - {".json"}
    read = {file for parts in files.values() for file in parts}
    unread = [
        file.name
        for file in sorted(folder.glob("[!.]*"))
        if file.is_file() and file not in read and _suffix(file) in types and not ABOUT.match(file.name)
    ]
    if unread:
        rank_zero_warn(
            f"Not read in {folder}: {', '.join(unread)}, whose names tell no split, or which are of another type."
        )


def _suffix(file: Path) -> str:
    suffix = file.suffix.lower()  # Windows may have written it in capitals
    return LINES if suffix in AS_LINES else suffix


def _read(files: list[Path], lines: bool) -> Dataset:
    names = ", ".join(map(str, files))
    readable = (*SUFFIXES, LINES) if lines else SUFFIXES
    if unknown := next((file for file in files if _suffix(file) not in readable), None):
        raise FileError(f"Cannot read {unknown}: expected a file of type {_readable(lines)}.")
    suffix = _suffix(files[0])
    if len({file.suffix.lower() for file in files}) > 1:
        raise FileError(f"Cannot read {names} as one split: expected files of one type, or names such as test.csv.")
    sources = [str(file) for file in files]
    with _explained(names, files):
        for file in files:
            if not file.stat().st_size:
                raise FileError(f"{file} is empty: it has 0 bytes.")
        # The data set is cached under these arguments: a file that changes must change them.
        # Tuples: over lists, `from_generator` would call once for each item.
        stamps = tuple((s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_size) for s in (file.stat() for file in files))
        arguments = {"files": tuple(sources), "stamps": stamps}
        if suffix in SEPARATORS:
            return Dataset.from_generator(csv_rows, gen_kwargs=arguments | {"separator": SEPARATORS[suffix]})
        if suffix == LINES:
            return Dataset.from_generator(text_lines, gen_kwargs=arguments)
        if fault := next(filter(None, (_first_fault(file, parse=False) for file in files)), None):
            raise FileError(fault)  # the reader of JSON lets it pass, and a text fails when it is wanted
        data = load_dataset(BUILDERS[suffix], data_files=[*map(escape, sources)], split="train")
        if not len(data):
            raise FileError(f"{names} is empty: it has no rows.")
        return data


def csv_rows(files: Sequence[str], separator: str, stamps: Any = None) -> Iterator[dict[str, str]]:
    """Yield the rows of csv files as they are written: every cell is a text, and "NA" and "null" are words.

    Readers that guess types guess another one where a file, or only its next 10,000 rows, has other values; and
    those that forgive rows of a wrong length shift their cells in silence.

    Args:
        files: Paths, of the same columns.
        separator: What stands between cells.
        stamps: Not used here; tells `datasets` whether its cached copy is up to date.

    Raises:
        FileError: A file without rows or of other columns, a row of a wrong length, a quote that is never closed, is
            closed before its cell ends, or takes in rows; see `_check_swallowed`.
    """
    limit = csv.field_size_limit(2**31 - 1)  # texts that are too long are told with their row, later
    columns: list[str] = []
    try:
        for file in files:
            with Path(file).open(encoding="utf-8-sig", newline="") as lines:
                header: list[str] = []
                swallowed: list[tuple[int, list[list[str]], int]] = []
                count = blank = 0
                for start, row in _parsed(file, lines, separator):
                    if not row:
                        blank += len(header) == 1  # an empty text, unless nothing comes after it
                        continue
                    if not header:
                        header = [cell.strip() or f"unnamed {at}" for at, cell in enumerate(row)]
                        if double := next((cell for cell in header if header.count(cell) > 1), None):
                            raise FileError(f"{file} has two columns {double!r}.")
                        others = [mark for mark in ",;\t|" if mark != separator and mark in header[0]]
                        if len(header) == 1 and others:
                            raise FileError(
                                f"{file} has one column, {header[0]!r}: cells of a {_suffix(Path(file))} file are "
                                f"parted by {separator!r}, these by {others[0]!r}."
                            )
                        columns = columns or sorted(header)
                        if sorted(header) != columns:
                            raise FileError(
                                f"{file} has the columns {', '.join(sorted(header))}; "
                                f"{files[0]}, of the same split, has {', '.join(columns)}."
                            )
                    elif len(row) != len(header):
                        raise FileError(
                            f"{file}: the row of line {start} has {len(row)} cells, expected {len(header)} "
                            f"({', '.join(header)}). A text that holds {separator!r} must stand in double quotes."
                        )
                    else:
                        yield from [{header[0]: ""}] * blank
                        count, blank = count + 1, 0
                        swallowed += [(start, *found) for found in _rows_within(row, separator)]
                        yield dict(zip(header, row, strict=True))
                if not count:
                    raise FileError(f"{file} is empty: it has a header at most, and no rows.")
                if swallowed:
                    lines.seek(0)
                    _check_swallowed(file, list(_parsed(file, lines, separator)), swallowed)
    finally:
        csv.field_size_limit(limit)


def text_lines(files: Sequence[str], stamps: Any = None) -> Iterator[dict[str, str]]:
    r"""Yield the lines of text files, as `text`, each with its line break, which is \n whatever it is in the file.

    Args:
        files: Paths. The last line of a file may have no line break.
        stamps: Not used here; tells `datasets` whether its cached copy is up to date.
    """
    for file in files:
        with Path(file).open(encoding="utf-8-sig") as lines:
            yield from ({LINE: line} for line in lines)


def _parsed(file: str, lines: Iterable[str], separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows, blank ones empty, with the line that each begins in.

    Strict: a quote at a cell's start that is closed within another row's text would otherwise take all between.
    """
    rows = csv.reader(lines, delimiter=separator, strict=True)
    last = 0
    try:
        for row in rows:
            start, last = last + 1, rows.line_num
            yield start, row
    except csv.Error as error:
        quote = f"{file}: the quote opened in the row of line {last + 1}"
        if "end of data" in str(error):
            raise FileError(f"{quote} is never closed.") from None
        raise FileError(
            f"{quote} is closed in line {rows.line_num}, and more text follows ({error}). In a text that stands in "
            "quotes, a quote is written twice; a jsonl or parquet file needs no quotes."
        ) from None


def _rows_within(row: list[str], separator: str) -> Iterator[tuple[list[list[str]], int]]:
    """The rows that the lines of a cell would be without its quotes, if all are of this row's length; its column."""
    for at, cell in enumerate(row):
        if "\n" in cell and len(row) > 1:
            lines = [line.split(separator) for line in cell.replace("\r\n", "\n").split("\n")]
            rows = [row[:at] + lines[0], *lines[1:-1], lines[-1] + row[at + 1 :]]
            if all(len(other) == len(row) for other in rows):
                yield rows, at


def _check_swallowed(
    file: str, rows: list[tuple[int, list[str]]], swallowed: list[tuple[int, list[list[str]], int]]
) -> None:
    """Refuses a cell whose lines are rows, as when a stray quote ends with a later cell: else these would be lost.

    A text may have lines, with separators in them. So rows they are only if in another column than the cell's, that of
    the labels as a rule, each of them holds what some row of the file holds there, and not nothing.

    Args:
        file: Where from.
        rows: Line and cells of all rows, as they were parsed.
        swallowed: Line, what the lines of a cell would be as rows, and the cell's column.

    Raises:
        FileError: For the first such cell.
    """
    known = [{*cells} - {""} for cells in zip(*(row for _, row in rows[1:] if row), strict=True)]
    for start, found, at in swallowed:
        for column, cells in enumerate(known):
            if column != at and {row[column] for row in found} <= cells:
                raise FileError(
                    f"{file}: the quote opened in the row of line {start} takes in {len(found)} lines, each of which "
                    "is a row by itself. In a text that stands in quotes, a quote is written twice; a jsonl or parquet "
                    "file needs no quotes."
                )


@contextmanager
def _explained(what: str, files: list[Path] | None = None) -> Iterator[None]:
    """Turns what `datasets` and its readers raise into one sentence that names the file and the cause."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it logs the failure, too
    try:
        yield
    except OSError:
        raise
    except (DatasetsError, pa.ArrowException, ValueError, TypeError, KeyError, StopIteration) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, FileError):
            raise cause from None
        fault = next(filter(None, map(_first_fault, files or [])), None)
        # The last is what datasets' reader says of a parquet file without rows.
        none = ("corresponds to no data", "BatchSize must be greater than 0")
        if fault is None and (isinstance(cause, StopIteration) or any(words in str(cause) for words in none)):
            fault = f"{what} is empty: it has no rows."
        line = (str(cause).splitlines() or [""])[0] or type(cause).__name__
        raise FileError(fault or f"Cannot read {what}: {line}") from error
    finally:
        logging.set_verbosity(verbosity)


def _first_fault(file: Path, parse: bool = True) -> str | None:
    """Where a text file is not UTF-8 or, if it is to be parsed, not JSON; None where that cannot be told."""
    if _suffix(file) not in (*SUFFIXES, LINES) or _suffix(file) == ".parquet":
        return None
    offset = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode()
                if parse and _suffix(file) == ".jsonl" and text.strip():
                    json.loads(text)
            except UnicodeDecodeError as error:
                where = f"byte 0x{line[error.start]:02x} at offset {offset + error.start:,}, in line {number}"
                return f"{file} is not UTF-8: {where}. Save it as UTF-8."
            except json.JSONDecodeError as error:
                return f"{file}: line {number} is not JSON ({error.msg}, character {error.pos + 1})."
            offset += len(line)
    return None


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
