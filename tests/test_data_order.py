"""The order of the data: buckets, ranks, and a resume that sees exactly what was left."""

import collections
import contextlib
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from data_helpers import numbers_of, rows
from datasets import Dataset
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lit_peft.data import TextClassificationDataModule
from lit_peft.data.loaders import BucketBatchSampler, ResumableLoader, evaluation_loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*ckpt_path"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]
EXAMPLES, BATCH = 42, 4  # 11 batches an epoch, the smallest of 2 examples
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Data(TextClassificationDataModule):
    """Examples 0 to 41 for training, 100 to 114 for the rest."""

    def load(self) -> dict[str, Dataset]:
        held = Dataset.from_dict(rows(*range(100, 115)))
        return {"train": Dataset.from_dict(rows(*range(EXAMPLES))), "validation": held, "test": held}


class Recorder(pl.LightningModule):
    """A weight that depends on the order of all batches, and a list of them."""

    def __init__(self, backbone: str, fail_at: int = 0) -> None:
        super().__init__()
        self.backbone, self.fail_at = backbone, fail_at
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: dict[str, list[Any]] = collections.defaultdict(list)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        self.seen["train"].append((self.current_epoch, index, numbers_of(batch)))
        if len(self.seen["train"]) == self.fail_at:
            raise InterruptedError
        return self.weight * batch["input_ids"].float().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("loss", self.weight.detach())
        self.seen["val"].append(numbers_of(batch))

    def test_step(self, batch: Any, index: int) -> None:
        self.seen["test"].append(numbers_of(batch))

    def predict_step(self, batch: Any, index: int) -> list[int]:
        return numbers_of(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4, momentum=0.9)


