"""Data loaders that are exact: resumable in mid-epoch, equal over ranks, nothing evaluated twice."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_peft.data.long_texts import Truncation, encode_long

if TYPE_CHECKING:
    import datasets

POOL = 50  # batches sorted by length together: enough to waste little padding, few enough to keep the mix


class BucketBatchSampler(DistributedSampler[list[int]]):
    """Batches of rows of about equal length, in an order that follows from (seed, epoch) alone.

    An epoch is a random permutation, cut into pools of 50 batches; each pool is sorted by length and cut into
    batches, and the batches are shuffled. Under data parallelism the batches are global ones of
    `batch_size * num_replicas` rows, dealt out to the ranks one row at a time: so every rank takes the same
    number of steps with the same number of rows of about the same lengths, and the global batches do not
    depend on how many ranks share them. The at most `num_replicas - 1` rows that do not divide are left out,
    others each epoch.

    It is a `DistributedSampler` that yields lists, for a loader with `batch_size=None`: Lightning leaves such
    a loader as it is, whatever `use_distributed_sampler` says, and tells it the epoch through `set_epoch`.

    Args:
        lengths: Length of each row, in tokens.
        batch_size: Rows a batch on each rank. The last global batch cut may be smaller.
        num_replicas: Number of ranks.
        rank: This process's rank.
        seed: Seed of the order, not negative.

    Attributes:
        start: Number of batches to skip, set by the loader before each pass.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        if len(lengths) < num_replicas:
            raise ValueError(f"{len(lengths)} training examples cannot be shared by {num_replicas} ranks.")
        self.lengths = np.asarray(lengths)
        super().__init__(self.lengths, num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.start = 0

    def __len__(self) -> int:
        """Batches of a whole epoch on each rank, whatever `start` is."""
        return -(-(len(self.lengths) // self.num_replicas) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(len(self.lengths))
        order = order[: len(order) - len(order) % self.num_replicas]
        step = self.batch_size * self.num_replicas
        for begin in range(0, len(order), POOL * step):
            pool = order[begin : begin + POOL * step]  # a view
            pool[:] = pool[np.argsort(self.lengths[pool], kind="stable")]
        batches = [order[begin : begin + step] for begin in range(0, len(order), step)]
        for index in rng.permutation(len(batches))[self.start :]:
            yield batches[index][self.rank :: self.num_replicas].tolist()


class ResumableLoader(DataLoader):
    """A training loader that goes on, after a resume, with exactly the batches that were not trained.

    Where training stands is asked of `progress` when the first batch of a pass is wanted, not counted here: a
    checkpoint written inside a step (an exception, a preemption signal) then repeats that step's batch, and
    batches that workers have fetched ahead do not count. Nothing starts before that first batch, because
    Lightning calls `iter()` before it knows the epoch that it resumes in, and workers would already have
    fetched the order of epoch 0.

    Args:
        dataset: Indexed with lists of rows.
        sampler: A `BucketBatchSampler`.
        progress: Gives (epoch, batches of it that are done); `None`: whole passes, the epoch set on the
            sampler.
        kwargs: More arguments of `DataLoader`.
    """

    sampler: BucketBatchSampler

    def __init__(
        self,
        dataset: Any,
        *,
        sampler: BucketBatchSampler,
        progress: Callable[[], tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(dataset, batch_size=None, sampler=sampler, **kwargs)
        self.progress = progress

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch, self.sampler.start = self.progress() if self.progress else (self.sampler.epoch, 0)
        self.sampler.set_epoch(epoch)
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """What the order within an epoch depends on; the position itself is in the trainer's progress."""
        sampler = self.sampler
        return {
            "rows": len(sampler.lengths),
            "global_batch": sampler.batch_size * sampler.num_replicas,
            "seed": sampler.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Called on a resume in mid-epoch: warns where this epoch cannot go on as it would have."""
        changed = [
            f"{key} was {state.get(key)}, is {now}" for key, now in self.state_dict().items() if state.get(key) != now
        ]
        if changed:
            rank_zero_warn(
                f"Resuming in mid-epoch with other data settings ({'; '.join(changed)}): "
                "until the next epoch some examples will be seen twice or not at all."
            )


def bucketed_order(lengths: Sequence[int], chunk: int, seed: int) -> list[int]:
    """Rows by length, cut into chunks whose order is shuffled once for all.

    Batches then need little padding, and the first few of them are no sample of the shortest texts alone.

    Args:
        lengths: Tokens of each row.
        chunk: Rows that stay together.
        seed: Seed of the shuffle.

    Returns:
        Each row's index once.
    """
    rows = np.argsort(np.asarray(lengths), kind="stable")
    chunks = [rows[i : i + chunk] for i in range(0, len(rows), chunk)]
    # The chunk that is not full comes last: anywhere else it would shift all others across batches.
    order = sorted(np.random.default_rng(seed).permutation(len(chunks)), key=lambda i: len(chunks[i]) < chunk)
    return [int(row) for i in order for row in chunks[i]]


def evaluation_loader(
    dataset: Any, batch_size: int, num_replicas: int = 1, rank: int = 0, **kwargs: Any
) -> DataLoader[Any]:
    """A loader that shows each row of `dataset` once, on exactly one rank, in its order.

    Rank r takes rows r, r + num_replicas, ...: nothing is padded or repeated, so that counts and calibration
    are exact. Every rank takes the same number of steps, as sharded strategies, which communicate in every
    forward pass, demand. Where the ranks' shares would not allow that, the batch size is the next smaller one
    at which they do, or, for want of one, the next larger. The loader is built of parts that
    `Trainer.predict` knows how to rebuild.

    Args:
        dataset: Rows, with a length.
        batch_size: Rows a batch on each rank; but see above.
        num_replicas: Number of ranks.
        rank: This process's rank.
        kwargs: More arguments of `DataLoader`.

    Raises:
        ValueError: Fewer examples than ranks.
    """
    share, rest = divmod(len(dataset), num_replicas)
    if not share:
        raise ValueError(f"{len(dataset)} examples cannot be shared by {num_replicas} ranks: use fewer devices.")
    if rest:
        # `share` and `share + 1` rows take equally many steps unless the batch size divides `share`.
        sizes = itertools.chain(range(batch_size, 1, -1), itertools.count(max(batch_size + 1, 2)))
        batch_size = next(size for size in sizes if share % size)
    sampler = UnrepeatedDistributedSampler(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, **kwargs)


class ArrowRows(Dataset[pa.Table]):
    """Rows of a `datasets.Dataset`, fetched a batch at a time and left in Arrow's format.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: "datasets.Dataset") -> None:
        self.dataset = dataset.with_format("arrow")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int | list[int]) -> pa.Table:
        return self.dataset[index]

    __getitems__ = __getitem__  # what a loader with a batch size calls


def pad_batch(rows: pa.Table, *, padding: Mapping[str, int], max_length: int) -> dict[str, torch.Tensor]:
    """Stack tokenised rows, padded on the right to the longest of them, rounded up to a multiple of 8.

    Args:
        rows: A table with "length", and the columns of `padding`, lists of that length; maybe "labels". With
            "windows", lists of lengths, each row is a document, whose windows stand one behind the other.
        padding: Padding value of each list column.
        max_length: The width is not rounded beyond this.

    Returns:
        int64 tensors: each column of `padding`, (batch, width), and "labels", (batch,), where the rows have
        them. Of documents in windows the former are (windows, width), the windows of one document side by side,
        and "document", (windows,), counts from 0 which row of the table each is of.
    """
    lengths, batch = rows["length"].to_numpy(), {}
    if "windows" in rows.column_names:
        of_each = rows["windows"].combine_chunks()
        lengths = of_each.flatten().to_numpy()
        batch["document"] = torch.from_numpy(np.arange(len(rows)).repeat(of_each.value_lengths().to_numpy()))
    longest = int(lengths.max())
    width = max(longest, min(-(-longest // 8) * 8, max_length))
    inside = np.arange(width) < lengths[:, None]
    for name, value in padding.items():
        padded = np.full(inside.shape, value, dtype=np.int64)
        padded[inside] = rows[name].combine_chunks().flatten().to_numpy()
        batch[name] = torch.from_numpy(padded)
    if "labels" in rows.column_names:
        batch["labels"] = torch.from_numpy(rows["labels"].to_numpy().astype(np.int64))
    return batch


def tokenise(
    split: "datasets.Dataset",
    codes: np.ndarray,
    tokenizer: Any,
    *,
    columns: Sequence[str],
    inputs: Sequence[str],
    max_length: int,
    processes: int,
    desc: str,
    truncation: Truncation = "head",
    overlap: int | None = None,
) -> "datasets.Dataset":
    """What `pad_batch` takes, of the texts of a split; kept in the cache of `datasets`.

    Args:
        split: The rows.
        codes: Their labels' codes, (rows,); "labels" are left out where one is negative.
        tokenizer: A tokenizer of transformers.
        columns: One column of texts, or two for pairs.
        inputs: What to keep of what the tokenizer gives.
        max_length: Tokens that are kept of a text.
        processes: Processes to share the work.
        desc: What the progress bar says.
        truncation: Which tokens; of the two at the ends the tokenizer's `truncation_side` decides.
        overlap: None; else a text is kept whole, in windows of `max_length` that share so many tokens.

    Raises:
        ValueError: The tokenizer's own marks alone fill `max_length`, or an overlap all that they leave.
    """
    marks = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    if max_length < marks + len(columns):
        raise ValueError(
            f"data.max_length is {max_length}: of that {marks} are marks of the tokenizer, so that nothing of a text "
            f"is left; expected at least {marks + len(columns)}."
        )
    if overlap is not None and overlap >= max_length - marks:
        raise ValueError(
            f"data.window_overlap is {overlap}, expected less than {max_length - marks}, the tokens of a text that a "
            "window has room for."
        )
    return split.map(
        _encode,
        with_indices=True,
        batched=True,
        remove_columns=split.column_names,
        fn_kwargs={
            "codes": codes if (codes >= 0).all() else None,
            "tokenizer": tokenizer,
            "columns": list(columns),
            "inputs": list(inputs),
            "max_length": max_length,
            "truncation": truncation,
            "overlap": overlap,
        },
        num_proc=processes if processes > 1 else None,
        desc=desc,
    )


def _encode(
    batch: Mapping[str, list[Any]],
    rows: list[int],
    codes: np.ndarray | None,
    tokenizer: Any,
    columns: list[str],
    inputs: list[str],
    max_length: int,
    truncation: Truncation,
    overlap: int | None,
) -> dict[str, Any]:
    if overlap is None and truncation != "head+tail":
        tokens = tokenizer(*(batch[column] for column in columns), truncation=True, max_length=max_length)
        encoded = {name: tokens[name] for name in inputs} | {"length": [len(ids) for ids in tokens["input_ids"]]}
    else:
        encoded = encode_long(batch[columns[0]], tokenizer, inputs, max_length, overlap)
    return encoded if codes is None else encoded | {"labels": codes[rows]}
