"""The tables of a comparison, of records as comparison.py writes them."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Record = dict[str, Any]
"""name, method, rate, seed, sweep, metrics; with diverged, or error, or the curve of validation."""


class Column(NamedTuple):
    """A figure of the runs of one row: their mean with its deviation, or what `of` makes of them."""

    title: str
    key: str
    form: str = "{:,.0f}"
    factor: float = 1.0
    of: Callable[[list[float]], float] | None = statistics.median

    def cell(self, runs: Sequence[Record]) -> str:
        values = [self.factor * value for run in runs if (value := run["metrics"].get(self.key)) is not None]
        if not values:
            return ""
        if self.of is not None:
            return self.form.format(self.of(values))
        spread = f" ± {self.form.format(statistics.stdev(values))}" if len(values) > 1 else ""
        return self.form.format(statistics.mean(values)) + spread


COSTS = (
    Column("trainable", "params/trainable"),
    Column("share", "params/trainable_share", "{:.2%}"),
    Column("adapter kB", "adapter/bytes", factor=1e-3),
    Column("steps", "steps"),
    Column("ms a step", "time/step_ms", "{:.1f}"),
    Column("peak MiB", "memory/peak_bytes", factor=2**-20, of=max),
    Column("train s", "time/train_s"),
    Column("test s", "time/test_s", "{:.1f}"),
    Column("test MiB", "memory/test_peak_bytes", factor=2**-20, of=max),
)


def name_of(library: str, method: str, variant: str) -> str:
    """The first cell of a row."""
    return f"{library} {method}".strip() + (f", {variant}" if variant else "")


def told(record: Record) -> str:
    """A record in a few words."""
    how = "diverged" if record.get("diverged") else "failed" if "error" in record else None
    scores = [f"{k} {v:.4f}" for k, v in record["metrics"].items() if k.endswith("/nll") and k[:4] in ("val/", "test")]
    kind = "sweep" if record["sweep"] else f"seed {record['seed']}"
    return f"{record['name']} at {record['rate']:g}, {kind}: {how or ', '.join(scores)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, without columns in which nothing stands."""
    kept = [i for i, title in enumerate(head) if any(row[i] for row in rows)]
    lines = [[head[i] for i in kept], ["---"] * len(kept), *([row[i] for i in kept] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def sweep_table(records: Sequence[Record], select: str) -> str:
    """What every rate came to."""
    rows = []
    for method in dict.fromkeys(r["method"] for r in records if r["sweep"]):
        tried = [r for r in records if r["sweep"] and r["method"] == method]
        cells = []
        for r in sorted(tried, key=lambda r: r["rate"]):
            value = r["metrics"].get(select)
            cells.append(
                f"{r['rate']:g}: " + ("failed" if "error" in r else "diverged" if value is None else f"{value:.4f}")
            )
        rows.append([method, ", ".join(cells)])
    return table(["method", f"{select} at each rate"], rows) if rows else ""


def base_rows(records: Sequence[Record]) -> list[Record]:
    """What the base scores before training, as records: one for each way in which it is stored."""
    found: dict[str, Record] = {}
    for r in records:
        metrics = {k.removeprefix("base/"): v for k, v in r["metrics"].items() if k.startswith("base/")}
        if metrics:
            stored = r["metrics"].get("quantize")
            found.setdefault(f"base in {stored}" if stored else "base", {"metrics": metrics})
    return [{"name": name, **record} for name, record in found.items()]


def results_table(records: Sequence[Record], scores: Mapping[str, int]) -> str:
    """A row for the runs of each name and rate, that of the base before them."""
    columns = [Column(name.replace("_", " "), f"test/{name}", f"{{:.{n}f}}", of=None) for name, n in scores.items()]
    counted = [r for r in records if not r["sweep"] and r["metrics"]]
    rows = [[r["name"], "", "", *(c.cell([r]) for c in columns), *[""] * len(COSTS)] for r in base_rows(counted)]
    for name, rate in dict.fromkeys((r["name"], r["rate"]) for r in counted):
        runs = [r for r in counted if (r["name"], r["rate"]) == (name, rate)]
        rows.append([name, f"{rate:g}", str(len(runs)), *(c.cell(runs) for c in (*columns, *COSTS))])
    head = ["method", "rate", "seeds", *(c.title for c in (*columns, *COSTS))]
    return table(head, rows) if rows else ""


def curve_table(records: Sequence[Record], scores: Mapping[str, int]) -> str:
    """The validations of the first run of each name, by steps."""
    names = [name for name in scores if any(f"val/{name}" in point for r in records for point in r.get("curve", ()))]
    first = {r["name"]: r for r in reversed(records) if not r["sweep"] and r.get("curve")}
    rows = [
        [name, f"{point['step']:,}", *(f"{point.get(f'val/{s}', float('nan')):.{scores[s]}f}" for s in names)]
        for name, r in reversed(first.items())
        for point in r["curve"]
    ]
    return table(["method", "step", *(f"val {name.replace('_', ' ')}" for name in names)], rows) if rows else ""


def print_tables(scores: Mapping[str, int], select: str, records: Sequence[Record], curve: bool) -> None:
    """Prints all tables, what did not end well, and a line of JSON of the runs that count."""
    parts = [sweep_table(records, select), results_table(records, scores)]
    parts += [curve_table(records, scores)] if curve else []
    parts += ["\n".join(told(r) for r in records if "error" in r or r.get("diverged"))]
    print("\n\n".join(part for part in parts if part), end="\n\n")
    print(json.dumps({f"{r['name']}/{r['seed']}": r["metrics"] for r in records if not r["sweep"]}))
