"""From tokenised rows to loaders: what every data module of texts has."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import lightning.pytorch as pl
from datasets import Dataset
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
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

STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class TextDataModule(pl.LightningDataModule):
    """Loaders of texts; a subclass says in `_tokenise` which rows each role reads.

    Args:
        tokenizer: Hub id or folder of the tokenizer, or demo; null: the model's `backbone`. One with ids that the model
            does not have is refused, and one whose ids are other tokens to it is warned of.
        max_length: Tokens that are kept of a text; never more than the tokenizer's own limit, or the model's, which a
            warning says where it is less.
        batch_size: Training examples a step on each device.
        eval_batch_size: Examples a step on each device in evaluation; null: twice `batch_size`.
        num_workers: Processes that load batches; 0: the main process.
        seed: Seed of the order, not negative.
    """

    def __init__(
        self,
        tokenizer: str | None,
        max_length: int,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.tokenizer_name = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        # By tokenizer, and by the longest text, because a data module may serve models of several backbones.
        self._tokenizers: dict[str, Any] = {}
        self._tokenised: dict[tuple[str, str, int], Dataset] = {}
        self._told: set[str] = set()
        self._compared: set[tuple[str, Any]] = set()  # tokenizers with backbones

    def prepare_data(self) -> None:
        """Load and tokenise on one process a node; the others then find the result in the cache."""
        self.setup(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str | None = None) -> None:
        """Load what `stage` needs, once; without a stage, whatever is asked for later is loaded then."""
        for role in STAGES.get(stage or "", ()):
            self._encoded(role)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, with a padding token."""
        module: Any = self.trainer.lightning_module if self.trainer else None
        backbone = getattr(module, "backbone", None)
        name = backbone if self.tokenizer_name is None else self.tokenizer_name
        if name == hub.DEMO and backbone == hub.DEMO_DECODER:
            name = backbone  # the bundled encoder and decoder have one each
        if not isinstance(name, str):  # of a user's module it may be the network itself
            raise ValueError(
                "data.tokenizer is null and the model has no `backbone` to take it from: set data.tokenizer."
            )
        if name not in self._tokenizers:
            tokenizer = hub.load_tokenizer(name)
            if tokenizer.pad_token_id is None:  # decoders have none; any will do, the attention mask hides it
                tokenizer.pad_token = tokenizer.eos_token
            self._tokenizers[name] = tokenizer
        if hasattr(module, "check_tokenizer") and (name, backbone) not in self._compared:
            module.check_tokenizer(name, self._tokenizers[name])
            self._compared.add((name, backbone))
        return self._tokenizers[name]

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

    def _tell_limit(self, argument: str, asked: int | None, rows: str) -> None:
        """Warns where rows are shorter than an argument asks for."""
        if asked is not None and self._longest < asked:
            self._warn_once(
                f"data.{argument} is {asked:,}; {rows} have at most {self._longest:,} tokens, which is what the "
                "tokenizer or the model takes."
            )

    def _warn_once(self, message: str) -> None:
        """However often Lightning sets the module up."""
        if message not in self._told:
            rank_zero_warn(message)
        self._told.add(message)

    @property
    def _longest(self) -> int:
        """Tokens of the longest text that a model gets."""
        return min(self.max_length, self.tokenizer.model_max_length, self._positions or self.max_length)

    @property
    def _positions(self) -> int | None:
        """How many positions the model has, where it is a task of ours, which says so."""
        return getattr(self.trainer.lightning_module, "max_positions", None) if self.trainer else None

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

    def _encoded(self, role: str) -> Dataset:
        """Tokenised rows of "train", "val", "test" or "predict"."""
        key = role, self.tokenizer.name_or_path, self._longest
        if key not in self._tokenised:
            self._tokenised[key] = self._tokenise(role)
        return self._tokenised[key]

    def _tokenise(self, role: str) -> Dataset:
        """Rows for `pad_batch` of "train", "val", "test" or "predict"."""
        raise NotImplementedError
