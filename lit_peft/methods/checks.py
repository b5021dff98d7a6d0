"""Arguments of methods: what may stand in them, told by name, and patterns that give a value by site."""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from lit_peft.core.targets import Site


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, naming the argument and its choices, unless the value is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}.")


def check_number(name: str, value: Any) -> None:
    """Raises ValueError, naming the argument, unless the value is a number."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a number, not {value!r}.")


def check_rank(name: str, r: int, site: Site) -> None:
    """Raises ValueError, naming the argument and the layer, unless the layer's weight can have this rank."""
    if r > min(site.size):
        raise ValueError(
            f"{name} = {r} exceeds the smaller side of {site.path}, {site.out_features} x {site.in_features}."
        )


def check_positive(name: str, value: float) -> None:
    """Raises ValueError, naming the argument, unless the value is finite and above 0."""
    check_number(name, value)
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a number above 0, not {value}.")


def by_pattern(pattern: Mapping[str, Any], site: Site, default: Any) -> Any:
    """The value of a `rank_pattern` for a site: of the first role, name, glob or `re:` that means it."""
    return next((value for key, value in pattern.items() if site.answers_to(key)), default)


def longest_first(pattern: Mapping[str, Any]) -> dict[str, Any]:
    """A pattern of paths in an order that is safe: a path may end with another, and the first that matches counts."""
    return dict(sorted(pattern.items(), key=lambda item: -len(item[0])))


def check_pattern(name: str, pattern: Iterable[str], sites: Sequence[Site]) -> None:
    """Raises ValueError, naming the argument, for a key of a `rank_pattern` that means none of the sites."""
    for key in pattern:
        if not any(site.answers_to(key) for site in sites):
            raise ValueError(f"{name}: {key!r} matches none of the {len(sites)} adapted layers.")


def check_range(name: str, value: float, low: float, high: float | None = None, *, open_above: bool = False) -> None:
    """Raises ValueError, naming the argument and its range, unless low <= value <= high (< high if `open_above`)."""
    check_number(name, value)
    above = high is not None and (value >= high if open_above else value > high)
    if value < low or above or value != value:
        upper = "" if high is None else f" and {'below' if open_above else 'at most'} {high:g}"
        raise ValueError(f"{name} must be at least {low:g}{upper}, not {value}.")
