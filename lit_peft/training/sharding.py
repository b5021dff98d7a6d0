"""FSDP2: modules that Lightning's `ModelParallelStrategy` spreads over several devices."""

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_peft.core.sharded import is_sharded

_SHARDED = "_lit_peft_sharded"


def shard(module: pl.LightningModule) -> None:
    """Lets a LightningModule shard itself, by `shard(mesh)`, once its adapters are attached; later calls do nothing.

    The strategy makes a mesh of devices and leaves the rest to the module. Gradients of parameters that are in no shard
    are those of one rank: adapters that are attached after sharding would differ from rank to rank, and so would all of
    a module that shards nothing.

    Raises:
        ValueError: On several devices, when nothing is sharded.
    """
    mesh: Any = getattr(module, "device_mesh", None)
    own: Any = getattr(module, "shard", None)
    if mesh is None or module.__dict__.get(_SHARDED):
        return
    if own is not None:
        own(mesh)
    if mesh.size() > 1 and not is_sharded(module):
        raise ValueError(
            f"trainer.strategy: {type(module).__name__} is in no shards, so that every one of {mesh.size()} devices "
            "would train adapters of its own. Give it a method shard(self, mesh), which runs once adapters are "
            "attached and may call lit_peft.training.sharding.shard_blocks(self, mesh), or take ddp."
        )
    module.__dict__[_SHARDED] = True


def shard_blocks(model: nn.Module, mesh: Any) -> None:
    """Shards a model by `torch.distributed.fsdp.fully_shard`: each block of it, and what is left.

    Blocks are what stands in its outermost lists of modules, as the layers of a transformers model do.

    Args:
        model: The model, with its adapters.
        mesh: The one that a `ModelParallelStrategy` makes.

    Raises:
        ValueError: When devices are left for tensor parallelism, as they are by default: each of these would train on
            the same rows.
    """
    from torch.distributed.fsdp import fully_shard

    if (count := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size is {count}, and nothing here is parallel in that way: set it to "
            f"1, and data_parallel_size to the number of devices, {mesh.size()}."
        )
    for part in (*_blocks(model), model):
        fully_shard(part, mesh=mesh["data_parallel"])


def _blocks(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [block for child in module.children() for block in _blocks(child)]


def write_one_file(strategy: Any) -> None:
    """Has a strategy that would write checkpoints in shards write them as one file, which a line says.

    Of shards torch reads all that a module has, and a checkpoint holds what trains alone.
    """
    if getattr(strategy, "_save_distributed_checkpoint", False):
        strategy._save_distributed_checkpoint = False
        rank_zero_info("Checkpoints hold what trains, and are written as one file, not in shards.")
