"""Plans as a table, and for programs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lit_peft.planning.gpus import CONTEXT
from lit_peft.planning.plan import Plan

COLUMNS = ("base", "constants", "trains", "gradients", "optimizer", "activations", "peak")


def fits(plan: Plan, gpu: tuple[str, int] | None) -> bool | None:
    """Whether a plan fits a GPU, beside what CUDA itself takes; None where there is no GPU to fit."""
    return None if gpu is None else plan.peak + CONTEXT <= gpu[1]


def size(n: int) -> str:
    """Bytes as GiB, or MiB where that says more."""
    if not n:
        return "0"
    return f"{n / 2**30:.2f} GiB" if n >= 1 << 30 else f"{n / 2**20:,.1f} MiB"


def table(plans: Sequence[Plan], title: str, gpu: tuple[str, int] | None) -> Group:
    """One row a plan, the chosen one first; below, what the figures mean.

    Args:
        plans: The plans.
        title: What is planned: batch, precision, optimizer.
        gpu: Name and bytes of the GPU, None where none is known.
    """
    made = Table(show_edge=False, pad_edge=False)
    made.add_column("", overflow="fold")
    for column in COLUMNS:
        made.add_column(column, justify="right", no_wrap=True)
    if gpu is not None:
        made.add_column(f"fits {gpu[0]}", justify="right")
    for i, plan in enumerate(plans):
        parts = plan.parts() | {"trains": plan.adapters, "peak": plan.peak}
        verdict = [] if gpu is None else ["yes" if fits(plan, gpu) else "no"]
        made.add_row(plan.name, *(size(parts[c]) for c in COLUMNS), *verdict, style="bold" if i == 0 else "")
    lines = [
        "peak is what torch.cuda.max_memory_allocated will say, "
        f"{size(plans[0].workspaces)} of workspaces included; gradients and activations need not be at their most at "
        "once.",
        f"{size(CONTEXT)} more goes to CUDA itself" + (", which `fits` counts." if gpu else "."),
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
