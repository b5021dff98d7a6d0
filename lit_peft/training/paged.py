"""bitsandbytes' optimizers in a fit: state that checkpoints hold exactly, and that is paged again after a resume."""

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

NAMES = ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit")
"""Those of `bitsandbytes.optim` that the documentation offers."""
_STATE = "_lit_peft_state"
"""Where an optimizer keeps the state that has been paged; another one has been loaded since where it differs."""


def adopt(optimizer: Optimizer) -> None:
    """Prepares an optimizer of bitsandbytes for a fit; does nothing to any other.

    Paged state lies in memory that GPU and host share, in tensors that bitsandbytes marks as such. A mark that went
    into a checkpoint would have memory prefetched that is not shared, and what is restored is moved to the GPU, out of
    the shared memory: so marks are left out of what is saved, and what was restored is paged before the next step.

    One that pages its state keeps it in plain memory where there is no CUDA GPU to page from, with one warning: it
    computes the same, and its checkpoints resume on either.
    """
    bases = {f"{base.__module__}.{base.__qualname__}" for base in type(optimizer).__mro__}
    if "bitsandbytes.optim.optimizer.Optimizer8bit" not in bases or _STATE in optimizer.__dict__:
        return
    made: Any = optimizer
    made.__dict__[_STATE] = None
    made.register_state_dict_post_hook(_unmark)
    made.register_step_pre_hook(_page)
    if made.is_paged and not any(p.is_cuda for group in made.param_groups for p in group["params"]):
        made.is_paged = False
        name = type(made).__name__
        rank_zero_warn(
            f"{name} pages its state between a CUDA GPU and the host, and there is no such GPU here: it runs as "
            f"{name.removeprefix('Paged')}, all its state in memory."
        )


def _unmark(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, sharing memory, without the attributes that bitsandbytes has given them."""
    states = {
        index: {key: value.detach() if isinstance(value, Tensor) else value for key, value in state.items()}
        for index, state in state_dict["state"].items()
    }
    return state_dict | {"state": states}


def _page(optimizer: Any, *_: Any) -> None:
    """Pages what was restored since the last step; bitsandbytes itself pages only what it makes."""
    if optimizer.__dict__[_STATE] is optimizer.state:
        return
    for p, state in optimizer.state.items() if optimizer.is_paged else ():
        for key in ("state1", "state2"):
            if key in state and not getattr(state[key], "is_paged", False):
                like = p.detach().expand(state[key].shape)  # AdEMAMix keeps two averages in one tensor
                state[key] = optimizer.get_state_buffer(like, dtype=state[key].dtype).copy_(state[key])  # small: plain
    optimizer.__dict__[_STATE] = optimizer.state
