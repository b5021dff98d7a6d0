"""Tensors that may lie in shards on several ranks."""

from typing import Any

from torch import Tensor, nn


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered where it is sharded: a collective, so that every rank calls."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module lie in shards; FSDP2 gathers them where the module is called."""
    return any(hasattr(p, "full_tensor") for p in module.parameters())


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, equal on every rank, laid out as `like` is: the way back from `whole`."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
