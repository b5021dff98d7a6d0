"""Tensors that may lie in shards on several ranks."""

from typing import Any

from torch import Tensor


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered where it is sharded: a collective, so that every rank calls."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, equal on every rank, laid out as `like` is: the way back from `whole`."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
