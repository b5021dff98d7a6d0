"""How a transformer counts the positions of a text, and how many it has."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.active import Adapted
from lit_peft.core.swap import Swapped
from lit_peft.faults import TrainingFault

_TABLES = ("position_embeddings", "wpe", "embed_positions")


def position_table(stack: nn.Module) -> nn.Module | None:
    """The module that holds a stack's learned positions, None where it has none."""
    return next((m for path, m in stack.named_modules() if path.rpartition(".")[2] in _TABLES), None)


def position_room(stack: nn.Module) -> int | None:
    """How many positions a stack's table of learned ones has, None where it has no such table."""
    table = position_table(stack)
    if (rows := getattr(table, "num_embeddings", None)) is None:  # XGLM makes its positions as it needs them
        return None
    padding = getattr(table, "padding_idx", None)
    # RoBERTa counts from behind its padding, OPT and BART from the row that they call their offset.
    return rows - getattr(table, "offset", 0 if padding is None else padding + 1)


def text_room(stack: nn.Module) -> int | None:
    """How many of these are left for a text behind the virtual tokens that run; None where there is no such table."""
    room = position_room(stack)
    return None if room is None else room - positions_taken(stack)


def positions_taken(stack: nn.Module) -> int:
    """How many positions the virtual tokens that run in a stack take from a text."""
    adapted = (layer.peft for layer in stack.modules() if isinstance(layer, Adapted))
    return sum(getattr(peft[name], "takes", 0) for peft in adapted for name in peft.active)


def text_positions(x: Tensor, ids: Tensor | None, padding: int | None) -> Tensor:
    """The positions that a model itself would give a text, [1 or batch, length].

    Args:
        x: Anything of the text's length, [batch, length, ...].
        ids: Its tokens, where they are known.
        padding: RoBERTa's position of padding; it counts from behind it.
    """
    if padding is None or ids is None:
        return (torch.arange(x.shape[1], device=x.device) + (0 if padding is None else padding + 1))[None]
    real = ids.ne(padding).long()
    return real.cumsum(1) * real + padding


def check_room(stack: nn.Module, room: int | None, n: int, length: int, *, shared: bool = False) -> None:
    """Raises TrainingFault when a text and what stands before it need more positions than there are.

    Here and not in the look-up, which on a GPU would bring the process down. `shared`: whether both begin at the first.
    """
    if room is None or (max(n, length) if shared else n + length) <= room:
        return
    left = room if shared else room - n
    way_out = (
        f"cut texts off at {left} tokens (max_length; of blocks of tokens, block_size, or null for as many)"
        if left > 0
        else "set num_virtual_tokens to fewer"
    )
    raise TrainingFault(
        f"{n} virtual tokens and {length} of the text exceed the {room} positions of {type(stack).__name__}: {way_out}."
    )


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in their order."""
    own: Any = next(c for c in type(module).__mro__ if "forward" in vars(c) and not issubclass(c, Swapped))
    return tuple(inspect.signature(own.forward).parameters)[1:]
