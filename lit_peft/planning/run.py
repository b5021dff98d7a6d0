"""Plans of a configured run: its module without weights, its longest batch."""

import warnings
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lit_peft.core.weightless import without_weights
from lit_peft.planning.compare import plans
from lit_peft.planning.gpus import workspaces
from lit_peft.planning.optimizer import remake
from lit_peft.planning.plan import Plan
from lit_peft.training.bringing import methods
from lit_peft.training.liger import is_installed


def plan_run(
    trainer: Any, model: Any, data: Any, gpu: tuple[str, int] | None, others: bool = True, precision: str | None = None
) -> tuple[list[Plan], dict[str, Any]]:
    """Plans of a run, and what they are of.

    A task of ours, which can make a `sample` of a batch, is built without weights, and no data are read: a batch has
    `data.batch_size` texts of `data.max_length`, or of `data.block_size` where texts are cut into blocks, and no longer
    than the model takes. Another module is built as it builds itself, and the first batch of its training data is
    taken.

    Args:
        trainer: Says precision, accumulation and methods; it does not run.
        model: The module, not built yet.
        data: Its data module, or None.
        gpu: Name and bytes of the GPU.
        others: Whether to plan alternatives as well.
        precision: That of the run, where its trainer, on a CPU, has another; null: the trainer's.

    Raises:
        ValueError: When there is no method, another module or its data cannot be built without the trainer, or Liger
            does not know the model.
    """
    notes, precision = [], precision or str(trainer.precision)
    if getattr(model, "compiles", False):
        notes.append("The step is planned eager; compiled, fused operations keep less.")
    method, *more = methods(trainer)
    if more:
        notes.append(f"Of several methods {type(method).__name__} alone is planned.")
    name = next((name for name in ("block_size", "max_length") if hasattr(data, name)), None)
    ours = hasattr(model, "sample") and name is not None
    if ours:
        if getattr(model, "label_names", ()) is None:
            model.label_names = ["0", "1"]  # how many there are the data would tell, and a row of a head weighs little
        with without_weights():
            model.configure_model()
        if is_installed():
            model.use_kernels(torch.device("cuda"))
        elif model.kernels is not None:
            notes.append(
                "Liger's package is not here (pip install 'lit-peft[liger]'): planned without its kernels, which keep "
                "less, so that the figures are upper bounds."
            )
        assert name is not None
        limit, asked = f"data.{name}", getattr(data, name)
        length = most = data.max_length if asked is None else asked
        if asked is None and (room := model.text_room_beside([method])) is not None:
            length = min(most, room)
        batch = model.sample(data.batch_size, length)
        if (taken := _longest(batch).shape[-1]) < most:
            if asked is not None:
                notes.append(
                    f"{limit} is {asked:,}; texts have at most {taken:,} tokens, which is what the model takes."
                )
            limit = "the model"
    else:
        batch, limit = _first_batch(model, data), None
    make = getattr(model, "optimizer", None) if ours else _optimizer_of(model, notes)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*self.log.*")  # without a trainer there is nothing to log to
        found = plans(
            model,
            method,
            batch,
            optimizer=make if callable(make) else None,
            others=others,
            precision=precision,
            accumulates=trainer.accumulate_grad_batches > 1,
            workspaces=workspaces(gpu),
            notes=tuple(notes),
        )
    about = {
        "batch": list(_longest(batch).shape),
        "precision": precision,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "longest": ours,
        "limit": limit,
    }
    return found, about


def title(about: dict[str, Any]) -> str:
    """One line on what is planned."""
    shape = " x ".join(map(str, about["batch"]))
    which = f"the longest that {about['limit']} allows" if about["longest"] else "the first of the training data"
    return f"Memory of a training step on one GPU: a batch of {shape}, {which}, precision {about['precision']}"


def _longest(batch: Any) -> Tensor:
    """The largest tensor of a batch."""
    shapes = [t for t in torch.utils._pytree.tree_leaves(batch) if isinstance(t, Tensor)]
    return max(shapes, key=lambda t: t.ndim and t.numel())


def _first_batch(model: Any, data: Any) -> Any:
    """Builds a module of somebody's own; the first batch of its data."""
    where = "configure_model"
    try:
        for hook in ("setup", "configure_model"):
            where = f"{type(model).__name__}.{hook}"
            if is_overridden(hook, model):
                getattr(model, hook)(*(("fit",) if hook == "setup" else ()))
        owner = model if data is None else data
        where = f"{type(owner).__name__}.train_dataloader"
        if data is not None:
            data.prepare_data()
            data.setup("fit")
        return next(iter(owner.train_dataloader()))
    except Exception as error:
        raise ValueError(
            f"plan: {where} does not work without a trainer ({type(error).__name__}: {str(error).splitlines()[0]}). In "
            "Python, lit_peft.planning.plan(model, method, batch) takes a model and a batch as they are."
        ) from error


def _optimizer_of(model: Any, notes: list[str]) -> Any:
    """What makes the optimizer of a module of somebody's own, from other parameters than the module's."""
    try:
        made = model.configure_optimizers()
    except Exception:
        made = None
    while isinstance(made, dict | list | tuple) and made:
        made = made.get("optimizer") if isinstance(made, dict) else made[0]
    if not isinstance(made, torch.optim.Optimizer):
        notes.append("AdamW is planned: configure_optimizers does not tell its optimizer without a trainer.")
        return None
    return remake(made)
