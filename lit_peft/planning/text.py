"""Plans as a table, and for programs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lit_peft.planning.gpus import CONTEXT
from lit_peft.planning.plan import Plan

ROWS = ("base", "constants", "trains", "gradients", "optimizer", "activations", "peak")


def fits(plan: Plan, gpu: tuple[str, int] | None) -> bool | None:
    """Whether a plan fits a GPU, beside what CUDA itself takes; None where there is no GPU to fit."""
    return None if gpu is None else plan.peak + CONTEXT <= gpu[1]


def size(n: int) -> str:
    """Bytes in the unit that fits, in ten characters up to a thousand GiB."""
    units = ((1 << 30, "GiB", 2), (1 << 20, "MiB", 1), (1 << 10, "KiB", 1))
    unit, name, digits = next((u for u in units if n * 1024 >= 1000 * u[0]), units[-1])
    return f"{n / unit:,.{digits}f} {name}" if n else "0"


def table(plans: Sequence[Plan], title: str, gpu: tuple[str, int] | None) -> Group:
    """One column a plan, the chosen one first, so that 80 characters do; below, what the figures mean.

    Args:
        plans: The plans.
        title: What is planned: batch, precision, optimizer.
        gpu: Name and bytes of the GPU, None where none is known.
    """
    made = Table(show_edge=False, pad_edge=False)
    made.add_column("", no_wrap=True)
    parts = [plan.parts() | {"trains": plan.adapters, "peak": plan.peak} for plan in plans]
    sizes = [[size(of[row]) for row in ROWS] for of in parts]
    for i, plan in enumerate(plans):
        name, style = Text(plan.name.replace(", ", ",\n")), "bold" if i == 0 else ""  # a name folds, sizes do not
        made.add_column(name, justify="right", overflow="fold", min_width=max(map(len, sizes[i])), style=style)
    for row, *found in zip(ROWS, *sizes, strict=True):
        made.add_row(row, *found, end_section=gpu is not None and row == ROWS[-1])
    if gpu is not None:
        made.add_row("fits", *("yes" if fits(plan, gpu) else "no" for plan in plans))
    lines = [
        "peak is what torch.cuda.max_memory_allocated will say, "
        f"{size(plans[0].workspaces)} of workspaces included; gradients and activations need not be at their most at "
        "once.",
        f"{size(CONTEXT)} more goes to CUDA itself"
        + (f", which `fits` counts: whether it fits {gpu[0]}, {size(gpu[1])}." if gpu else "."),
    ]
    if gpu is None:
        lines.append("No GPU is here, and none was named: --gpu H100, or --gpu 24GiB.")
    lines += [f"{plan.name}: {size(plan.host)} of optimizer state can leave the GPU." for plan in plans if plan.host]
    lines += list(dict.fromkeys(note for plan in plans for note in plan.notes))
    return Group(Text(title), Text(), made, Text(), *map(Text, lines))


def as_json(plans: Sequence[Plan], about: dict[str, Any], gpu: tuple[str, int] | None) -> dict[str, Any]:
    """The same for programs; sizes in bytes."""
    named = None if gpu is None else {"name": gpu[0], "bytes": gpu[1], "context_bytes": CONTEXT}
    return {**about, "gpu": named, "plans": [plan.as_dict() | {"fits": fits(plan, gpu)} for plan in plans]}