class Kill(pl.Callback):
    """What a killed process looks like from outside: nothing is done after this batch."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
        if len(model.seen["train"]) == self.after:
            raise InterruptedError


def fit(
    backbone: str,
    *callbacks: pl.Callback,
    workers: int = 0,
    fail_at: int = 0,
    resume: Any = None,
    **options: Any,
) -> tuple[list[Any], float]:
    """Batches seen and the final weight, of a run that may be interrupted."""
    model = Recorder(backbone, fail_at)
    data = Data(batch_size=BATCH, num_workers=workers, seed=3)
    trainer = pl.Trainer(**{**QUIET, "max_epochs": 3, "callbacks": list(callbacks), **options})
    with contextlib.suppress(InterruptedError):
        trainer.fit(model, data, ckpt_path=resume)
    return model.seen["train"], model.weight.item()


# Resume

HALF_EPOCH = {"every_n_train_steps": 5}
LAST_BATCH = {"every_n_train_steps": 11}
EPOCH_END = {"every_n_epochs": 1, "save_on_train_epoch_end": True}
AFTER_VALIDATION = {"monitor": "loss"}
BY_STEPS = {"max_steps": 30, "max_epochs": None}


@pytest.mark.parametrize(
    "when, options, workers",
    [
        (HALF_EPOCH, {}, 0),
        (HALF_EPOCH, {}, 2),
        (HALF_EPOCH, BY_STEPS, 0),
        (HALF_EPOCH, {"accumulate_grad_batches": 2, "val_check_interval": 0.5}, 0),
        (LAST_BATCH, {}, 0),
        (LAST_BATCH, BY_STEPS, 0),
        (EPOCH_END, {}, 0),
        (EPOCH_END, {}, 2),
        (EPOCH_END, BY_STEPS, 0),
        (AFTER_VALIDATION, {}, 0),
        (AFTER_VALIDATION, {"val_check_interval": 4}, 0),
        (EPOCH_END, {"limit_train_batches": 7}, 0),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, tokenizer: str, when: dict[str, Any], options: dict[str, Any], workers: int
) -> None:
    whole, weight = fit(tokenizer, enable_checkpointing=False, workers=workers, **options)
    keep_all = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **when)
    killed, _ = fit(tokenizer, Kill(after=19), keep_all, workers=workers, **options)
    last = max(tmp_path.glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    progress = torch.load(last, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    done = progress["total"]["processed"]
    assert 7 <= done <= 19 and (when is not HALF_EPOCH or done % 11)
    resumed, resumed_weight = fit(tokenizer, enable_checkpointing=False, workers=workers, resume=last, **options)
    assert killed[:done] + resumed == whole
    assert resumed_weight == weight


def test_a_batch_that_was_interrupted_is_repeated(tmp_path: Path, tokenizer: str) -> None:
    whole, weight = fit(tokenizer, enable_checkpointing=False)
    killed, _ = fit(tokenizer, OnExceptionCheckpoint(tmp_path), fail_at=17)
    resumed, resumed_weight = fit(tokenizer, resume=tmp_path / "on_exception.ckpt", enable_checkpointing=False)
    assert killed[:-1] + resumed == whole and killed[-1] == resumed[0]
    assert resumed_weight == weight


def test_resuming_with_other_batches_warns() -> None:
    def loader(batch_size: int) -> ResumableLoader:
        return ResumableLoader(range(20), sampler=BucketBatchSampler(range(20), batch_size))

    with pytest.warns(UserWarning, match=r"other data settings \(global_batch was 4, is 5\)"):
        loader(5).load_state_dict(loader(4).state_dict())


def test_a_pass_beside_the_training_is_a_whole_one(tokenizer: str) -> None:
    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, model: Any, *_: Any) -> None:
            self.counts = [
                len(numbers_of(*trainer.datamodule.train_dataloader())),
                *getattr(self, "counts", []),
            ]

    look = Look()
    whole, _ = fit(tokenizer, enable_checkpointing=False, max_epochs=2)
    assert fit(tokenizer, look, enable_checkpointing=False, max_epochs=2)[0] == whole
    assert look.counts == [EXAMPLES] * 22


def test_overfit_batches_repeat(tokenizer: str) -> None:
    seen, _ = fit(tokenizer, enable_checkpointing=False, overfit_batches=2)
    assert [numbers for _, _, numbers in seen] == [[*range(8)], [*range(8, 16)]] * 3


# Ranks


@pytest.mark.parametrize("ranks, examples", [(1, 42), (2, 42), (3, 50), (4, 7), (2, 2)])
def test_ranks_share_an_epoch(ranks: int, examples: int) -> None:
    lengths = [1 + n * 7 % 12 for n in range(examples)]
    samplers = [BucketBatchSampler(lengths, 3, ranks, rank, seed=5) for rank in range(ranks)]
    for epoch in range(3):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        steps = list(zip(*samplers, strict=True))
        assert len(steps) == len(samplers[0]) == math.ceil(examples // ranks / 3)
        for step in steps:
            assert len({len(batch) for batch in step}) == 1 and len(step[0]) <= 3
        seen = [row for step in steps for batch in step for row in batch]
        assert len(seen) == len(set(seen)) == examples - examples % ranks


def test_the_order_follows_from_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BucketBatchSampler([1] * 40, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)


def test_global_batches_do_not_depend_on_the_ranks() -> None:
    lengths = [1 + n * 7 % 12 for n in range(40)]
    whole = [set(batch) for batch in BucketBatchSampler(lengths, 8)]
    halves = zip(*(BucketBatchSampler(lengths, 4, 2, rank) for rank in range(2)), strict=True)
    assert [set(first) | set(second) for first, second in halves] == whole


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_evaluation_shows_each_example_once_in_equal_steps(ranks: int, batch_size: int) -> None:
    for examples in range(ranks, 40):
        loaders = [evaluation_loader(range(examples), batch_size, ranks, rank) for rank in range(ranks)]
        batches = [[batch.tolist() for batch in loader] for loader in loaders]
        assert sorted(row for rank in batches for batch in rank for row in batch) == list(range(examples))
        assert len({len(rank) for rank in batches}) == 1
        largest = max(len(batch) for rank in batches for batch in rank)
        share = examples // ranks  # a larger batch only where no smaller one would give equal steps
        assert largest <= batch_size or all(share % size == 0 for size in range(1, batch_size + 1))


def test_more_ranks_than_examples() -> None:
    with pytest.raises(ValueError, match="1 training examples cannot be shared by 2 ranks"):
        BucketBatchSampler([5], 4, num_replicas=2)
    with pytest.raises(ValueError, match="1 examples cannot be shared by 2 ranks"):
        evaluation_loader(range(1), 4, num_replicas=2)
