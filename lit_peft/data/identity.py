"""Which rows a run learns from: kept in its checkpoints, so that what was held out of them stays held out."""

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from datasets import Dataset

CUT = ("rows", "content", "val_split", "test_split", "seed", "val_fraction")
"""What decides which rows of train are held out."""


def content(split: Dataset, columns: Iterable[str]) -> str:
    """A digest of what some columns hold, row by row; files that hold the same have the same, wherever they lie."""
    digest = hashlib.sha256()
    for column in columns:
        for rows in split.select_columns([column]).with_format(None).iter(1000):
            digest.update(repr([str(value) for value in rows[column]]).encode())
    return digest.hexdigest()[:32]


@lru_cache(maxsize=4)  # asked at every writing of a checkpoint
def vocabulary(tokenizer: Any) -> str:
    """A digest of a tokenizer's words and their numbers."""
    return hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:32]


def check_identity(was: Mapping[str, Any], now: Mapping[str, Any], where: str, role: str) -> None:
    """Compares the data of a run with those that a checkpoint of it is now used with.

    Args:
        was: What the checkpoint recorded.
        now: The same of the data module.
        where: What the train split is called in messages.
        role: "train" in a fit that resumes, which goes on with what it began with; "val" or "test" for one that is cut
            from train, whose rows are then those that were not trained on.

    Raises:
        ValueError: For the first thing that differs.
    """
    keys = dict.fromkeys((*CUT, *(now if role == "train" else ())))
    key = next((key for key in keys if was.get(key, now[key]) != now[key]), None)
    if key is None:
        return
    if key == "rows":
        fault = f"{where} has {now[key]:,} rows, and had {was[key]:,} when this run was trained."
    elif key == "content":
        fault = f"{where} holds other rows than when this run was trained."
    elif key == "tokenizer":
        fault = "The tokenizer is another one than when this run was trained."
    else:
        fault = f"data.{key} is {now[key]!r}, and was {was[key]!r} when this run was trained."
    rest = (
        "A fit that resumes goes on with the data that it began with; lit_peft.load, in Python, begins one with others."
        if role == "train"
        else "Which rows had been held out of it can no longer be told: name a split to score, "
        f"--data.{role}_split NAME, or a file of its own, --data.path FILE."
    )
    raise ValueError(f"{fault} {rest}")
