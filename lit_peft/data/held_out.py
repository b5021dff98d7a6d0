"""Which rows train, which are held out, and whether it is honest to score them.

A role ("train", "val", "test", "predict") reads a split of its own or rows that are cut off train. The checkpoints of a
fit hold a digest of its train split, what decides the cut (`CUT`), and a digest of the texts of each row that trained.
By these, and never by names of files, weights are scored on

- the data of their fit, a role cut from train: the same cut; other arguments of the cut are refused;
- the data of their fit, a split of its own: that split;
- other data that are one split alone: all of it, since nothing was held out of it;
- other data of several splits: as in a fit on them.

Rows with a text that trained are counted in a warning. More than `MOSTLY` of them are refused: a copy of what trained,
shuffled, cut or added to. The data of the fit itself, and a split that is named by an argument, are not.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lit_peft import hub
from lit_peft.data.base import TextDataModule
from lit_peft.data.columns import nearest
from lit_peft.data.splits import stratified_subset

CUT_SPLIT = "cut"
"""What names no split in `val_split` and `test_split`."""
CUT = ("rows", "content", "val_split", "test_split", "seed", "val_fraction")
"""What decides which rows of train are held out."""
MOSTLY = 0.5
"""Share of the rows, and of their different texts, that trained, above which other data are a copy. Both, because real
data repeat a few short texts."""
MOST_DIGESTS = 2**17
"""Digests of trained rows that a checkpoint holds, 1 MB: of more rows a sample, those of the smallest digests."""
VERBS = {"train": "train", "val": "validate", "test": "test"}


class HeldOutDataModule(TextDataModule):
    """Gives each role its rows; a subclass reads the splits and says which of their rows are of a kind.

    Args:
        path: Where the splits are from; known again by its content.
        splits: Role -> split that it was told to read; null: found, or cut from train; "cut": cut from train.
        limits: Role -> number of rows, or null.
        val_fraction: Share of train that is cut off for each role without a split of its own.
        options: Arguments of `TextDataModule`.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self,
        path: str,
        splits: Mapping[str, str | None],
        limits: Mapping[str, int | None],
        val_fraction: float,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path = path
        self.split_names = dict(splits)
        self.limits = dict(limits)
        self.val_fraction = val_fraction
        check_least(1, batch_size=self.batch_size, eval_batch_size=self.eval_batch_size)
        check_least(1, **{f"limit_{role}": limit for role, limit in limits.items()})
        check_least(0, num_workers=self.num_workers, seed=self.seed)
        if not path:
            raise ValueError(
                "data.path is empty: give --data.path FILE (csv, tsv, json, jsonl or parquet), or a folder."
            )
        if not 0 < val_fraction < 0.5:
            raise ValueError(f"data.val_fraction is {val_fraction}, expected a share between 0 and 0.5.")
        self._history: Mapping[str, Any] | None = None
        self._named = False
        self._fitted = False

    # ------------------------------------------------------------------------------------- of a subclass

    def load(self) -> dict[str, Dataset]:
        """The splits as they come; called once."""
        raise NotImplementedError

    def hold_out(self, split: Dataset, labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Choose the rows to cut off train. For subclasses whose examples are not independent.

        Args:
            split: What is left of the train split.
            labels: What `_train_codes` gives for it.
            size: Number of rows wanted.
            rng: Source of chance.

        Returns:
            Row numbers in rising order.
        """
        return stratified_subset(labels, size, rng)

    @property
    def _text_columns(self) -> list[str]:
        """Columns of the text, or of both texts."""
        raise NotImplementedError

    @property
    def _columns(self) -> list[str]:
        """All columns that are read."""
        return self._text_columns

    def _scorable(self, split: str) -> bool:
        """Whether a split that no argument names has what scoring needs."""
        raise NotImplementedError

    def _codes(self, split: str) -> np.ndarray:
        """Which rows of a split are of a kind, whose share a choice of rows keeps: a number for each, (rows,)."""
        raise NotImplementedError

    def _train_codes(self) -> np.ndarray:
        """`_codes` of the train split, after a check that its rows can be trained on."""
        raise NotImplementedError

    def _digests(self, split: str, rows: np.ndarray) -> np.ndarray:
        """By what rows of a split are known again in other data; see `digests`."""
        return digests(self._split(split).select(rows), self._text_columns)

    # --------------------------------------------------------------------------------- the rows of a role

    def remember(self, history: Mapping[str, Any] | None, named: bool = False) -> None:
        """Says what the weights to score were trained on. `Trainer.test` and `validate` say it for their checkpoint.

        Args:
            history: What `state_dict` gave in their fit; empty where that is not known: then data that are one split
                alone are scored whole, and nothing is looked up; None: nothing is scored but by the fit itself.
            named: Whether the splits that arguments name are meant for these data. Those that the configuration of a
                fit names need not be there in other data that are one split alone.
        """
        before, self._history, self._named = vars(self).pop("_sources", None), history, named
        if before is not None and self._sources != before:
            self._forget()

    def setup(self, stage: str | None = None) -> None:
        if stage == "fit":
            self._fitted = True
            self.remember(None)
            self._rows("val", limited=False)  # a missing split is told before the train split is tokenised
            if (name := self._sources["val"]) is not None and name == self._sources["test"]:
                self._warn_once(
                    f"data.val_split and data.test_split are both {name!r}: a test on the rows by which the best "
                    "weights are chosen says too much of them."
                )
        super().setup(stage)

    def _forget(self) -> None:
        """Drops what depends on the codes of labels and on the splits of roles, to be found anew."""
        for name in ("_sources", "_cut", "_trained"):
            vars(self).pop(name, None)
        self._tokenised.clear()

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        return self.load()

    def _split(self, name: str) -> Dataset:
        if name not in self._splits:
            role = next((role for role in ("val", "test") if self.split_names[role] == name), None)
            chosen = f" (--data.{role}_split; {CUT_SPLIT}: rows of train)" if role else ""
            raise ValueError(f"No split {name!r} in {self.path}{chosen}; {nearest(name, self._splits)}")
        if not len(self._splits[name]):
            raise ValueError(f"There is nothing in {self._where(name)}.")
        return self._splits[name]

    def _where(self, split: str) -> str:
        return f"split {split!r} of {self.path}"

    def _origin(self, role: str, split: str) -> str:
        """Where the rows of a role are from, in brackets, where that is worth telling."""
        if split != "train":
            return f" (split {split})"
        return " (cut from train)" if self._sources[role] is None else ""

    @cached_property
    def _sources(self) -> dict[str, str | None]:
        """The split that each role reads; None: cut from train."""
        sources: dict[str, str | None] = {"train": "train"}
        alone = len(self._splits) == 1 and self._history is not None and not self._is_of_the_fit()
        for role, other, usual in (("val", "test", "validation"), ("test", "val", "test")):
            sources[role] = self.split_names[role]
            free = sources[role] is None and self.split_names[other] != usual
            if free and usual in self._splits and self._scorable(usual):
                sources[role] = usual
            if alone and not (self._named and self.split_names[role]):
                sources[role] = next(iter(self._splits))
        return {role: None if name == CUT_SPLIT else name for role, name in sources.items()}

    @cached_property
    def _cut(self) -> dict[str, np.ndarray]:
        """Rows of the train split for train, and for val and test where those have no split of their own."""
        train, codes = self._split("train"), self._train_codes()
        cut = {"train": np.arange(len(train))}
        for index, role in enumerate(("val", "test")):
            if self._sources[role] is None:
                rows = cut["train"]
                rng = np.random.default_rng((self.seed, index))
                held = self.hold_out(
                    train.select(rows), codes[rows], max(1, round(self.val_fraction * len(train))), rng
                )
                cut |= {role: rows[held], "train": np.delete(rows, held)}
        if not len(cut["train"]):
            raise ValueError(
                f"{len(train)} examples in {self._where('train')} are too few to cut some off: give more, or a folder "
                "with a file for each split."
            )
        return cut

    def _rows(self, role: str, limited: bool = True) -> tuple[str, np.ndarray]:
        """The split that `role` reads, and the rows of it, all or no more than its limit."""
        name = self.split_names["predict"] if role == "predict" else self._sources[role]
        if role == "predict" and name is None:
            if "test" in self._splits and self._sources["test"] is None:
                name = "test"
            elif len(self._splits) > 1 or self._sources["test"] in self._splits:
                return self._rows("test", limited)
            else:
                name = next(iter(self._splits))
        if name is None or role == "train":
            name, rows = "train", self._cut[role]
        else:
            rows = np.arange(len(self._split(name)))
        if limited and (limit := self.limits[role]):
            rng = np.random.default_rng((self.seed, 2 + list(self.limits).index(role)))
            rows = rows[stratified_subset(self._codes(name)[rows], limit, rng)]
        return name, rows

    # -------------------------------------------------------------------- what a checkpoint knows of the rows

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoints of a fit: what decides which rows of which data train, and which rows these are."""
        if not self._fitted:
            return {}
        path = Path(self.path).expanduser()
        where = str(path.resolve()) if self.path != hub.DEMO and path.exists() else self.path
        return self._identity | {"path": where, "global_batch": self._global_batch, "trained": self._trained}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Holds what a trainer does with a checkpoint to the rows that it was trained on; see the module's docstring.

        Raises:
            ValueError: The data of a fit that resumes are others than those that it began with.
        """
        verb = self.trainer.state.fn if self.trainer else None
        if "content" not in state_dict:
            return
        if verb in ("validate", "test"):
            self.remember(state_dict, self._named)
        elif verb == "fit":
            check_identity(state_dict, self._identity, self._where("train"), "train")
            if (was := state_dict["global_batch"]) != self._global_batch:
                rank_zero_warn(
                    f"{self._global_batch} rows a step, and {was} when this run began: if it goes on within an epoch, "
                    "some rows of that one are seen twice or not at all."
                )

    def _is_of_the_fit(self) -> bool:
        history = self._history or {}
        return "train" in self._splits and history.get("content") == self._content

    def _evaluation_loader(self, role: str, bucketed: bool = False) -> DataLoader[Any]:
        if self._history and role in ("val", "test"):
            self._check_held_out(role, self._history)
        return super()._evaluation_loader(role, bucketed)

    def _check_held_out(self, role: str, history: Mapping[str, Any]) -> None:
        """Warns of rows to score that trained.

        Raises:
            ValueError: Most of them did; or they are cut from the train split of the fit, in another way than then.
        """
        source, own = self._sources[role], self._is_of_the_fit()
        if own and source is None:
            check_identity(history, self._identity, self._where("train"), role)
        split, rows = self._rows(role)
        trained = history["trained"].numpy()
        here = self._digests(split, rows)
        if sampled := len(trained) == MOST_DIGESTS:
            here = here[here <= trained[-1]]  # rows that would be in the sample if they had trained
        seen = np.isin(here, trained)
        if not seen.any():
            return
        sample = " (a sample)" if sampled else ""
        count = f"{seen.sum():,} of {len(here):,} rows to {VERBS[role]}{sample} have a text that"
        mostly = min(seen.mean(), np.isin(np.unique(here), trained).mean()) > MOSTLY
        # A fit ends with a test of its own data: texts that these repeat must not end it with an error.
        if mostly and not own and source != self.split_names[role]:
            raise ValueError(
                f"{count} this run was trained on: their score would say nothing of new texts. Give other rows, "
                f"--data.path FILE, or name the split, --data.{role}_split {split}, to score them all the same."
            )
        rank_zero_warn(f"{count} was trained on.")

    @cached_property
    def _trained(self) -> torch.Tensor:
        """Digests of the rows that train, sorted."""
        name, rows = self._rows("train")
        found = np.unique(self._digests(name, rows))
        return torch.from_numpy(found[:MOST_DIGESTS])

    @property
    def _identity(self) -> dict[str, Any]:
        cut = None in self._sources.values()
        return {
            "rows": len(self._split("train")),
            "content": self._content,
            "seed": self.seed,
            "val_fraction": self.val_fraction if cut else None,
            **{f"{role}_split": self._sources[role] or CUT_SPLIT for role in ("val", "test")},
            "limit_train": min(self.limits["train"] or len(self._cut["train"]), len(self._cut["train"])),
            "max_length": self.max_length,
            "tokenizer": vocabulary(self.tokenizer),
        }

    @property
    def _global_batch(self) -> int:
        return self.batch_size * self._replicas().get("num_replicas", 1)

    @cached_property
    def _content(self) -> str:
        train = self._split("train")
        return content(train, [column for column in self._columns if column in train.column_names])


def check_least(least: int, **arguments: int | None) -> None:
    """Raises ValueError for the first argument of the data that is less than `least`; null is not."""
    for argument, value in arguments.items():
        if value is not None and value < least:
            raise ValueError(f"data.{argument} is {value}, expected at least {least}.")


def content(split: Dataset, columns: Iterable[str]) -> str:
    """A digest of what some columns hold, row by row; files that hold the same have the same, wherever they lie."""
    digest = hashlib.sha256()
    for column in columns:
        for rows in split.select_columns([column]).with_format(None).iter(1000):
            digest.update(repr([str(value) for value in rows[column]]).encode())
    return digest.hexdigest()[:32]


def digests(split: Dataset, columns: Sequence[str]) -> np.ndarray:
    """64 bits of the texts of each row, as int64; neither case counts nor how much white space parts the words.

    Not of the label: a text is known to the model, whatever it is said to be. 32 bits would let 1 in 20 tests of 1,000
    rows find one of 200,000 trained rows that is not there.
    """
    found = bytearray()
    for rows in split.select_columns(list(columns)).with_format(None).iter(1000):
        for texts in zip(*(rows[column] for column in columns), strict=True):
            words = "\0".join(" ".join(text.casefold().split()) for text in texts)
            found += hashlib.blake2b(words.encode(), digest_size=8).digest()
    return np.frombuffer(bytes(found), "<i8").astype(np.int64)


def trained_data(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What the content of a checkpoint tells of the data of its fit, the `state_dict` of a module; empty if nothing."""
    states = (part for part in checkpoint.values() if isinstance(part, dict) and {"content", "trained"} <= part.keys())
    return next(states, {})


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

    def told(data: Mapping[str, Any], key: str) -> Any:  # which split of its own a role has may change
        return data[key] == CUT_SPLIT if key in ("val_split", "test_split") else data[key]

    key = next((key for key in keys if key in was and told(was, key) != told(now, key)), None)
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
