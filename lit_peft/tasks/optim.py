"""Optimizer groups and learning-rate schedules of the tasks."""

import math
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_peft.training.rates import param_groups

Schedule = Literal["linear", "cosine", "constant"]


def build_optimizer(
    module: nn.Module,
    optimizer: OptimizerCallable,
    lr: float,
    weight_decay: float,
    adapter_weight_decay: float,
) -> Optimizer:
    """Makes the optimizer from the parameters that train and from nothing else.

    Its groups are those of `lit_peft.param_groups`, split by weight decay: weights decay by `weight_decay`, tensors of
    adapters by `adapter_weight_decay`; vectors (biases, norms) never.

    Args:
        module: Holds the parameters; frozen ones are passed over.
        optimizer: Called with the list of groups.
        lr: Learning rate.
        weight_decay: Decay of base weights that train, a head or the whole model.
        adapter_weight_decay: Decay of adapter tensors.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    decayed: list[dict[str, Any]] = []
    for group in param_groups(module, lr):
        by_decay: dict[float, list[nn.Parameter]] = {}
        for p in group["params"]:
            decay = adapter_weight_decay if ".peft." in f".{names[id(p)]}" else weight_decay
            by_decay.setdefault(decay if p.ndim > 1 else 0.0, []).append(p)
        for decay, params in by_decay.items():
            part = {**group, "params": params, "weight_decay": decay}
            if "name" in group and len(by_decay) > 1 and decay == 0.0:
                part["name"] += "_no_decay"
            decayed.append(part)
    return optimizer(decayed)


def warmup_schedule(optimizer: Optimizer, kind: Schedule, steps: float, warmup: float) -> LambdaLR:
    """The rate as a share of its peak: up linearly over `warmup` of all steps, then down to zero, or constant.

    Args:
        optimizer: Its groups' rates are the peaks.
        kind: linear, cosine (half a wave) or constant after the warm-up.
        steps: Optimizer steps of the whole run; infinite only with constant.
        warmup: Share of the steps, 0 to 1.
    """
    if not math.isfinite(steps) and kind != "constant":
        raise ValueError(f"schedule {kind!r} needs an end: set trainer.max_epochs or max_steps, or use constant.")
    rising = math.ceil(warmup * steps) if math.isfinite(steps) else 0

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        if kind == "constant":
            return 1.0
        done = (step - rising) / max(1, steps - rising)
        return max(0.0, 1.0 - done) if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return LambdaLR(optimizer, share)
