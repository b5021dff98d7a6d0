"""Text classification from a hub data set, local files, or the bundled demo."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from lit_peft import hub
from lit_peft.data.columns import MISSING, SHOWN, Labels, check_classes, check_text, given_texts, has_labels
from lit_peft.data.held_out import VERBS, HeldOutDataModule, check_least
from lit_peft.data.loaders import tokenise
from lit_peft.data.long_texts import TRUNCATIONS, Truncation
from lit_peft.data.splits import load_splits
from lit_peft.methods.checks import check_choice

ROWS_PER_PROCESS = 25_000  # fewer, and starting a process costs more than it saves


class TextClassificationDataModule(HeldOutDataModule):
    """Texts, or pairs of texts, with one label each.

    Batches are dicts of int64 tensors: `input_ids` and `attention_mask`, (batch, width), `token_type_ids`
    where the tokenizer has them, and `labels`, (batch,), where there are any; padded on the right to the
    longest text of the batch, rounded up to a multiple of 8. Training batches hold texts of about equal
    length, in an order that follows from `seed` and the epoch alone; a resumed run, also from a checkpoint
    written in mid-epoch, sees exactly the batches that were left. Evaluation shows each example once, on one
    rank, prediction in the order of the file. Null, an empty text, and -1 where train has no such class beside
    others, mean that there is no label, which only prediction allows; it never fails for a label. Spaces around a
    label do not count, upper and lower case do. Where the model knows its classes (`label_names`, also from a
    checkpoint), labels are encoded by their names: data to score may lack some of them, and order them in any way.

    With `windows`, evaluation and prediction see all of a text: one that is longer than `max_length` becomes several
    rows of a batch, which holds `eval_batch_size` texts all the same. `document`, (rows,), counts from 0 the text
    that each row is of, rows of one text side by side; `labels` stay one a text. `TextClassification` averages the
    probabilities of a text's windows, so that every metric counts each text once.

    Args:
        path: `demo` for the bundled reviews; a file (csv, tsv, json, jsonl, parquet), which is the split
            `train`; a folder with one file a split; or a data set of the Hugging Face hub.
        name: Configuration of a hub data set that has several.
        text_column: Column of the text. The demo's text column goes by any name.
        label_column: Column of the label: class names, whole numbers or booleans. The demo's goes by any name
            too.
        text_pair_column: Column of a second text, for tasks on pairs.
        tokenizer: Hub id or folder of the tokenizer; null: the model's `backbone`.
        max_length: Tokens that are kept of a text, the tokenizer's marks among them; never more than the tokenizer's
            own limit, or than the model has positions.
        truncation: Which tokens are kept of a longer text: head, tail, or head+tail, 128 of 510 at the head; see
            `lit_peft.data.long_texts`. Of pairs, only head.
        windows: In evaluation and prediction, read longer texts whole, in windows of `max_length`; training cuts
            them off as ever. Not of pairs.
        window_overlap: Tokens that a window shares with the one before; null: a quarter of those that it has room for,
            127 of 510.
        batch_size: Training examples a step on each device.
        eval_batch_size: Examples a step on each device in evaluation; null: twice `batch_size`.
        val_split: Split to validate on; null: `validation` where there is such a split with labels that is not
            `test_split`, else cut from train; cut: cut from train in any case.
        test_split: Split to test on; null: `test`, or cut from train, likewise; cut: as above.
        predict_split: Split to predict; null: the split to test on, else `test`, else the only one there is.
        val_fraction: Share of the train split that is cut off for validation, and again for the test; labels
            keep their shares.
        limit_train: Train on this many examples, a random choice in which labels keep their shares; null:
            all.
        limit_val: Validate on this many, chosen likewise.
        limit_test: Test on this many, chosen likewise.
        num_workers: Processes that load batches; 0: the main process.
        num_proc: Processes that tokenise; null: one for every 25,000 texts, up to the number of cores.
        seed: Seed of the order, the cut and the subsets, not negative.

    Raises:
        ValueError: An argument out of range; while loading: a file that is broken or empty, a missing split
            or column, an empty or endless text, a label that is missing or unknown, one class alone, or other
            classes than those of the model to be trained.
        FileNotFoundError: A local path that does not exist.
        ConnectionError: A hub data set or tokenizer that is neither in reach nor in the cache.
    """

    numbered: ClassVar[Sequence[str]] = ()
    """Names of the classes 0, 1, … of data that give these numbers alone; for subclasses that know them."""

    def __init__(
        self,
        path: str = hub.DEMO,
        name: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        text_pair_column: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        truncation: Truncation = "head",
        windows: bool = False,
        window_overlap: int | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        predict_split: str | None = None,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path,
            {"train": "train", "val": val_split, "test": test_split, "predict": predict_split},
            {"train": limit_train, "val": limit_val, "test": limit_test, "predict": None},
            val_fraction,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        check_least(1, max_length=max_length, num_proc=num_proc)
        check_least(0, window_overlap=window_overlap)
        if label_column in (text_column, text_pair_column):
            raise ValueError(f"data.label_column is {label_column!r}, which is the column of a text too.")
        if text_column == text_pair_column:
            raise ValueError(f"data.text_column and data.text_pair_column are both {text_column!r}.")
        check_choice("data.truncation", truncation, TRUNCATIONS)
        if text_pair_column is not None and (windows or truncation != "head"):
            given = "windows is true" if windows else f"truncation is {truncation!r}"
            raise ValueError(
                f"data.{given}, but data.text_pair_column is {text_pair_column!r}: of pairs the longer text is cut off "
                "at its end; expected truncation: head and windows: false."
            )
        self.save_hyperparameters()
        self.name = name
        self.text_column = text_column
        self.label_column = label_column
        self.text_pair_column = text_pair_column
        self.truncation: Truncation = truncation
        self.windows, self.window_overlap = windows, window_overlap
        self.num_proc = num_proc
        self._given: Dataset | None = None
        self._known: list[str] | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, with a padding token, that cuts texts off where `truncation` says."""
        tokenizer = super().tokenizer
        tokenizer.truncation_side = "left" if self.truncation == "tail" else "right"  # a merged model keeps it
        return tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Load what `stage` needs, with labels encoded by the classes of the trainer's model, where it knows them."""
        names = getattr(self.trainer.lightning_module if self.trainer else None, "label_names", None)
        before, self._known = self._known, None if names is None else list(names)
        own = self._own_labels.names if "_own_labels" in vars(self) else None
        if (self._known or own) != (before or own):
            self._forget()
        if stage == "fit" and self._known and {*self._own_labels.names} not in (set(), {*self._known}):
            here, there = (", ".join(names[:SHOWN]) for names in (self._own_labels.names, self._known))
            raise ValueError(f"The data's classes are {here}; this model's are {there}.")
        if stage in ("fit", "test") and not self._known:
            check_classes(self._own_labels.names, self._where(next(iter(self._splits))))
        super().setup(stage)
        if stage is not None:  # else the tokenizer may not be there yet, nor be asked for
            self._tell_limit("max_length", self.max_length, "texts")

    def check(self, role: str) -> None:
        """Raises ValueError for what would make the rows of a role unusable: a missing split, label, or text."""
        self._checked(role)

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of their codes, the model's where it knows them; empty for none at all."""
        return self._labels.names

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    @property
    def class_counts(self) -> list[int]:
        """Examples of each class in the whole train split, for class weights: cut and limits keep the shares.

        Empty for data without labels to train on.
        """
        if "train" not in self._splits:
            return []
        codes = self._codes("train")
        return np.bincount(codes[codes >= 0], minlength=self.num_labels).tolist()

    def describe(self, roles: Sequence[str] = ("train", "val", "test")) -> list[str]:
        """What a person should know before training: the classes, and where each role's rows come from.

        Args:
            roles: Out of "train", "val" and "test"; the classes are told with "train".

        Returns:
            Lines to print.
        """
        lines = []
        if "train" in roles and (names := self.label_names):
            counts = [f" ({count:,})" for count in self.class_counts] or [""] * len(names)
            codes = [str(code) if name == str(code) else f"{code} {name}" for code, name in enumerate(names)]
            shown = [code + count for code, count in zip(codes, counts, strict=True)][:SHOWN]
            rest = [f"{len(names) - SHOWN:,} more"] if len(names) > SHOWN else []
            lines.append(f"Classes: {', '.join(shown + rest)}")
        parts = []
        for role in roles:
            verb = VERBS[role]
            try:
                split, rows = self._rows(role, limited=False)
            except ValueError:  # an error of the stage that needs it
                parts.append(f"none to {verb}")
                continue
            limit = self.limits[role] or len(rows)
            count = f"{limit:,} of {len(rows):,}" if limit < len(rows) else f"{len(rows):,}"
            parts.append(f"{count} to {verb}{self._origin(role, split)}")
        return [*lines, f"Data: {', '.join(parts)}"]

    def use_texts(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> None:
        """Predict these texts, in this order, instead of a data set; `path` is then not read for prediction.

        Args:
            texts: The texts.
            pairs: The second text of each, where there is a `text_pair_column`.

        Raises:
            ValueError: There are no texts, or one is blank or too long; `pairs` is missing, is not expected, or is
                of another length.
        """
        self._given = given_texts(texts, pairs, self.text_column, self.text_pair_column)
        self._tokenised = {key: value for key, value in self._tokenised.items() if key[0] != "predict"}

    def load(self) -> dict[str, Dataset]:
        """The splits as they come. For subclasses to override; called once."""
        if self.path != hub.DEMO:
            return load_splits(self.path, self.name)
        from lit_peft.demo import reviews

        columns = {"sentence": self.text_column, "label": self.label_column}
        return {str(name): split.rename_columns(columns) for name, split in reviews().items()}

    @property
    def _text_columns(self) -> list[str]:
        return [self.text_column] + ([self.text_pair_column] if self.text_pair_column else [])

    @property
    def _columns(self) -> list[str]:
        return [*self._text_columns, self.label_column]

    def _scorable(self, split: str) -> bool:
        return has_labels(self._splits[split], self.label_column)

    def _train_codes(self) -> np.ndarray:
        self._check_texts("train", numbers=False)
        codes = self._codes("train")
        self._labels.check(self._split("train"), self.label_column, codes, self._where("train"))
        return codes

    def _check_texts(self, split: str, numbers: bool = True) -> None:
        for column, option in zip(self._text_columns, ("text_column", "text_pair_column"), strict=False):
            check_text(self._split(split), column, self._where(split), option=option, numbers=numbers)

    @property
    def _labels(self) -> Labels:
        """The classes by which labels are encoded."""
        own = self._own_labels
        return own if self._known in (None, own.names) else Labels(self._known or [], own.declared, "the model")

    @cached_property
    def _own_labels(self) -> Labels:
        return self._find_labels()

    def _find_labels(self) -> Labels:
        """The classes of the data themselves; train decides where it has labels."""
        numbers = {str(code) for code in range(len(self.numbered))}
        for name in dict.fromkeys(("train", *self._splits)):
            if name in self._splits and self.label_column in self._splits[name].column_names:
                labels = Labels.of(self._splits[name], self.label_column, self._where(name))
                if labels.names:
                    return Labels([*self.numbered], self.numbered) if numbers >= {*labels.names} else labels
        return Labels([])

    def _codes(self, split: str) -> np.ndarray:
        """Label codes of all rows of a split, negative for none."""
        data = self._split(split)
        if self.label_column not in data.column_names:
            return np.full(len(data), MISSING)
        return self._labels.encode(data, self.label_column)

    def _tokenise(self, role: str) -> Dataset:
        if role == "predict" and self._given is not None:
            split, codes = self._given, np.full(len(self._given), MISSING)
        else:
            split, codes = self._checked(role)
        return tokenise(
            split,
            codes,
            self.tokenizer,
            columns=self._text_columns,
            inputs=list(self._padding),
            max_length=self._longest,
            truncation=self.truncation,
            overlap=self._overlap if self.windows and role != "train" else None,
            processes=self.num_proc or min(os.cpu_count() or 1, len(split) // ROWS_PER_PROCESS),
            desc=f"Tokenising {role}",
        )

    @property
    def _overlap(self) -> int:
        room = self._longest - self.tokenizer.num_special_tokens_to_add()
        return room // 4 if self.window_overlap is None else self.window_overlap

    @property
    def _identity(self) -> dict[str, Any]:
        return super()._identity | {"truncation": self.truncation}

    def _checked(self, role: str) -> tuple[Dataset, np.ndarray]:
        """The rows of a role with the codes of their labels; prediction takes them without."""
        name, rows = self._rows(role)
        self._check_texts(name)
        split, where = self._split(name), self._where(name)
        try:
            codes = self._codes(name)
        except ValueError:
            if role != "predict":
                raise
            codes = np.full(len(split), MISSING)
        if role != "predict":
            self._labels.check(split, self.label_column, codes, where)
        if role == "train":
            check_classes([self.label_names[code] for code in np.unique(codes[rows])], where)
        return (split.select(rows) if len(rows) < len(split) else split), codes[rows]
