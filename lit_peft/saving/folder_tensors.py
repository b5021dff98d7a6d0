"""The tensors of an adapter folder, each written into the place in a module that it belongs to."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_peft.core.records import CheckpointMismatch


def fill_additions(own: Mapping[str, Tensor | list[Tensor]], changes: Mapping[str, Tensor]) -> None:
    """Writes the tensors of a folder through the views that `to_hf_peft` gave.

    Raises:
        CheckpointMismatch: When one is missing, has no place or is of another shape or kind.
    """
    if not own:  # the LoRA that stands in for a method without additions
        changes = {key: tensor for key, tensor in changes.items() if tensor.any()}
    if set(own) != set(changes):
        missing, unknown = sorted(set(own) - set(changes)), sorted(set(changes) - set(own))
        raise CheckpointMismatch(
            f"The folder lacks {missing[0]}." if missing else f"The folder holds {unknown[0]}, which has no place here."
        )
    for key, views in own.items():
        parts = views if isinstance(views, list) else [views]
        width = sum(view.shape[-1] for view in parts)
        _check_fits(key, changes[key], parts[0], torch.Size((*parts[0].shape[:-1], width)))
        for view, tensor in zip(parts, changes[key].split([v.shape[-1] for v in parts], -1), strict=True):
            view.detach().copy_(tensor)


def fill_base(model: nn.Module, trains: list[str], base: Mapping[str, Tensor], moving: set[str]) -> None:
    """Writes what trains and the buffers that moved; what the folder holds besides must be in the base already.

    Args:
        model: The model.
        trains: Names of its parameters that train.
        base: Name -> tensor, of all that the folder holds of the base.
        moving: Names of its buffers that moved.

    Raises:
        CheckpointMismatch: When one is of another shape or kind, or the base holds other values.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trained = {id(parameters[name]) for name in trains}
    own: dict[str, Tensor] = parameters | dict(model.named_buffers())
    for name, tensor in base.items():
        _check_fits(name, tensor, own[name], own[name].shape)
    for name, tensor in base.items():
        if id(own[name]) in trained or name in moving:
            own[name].detach().copy_(tensor)
        elif not torch.equal(own[name].detach().cpu().to(torch.bfloat16), tensor.to(torch.bfloat16)):
            raise CheckpointMismatch(
                f"This adapter belongs to another base model: {name}, which it does not train, holds other values."
            )


def _check_fits(name: str, tensor: Tensor, place: Tensor, shape: torch.Size) -> None:
    if tensor.is_floating_point() != place.is_floating_point():
        raise CheckpointMismatch(f"{name} is of {tensor.dtype} in the folder and {place.dtype} in the module.")
    if tensor.shape != shape:
        raise CheckpointMismatch(
            f"{name} has shape {list(tensor.shape)} in the folder and {list(shape)} in the module."
        )
