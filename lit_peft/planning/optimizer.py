"""The memory of an optimizer: asked of itself, by a step on fake tensors."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW, Optimizer

from lit_peft.planning.live import LiveBytes, allocated

MakeOptimizer = Callable[[Any], Optimizer]

_PAGED_FROM = 100_000
"""Values of a tensor from which bitsandbytes pages its state; smaller ones stay on the GPU."""


class OptimizerBytes(NamedTuple):
    """What an optimizer takes.

    Attributes:
        state: Bytes of its state on the GPU.
        host: Bytes of its state that may be paged out to the host, and that torch's allocator does not see.
        scratch: What a step takes beside its state while it runs.
    """

    state: int = 0
    host: int = 0
    scratch: int = 0


def optimizer_bytes(
    parameters: Sequence[nn.Parameter], make: MakeOptimizer | None, live: LiveBytes, fake: FakeTensorMode
) -> OptimizerBytes:
    """Memory of an optimizer from its first step on, which is made: torch's and bitsandbytes' run on fake tensors.

    Args:
        parameters: Fake parameters with gradients.
        make: Called with the parameters; null: AdamW.
        live: Counts what the step makes.
        fake: The mode of the parameters. The optimizer is built outside of it, since bitsandbytes keeps its tables
            for all that are built later.

    Raises:
        ValueError: For an optimizer whose step depends on values, or on a closure.
    """
    optimizer: Any = (make or AdamW)(list(parameters))
    for group in optimizer.param_groups:
        if "foreach" in group and group["foreach"] is None and not group.get("fused"):
            group["foreach"] = True  # torch's own choice on a GPU: all parameters at once
    live.restart()
    before = live.now
    try:
        with warnings.catch_warnings(), fake, live:
            warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
            optimizer.step()
    except (RuntimeError, TypeError) as error:  # there are no values to look at, and no closure to call
        raise ValueError(
            f"{type(optimizer).__name__} cannot make a step on tensors that have no values, so that its memory cannot "
            f"be told beforehand ({str(error).splitlines()[0]})."
        ) from error
    state = host = 0
    seen = set[int]()
    for p, tensors in optimizer.state.items():
        for key, tensor in tensors.items():
            if not isinstance(tensor, Tensor) or key == "step" or tensor.untyped_storage()._cdata in seen:
                continue
            seen.add(tensor.untyped_storage()._cdata)
            size = allocated(tensor.untyped_storage().nbytes())
            if getattr(optimizer, "is_paged", False) and p.numel() >= _PAGED_FROM and key in ("state1", "state2"):
                host += size
            else:
                state += size
    return OptimizerBytes(state, host, max(0, live.peak - before - state - host))


def remake(optimizer: Optimizer) -> MakeOptimizer:
    """What makes another optimizer of the same class and settings, over other parameters."""
    kind: Any = type(optimizer)
    known = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in optimizer.defaults.items() if key in known}
    return lambda params: kind(params, **settings)
