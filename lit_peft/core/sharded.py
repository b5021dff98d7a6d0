"""Tensors that may lie in shards on several ranks."""

from typing import Any

from torch import Tensor, nn


def in_shards(tensor: Any) -> bool:
    """Whether a tensor lies in shards, as a DTensor of torch's."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """The tensor itself, gathered where it is sharded: a collective, so that every rank calls."""
    return tensor.full_tensor() if in_shards(tensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters of a module lie in shards; FSDP2 gathers them where the module is called."""
    return any(map(in_shards, module.parameters()))


def check_unsharded(module: nn.Module, advice: str) -> None:
    """Raises ValueError, with the advice, where FSDP2 has made shards of a module or of one inside.

    It gives a sharded layer a class of its own, made from the one that carries adapters, so that these can neither be
    put on nor taken off any more.
    """
    for path, child in module.named_modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(child).__mro__):
            raise ValueError(f"{path or type(child).__name__} is sharded already: {advice}")


def sharded_like(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor, equal on every rank, laid out as `like` is: the way back from `whole`."""
    if not in_shards(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
