"""Small fits of Lightning's trainer, in one process and on two ranks."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_peft.core.checkpoint import adapter_keys
from lit_peft.core.sharded import whole
from lit_peft.methods.base import Method
from lit_peft.testing.ranks import two_ranks
from lit_peft.testing.states import assert_same, snapshot
from lit_peft.testing.subjects import MODELS, Model
from lit_peft.training.sharding import shard_blocks


class Task(pl.LightningModule):
    """A LightningModule around a model, that brings its outputs to fixed values.

    Args:
        model: The model.
        rows: Which of its input rows are this process's.
    """

    def __init__(self, model: Model, rows: slice = slice(None)) -> None:
        super().__init__()
        self.model, self._run = model.build(), model.run
        self._inputs = {name: tensor[rows] for name, tensor in model.inputs().items()}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self._run(self.model, **self._inputs) - batch.mean()).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class ShardedTask(Task):
    """The same, sharded by FSDP2: each block, and the rest."""

    def shard(self, mesh: Any) -> None:
        """Runs once adapters are attached."""
        shard_blocks(self.model, mesh)


def loader() -> Any:
    """Three batches of numbers."""
    return DataLoader(torch.tensor([0.1, -0.2, 0.3]), batch_size=1)  # type: ignore[arg-type]


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    """A quiet trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **quiet | arguments)


def assert_resumes_exactly(methods: Sequence[Method], model: Model, folder: Path) -> None:
    """Holds a fit of four epochs against one that the second method resumes after two: equal bits.

    What is saved in between is what the method trains, and nothing else.
    """
    whole, again = Task(model), Task(model)
    before = snapshot(whole)
    keep = ModelCheckpoint(folder, "{epoch}", every_n_epochs=2, save_top_k=-1)
    trainer(methods[0], keep, max_epochs=4, enable_checkpointing=True).fit(whole, loader())
    saved = folder / "epoch=1.ckpt"
    assert torch.load(saved, weights_only=True)["state_dict"].keys() == adapter_keys(whole)
    trainer(methods[1], max_epochs=4).fit(again, loader(), ckpt_path=saved)
    after = snapshot(whole)
    assert_same(snapshot(again), after)
    assert any(not torch.equal(after[key], before.get(key, torch.zeros(0))) for key in adapter_keys(whole))


def assert_two_ranks_equal_one(method: Method, model: Model, *, sharded: bool) -> None:
    """Holds a fit on two ranks against one in this process at twice the batch: parameters within 1e-5 after 6 steps."""
    torch.manual_seed(0)  # as on the ranks
    task, alone = Task(model), copy.deepcopy(method)
    trainer(alone, max_epochs=2).fit(task, loader())
    first, second = two_ranks(fit_on_a_rank, method, model.name, sharded)
    assert_same(first, second)
    torch.testing.assert_close(first, trained(task), rtol=1e-5, atol=1e-5)


def fit_on_a_rank(rank: int, method: Method, model: str, sharded: bool) -> dict[str, Tensor]:
    """What trains after a fit on one of two ranks, which has every second row; by DDP, or sharded by FSDP2."""
    task = (ShardedTask if sharded else Task)(MODELS[model], slice(rank, None, 2))
    strategy = (
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        if sharded
        else DDPStrategy(process_group_backend="gloo")
    )
    arguments = {"devices": 2, "plugins": [TorchElasticEnvironment()], "use_distributed_sampler": False}
    trainer(method, max_epochs=2, strategy=strategy, **arguments).fit(task, loader())
    return trained(task)


def trained(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that train, whole ones where they are sharded."""
    named = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return {name: whole(p).clone() for name, p in named.items()}
