"""What a run prints: the table of sites before training, the summary after it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import nn

from lit_peft.callbacks.storage import logical_numel, storage_lines
from lit_peft.core.layers import find_layer_ops
from lit_peft.core.registry import Adapter, registry
from lit_peft.core.targets import roles_of
from lit_peft.training.bringing import methods_of


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters of an adapted module.

    Attributes:
        trainable: All that train.
        adapter: Those of the additions, and base parameters that the method itself trains (biases).
        head: Those that `train_also` names.
        total: All, adapters included.
    """

    trainable: int
    adapter: int
    head: int
    total: int

    @property
    def share(self) -> float:
        """Trainable by total."""
        return self.trainable / self.total

    def metrics(self) -> dict[str, float]:
        """Under the keys of metrics.json."""
        return {
            "params/trainable": self.trainable,
            "params/adapter": self.adapter,
            "params/head": self.head,
            "params/total": self.total,
            "params/trainable_share": self.share,
        }


def count_parameters(module: nn.Module) -> ParameterCounts:
    """Counts what trains and what does not, by logical shape: a packed weight as the matrix that it stands for."""
    state = registry(module)
    heads = {name for adapter in state.adapters.values() for name in adapter.head} if state else set()
    trainable = head = total = 0
    packed = logical_numel(module)
    for name, parameter in module.named_parameters():
        total += packed.get(name, parameter.numel())
        if parameter.requires_grad:
            trainable += parameter.numel()
            head += parameter.numel() if name in heads else 0
    return ParameterCounts(trainable, trainable - head, head, total)


def sites_table(module: nn.Module) -> Group:
    """What trains, one row for each kind of adapted layer and of base parameter; like rows of all blocks are folded."""
    state = registry(module)
    assert state is not None
    table = Table(title="What trains", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("where", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    table.add_column("adapter", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    for adapter in state.training():
        label = f"{adapter.name}: " if len(state.active) > 1 else ""
        for (parent, shape, what), (leaves, count) in _rows(module, adapter).items():
            table.add_row(f"{_short(parent)}{' '.join(leaves)}", shape, label + what, f"{count:,}")
    counts = count_parameters(module)
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.requires_grad})
    line = (
        f"{counts.trainable:,} of {counts.total:,} parameters train ({counts.share:.2%}), in {', '.join(dtypes)}: "
        f"{counts.adapter:,} of the method, {counts.head:,} of the head."
    )
    decays = [adapter.spec.get("init_args", {}).get("layer_decay", 1.0) for adapter in state.training()]
    fall = [
        f"From block to block towards the embeddings, rates of base parameters fall by x {d:g}."
        for d in decays
        if d != 1
    ]
    fall += [f"Adapter {name} runs beside, frozen." for name in state.active if name in state.frozen]
    methods = methods_of(module) if hasattr(module, "_trainer") else []
    left_alone = {path: why for method in methods for path, why in method.left_alone.items()}
    stored = storage_lines(module, left_alone)
    return Group(
        table, *map(Text, [line, *stored, *fall, *(note for method in methods for note in method.notes(module))])
    )


Row = tuple[str, str, str]


def _rows(module: nn.Module, adapter: Adapter) -> dict[Row, tuple[dict[str, None], int]]:
    """(parent with its block numbers folded, shape, what is added) -> (names in it, parameters in all)."""
    rows: dict[Row, tuple[dict[str, None], int]] = {}

    def add(path: str, shape: Sequence[int], what: str, count: int) -> None:
        parent, _, leaf = re.sub(r"(?<=\.)\d+(?=\.)", "*", path).rpartition(".")
        key = (parent, " x ".join(map(str, shape)), what)
        leaves, total = rows.get(key, ({}, 0))
        rows[key] = ({**leaves, leaf: None}, total + count)

    for path in adapter.sites:
        layer: Any = module.get_submodule(path)
        addition = layer.peft[adapter.name]
        settings = ", ".join(f"{key} {_number(value)}" for key, value in addition.describe().items())
        ops = find_layer_ops(layer)
        roles = roles_of(path)
        fused = f" (holds {', '.join(roles)} together)" if len(roles) > 1 else ""
        count = sum(p.numel() for p in addition.parameters() if p.requires_grad)
        add(path, ops.size(layer) if ops is not None else (), settings + fused, count)
    for name in adapter.base:
        parameter = module.get_parameter(name)
        scale = f", rate x {adapter.scales[name]:g}" if name in adapter.scales else ""
        what = ("itself (head)" if name in adapter.head else "itself") + scale
        add(name, parameter.shape, what, parameter.numel())
    return rows


def _short(parent: str) -> str:
    """The last three parts of a path, which tell the layers of a model apart."""
    parts = parent.split(".") if parent else []
    return ("…" if len(parts) > 3 else "") + "".join(f"{part}." for part in parts[-3:])


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _written(value: float, digits: int) -> str:
    """With so many decimals; of a perplexity that says nothing, the magnitude."""
    return f"{value:,.{digits}f}" if value < 1e6 else f"{value:.1e}"


def summary_panel(title: str, metrics: Mapping[str, float | None], notes: Mapping[str, str]) -> Panel:
    """The summary after a run.

    Args:
        title: Method and run.
        metrics: What metrics.json holds.
        notes: Label -> where a file is, or why it is not there.
    """
    body = Table.grid(padding=(0, 2))
    for label, value in [*_figures(metrics), *notes.items()]:
        body.add_row(Text(label, style="dim"), Text(value, overflow="fold"))
    return Panel(body, title=title, title_align="left", expand=False)


_BESIDE_BASE = (
    ("test/perplexity", "test perplexity", 2),
    ("test/word_perplexity", "by word", 2),
    ("test/masked_perplexity", "masked perplexity", 2),
    ("test/pseudo_perplexity", "pseudo-perplexity", 2),
    ("test/acc", "test accuracy", 4),
)
"""Figures of a summary that stand beside what they were before training: their key, their name, and decimals."""


def _figures(metrics: Mapping[str, float | None]) -> list[tuple[str, str]]:
    def of(key: str) -> float | None:
        value = metrics.get(key)
        return None if value is None or value != value else value

    rows = []
    for key, label, digits in _BESIDE_BASE:
        if (value := of(key)) is not None:
            base = of(f"base/{key}")
            before = "" if base is None else f"   (before training {_written(base, digits)})"
            rows.append((label, f"{_written(value, digits)}{before}"))
    for key, label in (
        ("test/ece", "test ECE"),
        ("test/brier", "test Brier"),
        ("test/nll", "test NLL"),
        ("val/acc", "val accuracy"),
    ):
        if (value := of(key)) is not None:
            rows.append((label, f"{value:.4f}"))
    if not rows:
        rows = [(k, f"{v:.4f}") for k, v in metrics.items() if k.startswith(("val", "test")) and v is not None]
    if (share := of("params/trainable_share")) is not None:
        rows.append(
            (
                "trainable",
                f"{of('params/trainable') or 0:,.0f} of {of('params/total') or 0:,.0f} parameters, {share:.2%}",
            )
        )
    if (seconds := of("time/train_s")) is not None:
        speed = of("throughput/examples_per_s") or 0
        peak = (of("memory/peak_bytes") or 0) / 2**30
        planned = of("memory/predicted_bytes")
        beside = "" if planned is None else f" (planned {planned / 2**30:.2f})"
        rows.append(("training", f"{seconds:.1f} s, {speed:,.0f} examples/s, peak memory {peak:.2f} GiB{beside}"))
    return rows
