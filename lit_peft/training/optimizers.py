"""Guards on the optimizers of a fit: they hold what the methods train, all of it and nothing else."""

from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.optim import Optimizer

from lit_peft.core.registry import registry
from lit_peft.faults import TrainingFault
from lit_peft.training import rates
from lit_peft.training.paged import adopt

BUILT, BEGAN = "_lit_peft_built", "_lit_peft_began"
"""Where a module keeps the settings of its optimizers as they were built, and as they were when its run began."""


def check_optimizers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Drops frozen parameters from the optimizers and makes sure that each trainable one is in one of them.

    Users write `Adam(self.parameters())`; what is frozen would cost state and, on resume, break the restore.

    Raises:
        TrainingFault: When a parameter would never be optimised, as with an optimizer built before attaching, or is
            optimised although no method trains it.
        ValueError: When the methods ask for rates that the optimizers do not have.
    """
    held: set[int] = set()
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if p.requires_grad]  # in place: LBFGS has the list, too
            held.update(map(id, group["params"]))
        check_trained(module, optimizer)
    lost = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        raise TrainingFault(
            f"{len(lost)} trainable parameters are in no optimizer, {lost[0]} among them: the optimizer was built "
            "before the method was attached. Build it in configure_optimizers from self.parameters() (with "
            "LightningCLI: take an OptimizerCallable, auto_configure_optimizers=False)."
        )
    rates.check_rates(trainer, module)
    module.__dict__[BUILT] = rates.settings(trainer)
    check_began(module)


def check_trained(module: nn.Module, optimizer: Optimizer) -> None:
    """Refuses a parameter of the base that an optimizer would move and no method trains.

    Raises:
        TrainingFault: For what was unfrozen after attaching: no checkpoint would hold it.
    """
    state = registry(module)
    if state is None:
        return
    trained = {id(module.get_parameter(name)) for name in state.trainable_names()}
    held = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad} - trained
    stray = [name for name, p in module.named_parameters() if id(p) in held and ".peft." not in f".{name}"]
    if stray:
        raise TrainingFault(
            f"{len(stray)} parameters of the base are in an optimizer and require a gradient, {stray[0]} among them, "
            "and no method trains them: they would move, and no checkpoint would hold them. Name them in the method's "
            "train_also, or leave out what unfreezes them: requires_grad in configure_optimizers or a hook, a callback "
            "such as BackboneFinetuning."
        )


def shape_of(optimizer: Optimizer) -> tuple[int, ...]:
    """Sizes of an optimizer's groups: they change when parameters are added."""
    return tuple(len(group["params"]) for group in optimizer.param_groups)


def check_began(module: Any) -> None:
    """Compares the optimizers with those of the run that goes on, once both are known: which comes first depends."""
    built, began = module.__dict__.get(BUILT), module.__dict__.get(BEGAN)
    if built is not None and began is not None:
        rates.check_settings(began, built)


def begin(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Prepares the optimizers, and notes what they are built with, unless the run goes on; what a finder found, too."""
    for optimizer in trainer.optimizers:
        adopt(optimizer)
    if module.__dict__.get(BEGAN) is None:
        module.__dict__[BEGAN] = rates.settings(trainer) if rates.finds_rate(trainer) else module.__dict__.get(BUILT)
