"""The conformance matrix, methods by checks, as docs/conformance.md shows it."""

import inspect
import os
from collections import defaultdict
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from lit_peft.testing import LAYERS, MODELS, MethodConformance

DOCS = Path(__file__).parents[1] / "docs" / "conformance.md"
WRITES = os.environ.get("LIT_PEFT_WRITE_DOCS") == "1"
HEAD = """# Conformance

What every method must hold, and on how many shapes it was seen to. `make conformance` runs all of it, prints this page
and writes it; the tests fail where the page is old. A number counts the shapes on which the check passed, a letter says
why there are no more; a dash is a check that passed on none, for the reason given. What a check means is the docstring
of its function in [lit_peft/testing/conformance.py](../lit_peft/testing/conformance.py).

A method of your own takes the same suite, by a test file of six lines:
[write_a_method.md](write_a_method.md#the-conformance-suite).

Methods that merge pass it on three of these models in 4 bit (NF4) and in 8 (int8) too:
[tests/test_conformance_quantized.py](../tests/test_conformance_quantized.py).
"""
CHECKS = {name: check for name, check in vars(MethodConformance).items() if name.startswith("test_")}


def argument(check: str) -> str:
    """What a check runs on, of `MethodConformance.cases()`; "" if it runs once."""
    return next((p for p in inspect.signature(CHECKS[check]).parameters if p in ("model", "layer", "refused")), "")


def group(*arguments: str, slow: bool = False) -> list[str]:
    """The checks of a tier that run on one of these."""
    return [
        name for name, check in CHECKS.items() if argument(name) in arguments and slow == hasattr(check, "pytestmark")
    ]


# Heading -> its checks.
GROUPS = {
    f"{len(MODELS)} models: {', '.join(MODELS)}": group("model", "refused"),
    f"{len(LAYERS)} layer types: {', '.join(LAYERS)}": group("layer"),
    "Once a method, on the first of its models": group(""),
    "The slow tier": group("model", "", slow=True),
}


class Matrix:
    """A pytest plugin that collects what became of every check of every method, and renders it."""

    def __init__(self, suites: list[type[MethodConformance]]) -> None:
        self.suites = {suite.__name__: suite for suite in suites}
        self.passed: dict[tuple[str, str], int] = defaultdict(int)
        self.reasons: dict[tuple[str, str], list[str]] = defaultdict(list)

    def pytest_runtest_logreport(self, report: Any) -> None:
        suite, _, check = report.nodeid.partition("[")[0].rpartition("::")
        key = suite.rpartition("::")[2], check
        if report.skipped:
            why = getattr(report, "wasxfail", None) or report.longrepr[2]
            self.reasons[key].append(why.removeprefix("Skipped: "))
        elif report.passed and report.when == "call":
            self.passed[key] += 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if WRITES and DOCS.is_file():
            terminalreporter.write_line(DOCS.read_text())

    def check_docs(self) -> None:
        """Holds the page against each table that ran as a whole; writes it if asked for."""
        tables = [self.table(heading, checks) for heading, checks in GROUPS.items() if self.ran(checks)]
        if WRITES:
            assert len(tables) == len(GROUPS), "the page is written from a run of all checks that passes"
            DOCS.write_text("\n".join([HEAD, *tables]))
        page = DOCS.read_text() if DOCS.is_file() else ""
        assert all(part in page for part in [HEAD, *tables]), f"docs/{DOCS.name} is old: make conformance"

    def ran(self, checks: list[str]) -> bool:
        """Whether these came to an end, and well, for every method and on everything that it is for."""
        return all(
            self.passed[name, check] + len(self.reasons[name, check])
            == len(suite.cases().get(argument(check), ()) or "1")
            for name, suite in self.suites.items()
            for check in checks
        )

    def table(self, heading: str, checks: list[str]) -> str:
        """What these checks mean, a row a method, and the reasons."""
        letters: dict[str, str] = {}
        rows = []
        for name, suite in self.suites.items():
            cells = []
            for check in checks:
                whys = dict.fromkeys(self.reasons[name, check])
                marks = [letters.setdefault(why, ascii_lowercase[len(letters)]) for why in whys]
                cells.append(" ".join([str(self.passed[name, check] or "-"), *marks]))
            rows.append([f"`{title(suite)}`", *cells])
        names = [check.removeprefix("test_").replace("_", " ") for check in checks]
        meanings = [" ".join(str(CHECKS[check].__doc__).split()) for check in checks]
        parts = [
            [f"## {heading}"],
            [f"- **{name}**: {meaning}" for name, meaning in zip(names, meanings, strict=True)],
            [f"| {' | '.join(row)} |" for row in [["method", *names], ["---"] * (len(names) + 1), *rows]],
            [f"- {letter}: {why}" for why, letter in letters.items()],
        ]
        return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def title(suite: type[MethodConformance]) -> str:
    """The method with the arguments that are not its defaults."""
    method, plain = suite.method, type(suite.method)().arguments()
    changed = {name: value for name, value in method.arguments().items() if value != plain[name]}
    if isinstance(options := changed.get("quantize"), dict):  # of which every one is named
        changed["quantize"] = {name: value for name, value in options.items() if value != plain["quantize"].get(name)}
    return f"{type(method).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
