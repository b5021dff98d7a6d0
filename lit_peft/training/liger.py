"""Liger's kernels in a transformers model, in the place of what it computes with.

Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training". Norms, gated feed-forward layers, rotary
embeddings and, where a model computes its own loss, the last layer with it run as one kernel each. What they compute is
the same but for rounding; norms keep less for the backward pass, and the loss no logits.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from inspect import signature
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.kernels import on_gpu
from lit_peft.core.remake import note_inputs, remakable
from lit_peft.core.swap import BorrowsForward, Swapped, swap_class

_BOUND = ("forward", "extra_repr", "_get_name")
"""What Liger binds to a layer: what it computes, and how it is printed."""


def use_liger(model: nn.Module, device: torch.device | None = None) -> None:
    """Lets a transformers model run on Liger's kernels, in place, before or after adapters are attached.

    Liger binds forwards to instances, and replaces classes and functions of transformers. Here layers change their
    class instead, so that adapters stand around them whatever comes first, and models can be copied and pickled. Other
    models of the architecture are as before, on a GPU but for rotary embeddings. A head that is adapted, quantised or
    trains in another dtype makes the logits itself, since the fused loss reads its weight past all that.

    Args:
        model: The model.
        device: Where it will run, which need not be here: a plan is made anywhere; by default torch's accelerator.

    Raises:
        ValueError: When the package is missing, there is no GPU, or Liger does not know the architecture.
    """
    check_liger(device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as KNOWN

    architecture = getattr(getattr(model, "config", None), "model_type", None)
    if architecture not in KNOWN:
        raise ValueError(
            f"kernels: Liger has none for {architecture or type(model).__name__}; it knows {', '.join(sorted(KNOWN))}. "
            "Leave kernels out."
        )
    modeling = sys.modules[_home(type(model))]
    before = dict(vars(modeling))
    try:
        KNOWN[architecture](model=model, **_options(model, KNOWN[architecture]))
    finally:
        _give_back(modeling, before)
    for module in model.modules():
        _take_over(module)
    note_inputs(model)


def check_liger(device: torch.device) -> None:
    """Raises ValueError where Liger's package is missing, or a model would run on a CPU; before one is built."""
    if not is_installed():
        raise ValueError("kernels: liger needs a package that is not there: pip install 'lit-peft[liger]'.")
    if device.type == "cpu":
        raise ValueError("kernels: liger needs a GPU, and this model runs on a CPU; leave kernels out.")


def is_installed() -> bool:
    """Whether the package with the kernels is there."""
    return importlib.util.find_spec("liger_kernel") is not None


def _home(cls: type) -> str:
    """The module of transformers that Liger writes into; a model may be of a class of one's own that extends it."""
    return next(
        (base.__module__ for base in cls.__mro__ if base.__module__.startswith("transformers.")), cls.__module__
    )


def _options(model: Any, apply: Callable[..., None]) -> dict[str, bool]:
    """No loss in the place of torch's, for all that runs; and none where the model has no tokens to score."""
    losses = ["cross_entropy"]
    if model.get_output_embeddings() is None:
        losses.append("fused_linear_cross_entropy")
    return dict.fromkeys(set(losses) & signature(apply).parameters.keys(), False)


def _give_back(modeling: ModuleType, before: dict[str, Any]) -> None:
    """Leaves a module of transformers its classes, and functions that run Liger's kernel on a GPU alone."""
    for name, plain in before.items():
        new = getattr(modeling, name)
        if new is not plain:
            is_done = isinstance(plain, type) or hasattr(plain, "_lit_peft")
            setattr(modeling, name, plain if is_done else _on_gpu(new, plain))


def _on_gpu(kernel: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (kernel if on_gpu(x) else plain)(x, *args, **kwargs)

    run._lit_peft = True  # type: ignore[attr-defined]
    return run


class LigerModel(Swapped):
    """A model that computes its loss with Liger, unless something stands around its head, or is done to its weight."""

    borrowed: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.get_output_embeddings(), Swapped):  # type: ignore[attr-defined]
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.borrowed(self, *args, **kwargs)


def _swiglu(layer: Any, x: Tensor) -> Tensor:
    return _gated(layer, x, "LigerSiLUMulFunction")


def _geglu(layer: Any, x: Tensor) -> Tensor:
    return _gated(layer, x, "LigerGELUMulFunction")


_GATED = {"LigerSwiGLUMLP.forward": _swiglu, "LigerGEGLUMLP.forward": _geglu}
"""Forwards of Liger's that are written out here, so that an adapter of `down_proj` need not keep its input."""


def _gated(layer: Any, x: Tensor, product: str) -> Tensor:
    """`down(f(gate x) * up x)`, whose product can be made again from its factors, which it keeps."""
    multiply = getattr(importlib.import_module("liger_kernel.ops"), product).apply
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    return layer.down_proj(remakable(multiply(gate, up), multiply, gate, up))


def _take_over(module: nn.Module) -> None:
    """Makes what Liger has bound to an instance a matter of its class, behind all that is there."""
    own = module.__dict__
    bound = {key: own[key] for key in _BOUND if isinstance(own.get(key), MethodType)}
    if not any(method.__func__.__module__.startswith("liger_kernel.") for method in bound.values()):
        return
    for key in bound:
        del own[key]
    function = bound["forward"].__func__
    own["borrowed"] = _GATED.get(function.__qualname__, function)
    swap_class(module, LigerModel if hasattr(module, "get_output_embeddings") else BorrowsForward, innermost=True)
