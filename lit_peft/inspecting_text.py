"""How `lit-peft inspect` prints what it found."""

import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

WIDTH = 12
"""Of the column of labels."""


def as_text(found: Mapping[str, Any]) -> str:
    """Lines for what `lit_peft.inspecting.inspect` returns."""
    return "\n".join(_run(found) if found["kind"] == "run" else _file(found))


def _run(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['path']}: run"
    yield from _row("metrics", _scores(found.get("metrics")))
    for part in found["adapters"]:
        ((_, adapter),) = part["adapters"].items()
        what = adapter.get("peft_type") or adapter["method"]
        yield from _row(
            "adapter", f"{part['path']}: {what}, {adapter['parameters']:,} parameters, {part['bytes']:,} bytes"
        )
    if "checkpoint" in found:
        yield ""
        yield from _file(found["checkpoint"])
    elif not found["adapters"]:
        yield "It holds no checkpoint and no adapter."


def _file(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['path']}: {found['kind']}, {found['written_by']}, {found['bytes']:,} bytes"
    for name, adapter in found["adapters"].items():
        yield from _adapter(name, adapter, (found.get("weights") or {}).get(name))
    for label, key in (("trains too", "trained"), ("beside", "kept"), ("buffers", "buffers")):
        groups = found.get(key) or []
        yield from _row(label, *(_times(g["names"], g["count"], f"{_shape(g['shape'])} {g['dtype']}") for g in groups))
    base = found["base"]
    names = dict.fromkeys(filter(None, [base.get("backbone"), base.get("base_model_name_or_path")]))
    known = f"fingerprint {base['fingerprint']} of {base['tensors']} tensors" if "fingerprint" in base else None
    yield from _row("base", "; ".join(filter(None, [", ".join(names), known])))
    quantised = (f"{count} of these tensors: {storage}" for storage, count in base.get("quantized", {}).items())
    yield from _row("quantised", *quantised)
    yield from _row("labels", ", ".join(map(str, found.get("labels") or [])))
    yield from _row("metrics", _scores(found.get("metrics")))
    if found.get("step") is not None:
        epoch = f"epoch {found['epoch']}, " if found.get("epoch") is not None else ""
        state = "a fit can go on from it" if found["resumes"] else "weights alone, without the optimizer's state"
        yield from _row("trained", f"{epoch}{found['step']:,} steps; {state}")


def _adapter(name: str, adapter: Mapping[str, Any], weight: float | None) -> Iterator[str]:
    of = f"adapter {name!r}" + (f" at weight {weight:g}" if weight is not None else "")
    if "peft_type" in adapter:
        there = f"opens as {adapter['class_path']}" if "class_path" in adapter else "which no method here reads"
        yield from _row("method", f"{adapter['peft_type']} of HF PEFT, {there}")
    else:
        yield from _row("method", f"{adapter['method']} ({adapter['class_path']}), {of}")
    yield from _row("arguments", ", ".join(_arguments(adapter["arguments"])) or "all by default")
    yield from _row("default", ", ".join(_arguments(adapter["defaults"])))
    sites = adapter["sites"]
    shapes = [", ".join(f"{tensor} {_shape(shape)}" for tensor, shape in site["tensors"].items()) for site in sites]
    places = [_times(s["paths"] or "the model", s["count"], shape) for s, shape in zip(sites, shapes, strict=True)]
    yield from _row("sites", *places)
    dtypes = f", {', '.join(adapter['dtypes'])}" if adapter["dtypes"] else ""
    yield from _row("holds", f"{adapter['parameters']:,} parameters, {adapter['bytes']:,} bytes{dtypes}")
    if "zeros" in adapter:
        yield from _row("pruned", f"{adapter['zeros']:.1%} exact zeros")
    if "ranks_left" in adapter:
        of = f" of {adapter['ranks']}" if "ranks" in adapter else ""
        yield from _row("pruned", f"{adapter['ranks_left']}{of} ranks are left")


def _arguments(arguments: Mapping[str, Any]) -> Iterable[str]:
    return (f"{key}={json.dumps(value, default=str)}" for key, value in arguments.items())


def _scores(metrics: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key} {_number(value)}" for key, value in sorted((metrics or {}).items()))


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else json.dumps(value)


def _times(name: str, count: int, what: str) -> str:
    return f"{name}{f' x{count}' if count > 1 else ''}: {what}"


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _row(label: str, *lines: str) -> Iterator[str]:
    indent = " " * (WIDTH + 2)
    for number, line in enumerate(filter(None, lines)):
        first = f"  {label if not number else '':<{WIDTH}}"
        yield textwrap.fill(
            line, 120, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
