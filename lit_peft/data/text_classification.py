"""Text classification from a hub data set, local files, or the bundled demo."""

import os
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
from datasets import Dataset
from torch import cuda
from torch.utils.data import DataLoader

from lit_peft import hub
from lit_peft.data.loaders import (
    ArrowRows,
    BucketBatchSampler,
    ResumableLoader,
    bucketed_order,
    evaluation_loader,
    pad_batch,
)
from lit_peft.data.splits import (
    check_labels,
    check_text,
    encode_labels,
    label_codes,
    load_splits,
    nearest,
    stratified_subset,
)

STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
ROWS_PER_PROCESS = 25_000  # fewer, and starting a process costs more than it saves


class TextClassificationDataModule(pl.LightningDataModule):
    """Texts, or pairs of texts, with one label each.

    Batches are dicts of int64 tensors: `input_ids` and `attention_mask`, (batch, width), `token_type_ids`
    where the tokenizer has them, and `labels`, (batch,), where there are any; padded on the right to the
    longest text of the batch, rounded up to a multiple of 8. Training batches hold texts of about equal
    length, in an order that follows from `seed` and the epoch alone; a resumed run, also from a checkpoint
    written in mid-epoch, sees exactly the batches that were left. Evaluation shows each example once, on one
    rank, prediction in the order of the file. A label of -1, null or an empty text means that there is none, which only
    prediction allows.

    Args:
        path: `demo` for the bundled reviews; a file (csv, tsv, json, jsonl, parquet); a folder with one file
            a split; or a data set of the Hugging Face hub.
        name: Configuration of a hub data set that has several.
        text_column: Column of the text. The demo's text column goes by any name.
        label_column: Column of the label: class names, or whole numbers. The demo's goes by any name too.
        text_pair_column: Column of a second text, for tasks on pairs.
        tokenizer: Hub id or folder of the tokenizer; null: the model's `backbone`.
        max_length: Tokens after which a text is cut off; never more than the tokenizer's own limit.
        batch_size: Training examples a step on each device.
        eval_batch_size: Examples a step on each device in evaluation; null: twice `batch_size`.
        val_split: Split to validate on; null: cut from train.
        test_split: Split to test on; null: cut from train.
        predict_split: Split to predict; null: the test split, or the only one there is.
        val_fraction: Share of the train split cut off for validation, and for the test where `test_split` is
            null; labels keep their shares.
        limit_train: Train on this many examples, a random choice in which labels keep their shares; null:
            all.
        limit_val: Validate on this many, chosen likewise.
        limit_test: Test on this many, chosen likewise.
        num_workers: Processes that load batches; 0: the main process.
        num_proc: Processes that tokenise; null: one for every 25,000 texts, up to the number of cores.
        seed: Seed of the order, the cut and the subsets, not negative.

    Raises:
        ValueError: An argument out of range; while loading: a missing split or column, an empty split, an
            empty text, a label that is missing or unknown.
        FileNotFoundError: A local path that does not exist.
        ConnectionError: A hub data set or tokenizer that is neither in reach nor in the cache.
    """

    def __init__(
        self,
        path: str = hub.DEMO,
        name: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        text_pair_column: str | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        val_split: str | None = None,
        test_split: str | None = "test",
        predict_split: str | None = None,
        val_fraction: float = 0.1,
        limit_train: int | None = None,
        limit_val: int | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for argument, value, least in (
            ("max_length", max_length, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("limit_train", limit_train, 1),
            ("limit_val", limit_val, 1),
            ("limit_test", limit_test, 1),
            ("num_workers", num_workers, 0),
            ("num_proc", num_proc, 1),
            ("seed", seed, 0),
        ):
            if value is not None and value < least:
                raise ValueError(f"data.{argument} is {value}, expected at least {least}.")
        if not 0 < val_fraction < 0.5:
            raise ValueError(f"data.val_fraction is {val_fraction}, expected a share between 0 and 0.5.")
        self.save_hyperparameters()
        self.path = path
        self.name = name
        self.text_column = text_column
        self.label_column = label_column
        self.text_pair_column = text_pair_column
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.split_names = {"train": "train", "val": val_split, "test": test_split, "predict": predict_split}
        self.val_fraction = val_fraction
        self.limits = {"train": limit_train, "val": limit_val, "test": limit_test, "predict": None}
        self.num_workers = num_workers
        self.num_proc = num_proc
        self.seed = seed
        # By tokenizer, because a data module may serve models of several backbones.
        self._tokenizers: dict[str, Any] = {}
        self._tokenised: dict[tuple[str, str], Dataset] = {}

    def prepare_data(self) -> None:
        """Load and tokenise on one process a node; the others then find the result in the cache."""
        self.setup(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str | None = None) -> None:
        """Load what `stage` needs, once; without a stage, whatever is asked for later is loaded then."""
        for role in STAGES.get(stage or "", ()):
            self._encoded(role)

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of their codes; empty for data without labels."""
        return self._labels[1]

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

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, with a padding token."""
        name = self.tokenizer_name
        if name is None and self.trainer:
            name = getattr(self.trainer.lightning_module, "backbone", None)
        if name is None:
            raise ValueError(
                "data.tokenizer is null and the model has no `backbone` to take it from: set data.tokenizer."
            )
        if name not in self._tokenizers:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(hub.locate(name))
            if tokenizer.pad_token_id is None:  # decoders have none; any will do, the attention mask hides it
                tokenizer.pad_token = tokenizer.eos_token
            self._tokenizers[name] = tokenizer
        return self._tokenizers[name]

    def load(self) -> dict[str, Dataset]:
        """The splits as they come. For subclasses to override; called once."""
        if self.path != hub.DEMO:
            return load_splits(self.path, self.name)
        from lit_peft.demo import reviews

        columns = {"sentence": self.text_column, "label": self.label_column}
        return {str(name): split.rename_columns(columns) for name, split in reviews().items()}

    def hold_out(self, split: Dataset, labels: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
        """Choose the rows to cut off train. For subclasses whose examples are not independent.

        Args:
            split: What is left of the train split.
            labels: Codes of its labels.
            size: Number of rows wanted.
            rng: Source of chance.

        Returns:
            Row numbers in rising order.
        """
        return stratified_subset(labels, size, rng)

    def train_dataloader(self) -> DataLoader[Any]:
        """Resumable loader of length-bucketed batches; see `BucketBatchSampler`."""
        # Lightning replaces the sampler to repeat the same batches: give it a loader of the ordinary kind.
        if self.trainer and self.trainer.overfit_batches:  # type: ignore[attr-defined]
            return self._evaluation_loader("train")
        dataset = self._encoded("train")
        sampler = BucketBatchSampler(dataset["length"][:], self.batch_size, seed=self.seed, **self._replicas())
        loader = ResumableLoader(ArrowRows(dataset), sampler=sampler, **self._loader_options())
        if self.trainer:
            loader.progress = partial(self._progress, loader)
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Loader of the validation examples, in batches of about equal length; see `evaluation_loader`."""
        return self._evaluation_loader("val", bucketed=True)

    def test_dataloader(self) -> DataLoader[Any]:
        """Loader of the test examples, likewise."""
        return self._evaluation_loader("test", bucketed=True)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Loader of the examples to predict, in the order of the file."""
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, role: str, bucketed: bool = False) -> DataLoader[Any]:
        size, dataset, replicas = self.eval_batch_size or 2 * self.batch_size, self._encoded(role), self._replicas()
        if bucketed:
            chunk = size * replicas.get("num_replicas", 1)
            dataset = dataset.select(bucketed_order(dataset["length"][:], chunk, self.seed))
        return evaluation_loader(ArrowRows(dataset), size, **replicas, **self._loader_options())

    def _replicas(self) -> Mapping[str, int]:
        return (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}

    def _loader_options(self) -> dict[str, Any]:
        return {
            "collate_fn": partial(pad_batch, padding=self._padding, max_length=self._longest),
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "pin_memory": cuda.is_available(),
        }

    def _progress(self, loader: ResumableLoader) -> tuple[int, int]:
        """Epoch and batches done, from the trainer's books; a pass outside of the fit loop is a whole one."""
        trainer = self.trainer
        assert trainer is not None
        # `ready` counts batches begun; when a pass starts, Lightning has set it to the number completed.
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return trainer.current_epoch, done if trainer.train_dataloader is loader else 0

    @property
    def _longest(self) -> int:
        return min(self.max_length, self.tokenizer.model_max_length)

    @property
    def _padding(self) -> dict[str, int]:
        """Padding value of each input."""
        tokenizer = self.tokenizer
        values = {
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
        }
        return {name: value for name, value in values.items() if name in tokenizer.model_input_names}

    @cached_property
    def _splits(self) -> dict[str, Dataset]:
        return self.load()

    def _split(self, name: str) -> Dataset:
        if name not in self._splits:
            raise ValueError(f"No split {name!r} in {self.path}; {nearest(name, self._splits)}")
        if not len(self._splits[name]):
            raise ValueError(f"There is nothing in {self._where(name)}.")
        return self._splits[name]

    def _where(self, split: str) -> str:
        return f"split {split!r} of {self.path}"

    def _check_texts(self, split: str) -> None:
        for column in filter(None, (self.text_column, self.text_pair_column)):
            check_text(self._split(split), column, self._where(split))

    @cached_property
    def _labels(self) -> tuple[dict[Any, int], list[str]]:
        """Code of each label value, and the names; train decides where it has labels."""
        for name in dict.fromkeys(("train", *self._splits)):
            if name in self._splits and self.label_column in self._splits[name].column_names:
                return label_codes(self._splits[name], self.label_column, self._where(name))
        return {}, []

    def _codes(self, split: str) -> np.ndarray:
        """Label codes of all rows of a split, -1 for none."""
        data = self._split(split)
        if self.label_column not in data.column_names:
            return np.full(len(data), -1)
        return encode_labels(data, self.label_column, self._labels[0], self._where(split))

    @cached_property
    def _cut(self) -> dict[str, np.ndarray]:
        """Rows of the train split for train, and for val and test where those have no split of their own."""
        self._check_texts("train")
        train, codes = self._split("train"), self._codes("train")
        check_labels(train, self.label_column, codes, self._where("train"))
        cut = {"train": np.arange(len(train))}
        for index, role in enumerate(("val", "test")):
            if self.split_names[role] is None:
                rows = cut["train"]
                rng = np.random.default_rng((self.seed, index))
                held = self.hold_out(
                    train.select(rows), codes[rows], max(1, round(self.val_fraction * len(train))), rng
                )
                cut |= {role: rows[held], "train": np.delete(rows, held)}
        return cut

    def _rows(self, role: str) -> tuple[str, np.ndarray]:
        """The split that `role` reads, and the rows of it."""
        name = self.split_names[role]
        if role == "predict" and name is None:
            if self.split_names["test"] in self._splits or len(self._splits) > 1:
                return self._rows("test")
            name = next(iter(self._splits))
        if name is None or role == "train":
            name, rows = "train", self._cut[role]
        else:
            rows = np.arange(len(self._split(name)))
        if limit := self.limits[role]:
            rng = np.random.default_rng((self.seed, 2 + list(self.limits).index(role)))
            rows = rows[stratified_subset(self._codes(name)[rows], limit, rng)]
        return name, rows

    def _encoded(self, role: str) -> Dataset:
        """Tokenised rows of "train", "val", "test" or "predict"."""
        key = role, self.tokenizer.name_or_path
        if key not in self._tokenised:
            self._tokenised[key] = self._tokenise(role)
        return self._tokenised[key]

    def _tokenise(self, role: str) -> Dataset:
        name, rows = self._rows(role)
        self._check_texts(name)
        split, where = self._split(name), self._where(name)
        codes = self._codes(name)[rows]
        if role != "predict":
            check_labels(split, self.label_column, codes, where)
        if role == "train" and self.num_labels < 2:
            raise ValueError(f"There is one class alone, {self.label_names[0]!r}, in {where}; expected two or more.")
        if len(rows) < len(split):
            split = split.select(rows)
        processes = self.num_proc or min(os.cpu_count() or 1, len(split) // ROWS_PER_PROCESS)
        return split.map(
            _encode,
            batched=True,
            remove_columns=split.column_names,
            fn_kwargs={
                "tokenizer": self.tokenizer,
                "columns": (self.text_column, self.text_pair_column),
                "inputs": list(self._padding),
                "max_length": self._longest,
                "label_column": self.label_column if (codes >= 0).all() else None,
                "label_codes": self._labels[0],
            },
            num_proc=processes if processes > 1 else None,
            desc=f"Tokenising {role}",
        )


def _encode(
    batch: Mapping[str, list[Any]],
    tokenizer: Any,
    columns: tuple[str, str | None],
    inputs: list[str],
    max_length: int,
    label_column: str | None,
    label_codes: Mapping[Any, int],
) -> dict[str, list[Any]]:
    text, pair = columns
    tokens = tokenizer(batch[text], batch[pair] if pair else None, truncation=True, max_length=max_length)
    encoded = {name: tokens[name] for name in inputs} | {"length": [len(ids) for ids in tokens["input_ids"]]}
    if label_column:
        encoded["labels"] = [label_codes[value] for value in batch[label_column]]
    return encoded
