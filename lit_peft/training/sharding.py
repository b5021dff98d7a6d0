"""FSDP2: modules that Lightning's `ModelParallelStrategy` spreads over several devices."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_peft.core.sharded import in_shards, is_sharded
from lit_peft.training.averaging import is_a

_SHARDED = "_lit_peft_sharded"


def shard(module: pl.LightningModule) -> None:
    """Lets a LightningModule shard itself once, by `shard(mesh)`, when its adapters are attached.

    The strategy makes a mesh of devices and leaves the rest to the module. Gradients of parameters that are in no shard
    are those of one rank: adapters that are attached after sharding would differ from rank to rank, and so would all of
    a module that shards nothing.

    Raises:
        ValueError: In a fit on several devices, when what trains is in no shard; where weights are averaged.
    """
    mesh: Any = getattr(module, "device_mesh", None)
    own: Any = getattr(module, "shard", None)
    if mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule

    if own is not None and not module.__dict__.get(_SHARDED):
        own(mesh)
        module.__dict__[_SHARDED] = True
    if module.trainer.state.fn != "fit":
        return
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # a test before leaves the outermost one's weights gathered
    count, name = mesh["data_parallel"].size(), type(module).__name__
    apart = [key for key, p in module.named_parameters() if p.requires_grad and not in_shards(p)]
    if count > 1 and not is_sharded(module):
        raise ValueError(
            f"trainer.strategy: {name} is in no shards, so that every one of {count} devices would train adapters of "
            "its own. Give it a method shard(self, mesh), which runs once adapters are attached and may call "
            "lit_peft.training.sharding.shard_blocks(self.model, mesh), or take ddp."
        )
    if count > 1 and apart:
        more = f" and {len(apart) - 1} more" if apart[1:] else ""
        raise ValueError(
            f"trainer.strategy: {name}.shard leaves {apart[0]}{more} whole, which every one of {count} devices would "
            "train by its own rows: shard what holds it too."
        )
    averages = [c for c in module.trainer.callbacks if is_a(c, "WeightAveraging")]  # type: ignore[attr-defined]
    if averages and is_sharded(module):
        raise ValueError(
            f"{type(averages[0]).__name__} averages a copy of the module, in no shards: leave it out, or take ddp."
        )


def shard_blocks(model: nn.Module, mesh: Any) -> None:
    """Shards a model by `torch.distributed.fsdp.fully_shard`: each block of it, and what is left.

    Blocks are what stands in its outermost lists of modules, as the layers of a transformers model do.

    Args:
        model: The model, with its adapters: what a step calls, since its weights are gathered as it is called.
        mesh: The one that a `ModelParallelStrategy` makes.

    Raises:
        ValueError: When devices are left for tensor parallelism, as they are by default: each of these would train on
            the same rows; when torch cannot shard the weights of a quantised base.
    """
    from torch.distributed.fsdp import fully_shard

    if (count := mesh["tensor_parallel"].size()) > 1:
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size is {count}, and nothing here is parallel in that way: set it to "
            f"1, and data_parallel_size to the number of devices, {mesh.size()}."
        )
    for part in (*dict.fromkeys(_blocks(model)), model):
        try:
            fully_shard(part, mesh=mesh["data_parallel"])
        except RuntimeError as error:
            if not (why := _unshardable(part, error)):
                raise
            raise ValueError(f"trainer.strategy: {why}, or take ddp.") from error


def _unshardable(part: nn.Module, error: RuntimeError) -> str:
    """Why weights of a quantised base are not sharded, and what would be; empty where that is not the error."""
    named = dict(part.named_parameters())
    codes = [key for key, p in named.items() if not p.is_floating_point()]
    if codes and "require gradients" in str(error):  # torch 2.11, whose shards all require gradients at first
        return (
            f"torch {torch.__version__} shards no integers, as those of {codes[0]}. Take torch 2.12 or later, or in 4 "
            "bit storage_dtype: float32"
        )
    own = [key for key, p in named.items() if type(p.data) not in (torch.Tensor, nn.Parameter)]
    if own and isinstance(error, NotImplementedError):
        return f"torch shards no {type(named[own[0]].data).__name__}, as {own[0]} is. Take a base in nf4, fp4 or int8"
    return ""


def _blocks(module: nn.Module, within: bool = False) -> list[nn.Module]:
    """Modules in its outermost lists, and in lists and dicts in these."""
    is_list = isinstance(module, nn.ModuleList) or (within and isinstance(module, nn.ModuleDict))
    if within and not is_list:
        return [module]
    return [block for child in module.children() for block in _blocks(child, is_list)]


def write_one_file(strategy: Any) -> None:
    """Has a strategy that would write checkpoints in shards write them as one file, which a line says.

    Of shards torch reads all that a module has, and a checkpoint holds what trains alone.
    """
    if getattr(strategy, "_save_distributed_checkpoint", False):
        strategy._save_distributed_checkpoint = False
        rank_zero_info("Checkpoints hold what trains, and are written as one file, not in shards.")
