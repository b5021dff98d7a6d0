"""`combine`: several LoRA adapters of a module made into one new LoRA adapter, beside them."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_peft.core.active import unknown, with_weights
from lit_peft.core.attach import check_attachable
from lit_peft.core.combination import (
    Factors,
    MajoritySign,
    concatenate,
    draw_keep,
    drop,
    merge_disjoint,
    nearest_of_rank,
    trim,
    truncate,
    weighted_sum,
)
from lit_peft.core.owned import agreed, values_of
from lit_peft.core.registry import Adapter, Running, registry
from lit_peft.methods.checks import check_choice, check_range
from lit_peft.methods.factors import attach_factors, read_factors

Kind = Literal["linear", "ties", "dare", "dare_ties"]
KINDS = ("linear", "ties", "dare", "dare_ties")
_THEIRS = {
    "cat": "kind='linear'",
    "svd": "kind='linear' with r",
    "ties_svd": "kind='ties'",
    "dare_linear": "kind='dare', on='factors'",
    "dare_linear_svd": "kind='dare'",
    "dare_ties_svd": "kind='dare_ties'",
}
"""What HF PEFT's combination types are called here; its linear, ties and dare_ties are these kinds on="factors"."""


def combine(
    module: nn.Module,
    weights: Mapping[str, float] | Iterable[str],
    name: str,
    kind: Kind = "linear",
    *,
    r: int | None = None,
    density: float | None = None,
    on: Literal["change", "factors"] = "change",
    majority_sign_method: MajoritySign = "total",
    seed: int = 0,
    head: str | None = None,
) -> Adapter:
    """Combines LoRA adapters of a module into a new one, a plain `LoRA`, which becomes the only active adapter.

    With `T_i = s_i B_i A_i`, [out, in], the change of adapter i at a layer, and `w_i` its weight, the new change is

    - linear: `sum_i w_i T_i`. Exact, by factors side by side, whose rank is the sum of the ranks (HF PEFT's `cat`); or,
      with `r`, the nearest of that rank (`svd`). Task arithmetic, Ilharco et al. 2023, "Editing Models with Task
      Arithmetic", section 2; a negative weight takes a task away.
    - ties: of each `T_i` the largest `density n` of its n entries stay; each entry elects a sign; those `w_i T_i` that
      have it are averaged. Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4.2.
      The average of n adapters at weight 1, where linear adds: the paper's lambda is the weights.
    - dare: of each `T_i` a random share `density` stays, divided by it; then linear. Yu et al. 2024, "Language Models
      are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", section 3.2, p = 1 - density.
    - dare_ties: the same, then sign and average as in ties.

    All but linear have a full rank, of which the nearest of rank `r` is kept, by the SVD of a matrix [out, in] at each
    layer. Values are those of HF PEFT's `ties_svd`, `dare_linear_svd` and `dare_ties_svd`: weights scale what is added
    or averaged, and the vote is of the `T_i` without them.

    `on="factors"` does all this to `A_i` and `B_i`, with `sqrt(|w_i s_i|)` as the weight of each and the sign in `A`,
    as HF PEFT's `linear`, `ties`, `dare_linear` and `dare_ties` do. It is not a sum of changes: even linear has the
    cross terms, `(sum_i a_i A_i)` times `(sum_i b_i B_i)`. It is cheap, keeps the rank, and gives HF PEFT's values.

    Adapters may differ in rank, alpha, scaling and layers; a layer that only some adapt combines those. Ranks that
    SparseLoRA or AdaLoRA have taken away are left out. Computed in float32 and rounded once. The adapters stay
    attached as they were.

    Args:
        module: What the adapters are attached to.
        weights: Adapter -> weight, or names alone, which weigh 1 each. Any numbers; they need not sum to 1.
        name: Name of the new adapter.
        kind: How changes are combined: linear, ties, dare or dare_ties.
        r: Rank of the new adapter, less where a layer's smaller side or, of linear, the sum of the ranks is less. None:
            of linear exact; of the others, as in HF PEFT, the largest rank that any of the adapters has anywhere.
        density: Share of the entries that stay, above 0 and at most 1; for all kinds but linear. TIES' authors keep .2.
        on: What is combined: change, `T_i`, or factors, `A_i` and `B_i`, whose ranks must then be equal.
        majority_sign_method: What elects a sign: total, the sum of the entries; or frequency, of their signs.
        seed: Seed of the entries that dare keeps; each adapter and layer has a stream of its own, drawn on the host.
        head: Of base parameters (a head, biases) and buffers that several of the adapters have brought to different
            values, the adapter whose values count. What one alone has comes along in any case. They are taken whole,
            not weighted.

    Returns:
        The registry's record of the new adapter. Its `spec` gives a LoRA that trains on.

    Raises:
        KeyError: For a name that no adapter has.
        ValueError: When an adapter is no LoRA, an argument is out of range or does not fit the others, the name is
            taken, ranks differ on="factors", adapters train a base parameter to different values and `head` is missing,
            values are not finite or not there (meta), or the module is merged or sharded. The module is then as it was.
    """
    check_attachable(module, name)
    wanted = _check_weights(module, weights)
    recipe = _Recipe(kind, r, density, on, majority_sign_method, seed)
    recipe.check()
    if head is not None and head not in wanted:
        raise ValueError(f"head = {head!r} is none of the combined adapters, {_listed(wanted, head)}.")
    with torch.no_grad():
        combined = recipe.apply(read_factors(module, list(wanted), live=on == "change"), wanted)
        base = agreed({key: values_of(module, key) for key in wanted}, Running(wanted, head))
    adapters = [registry(module).adapters[key] for key in wanted]  # type: ignore[union-attr]
    return attach_factors(module, name, combined, base, adapters)


# ----------------------------------------------------------------------------------------------- arguments


def _check_weights(module: nn.Module, weights: Any) -> dict[str, float]:
    state = registry(module)
    known = sorted(state.adapters) if state is not None else []
    if not known:
        raise ValueError(f"{type(module).__name__} has no adapter to combine.")
    if not isinstance(weights, Iterable):
        raise ValueError(f"weights must be names or {{name: weight}}, not {weights!r}.")
    if not (wanted := with_weights(weights)):
        raise ValueError(f"weights is empty: name at least one adapter of {', '.join(known)}.")
    for key in wanted:
        if key not in known:
            raise KeyError(unknown(key, state))
    return wanted


def _listed(choices: Iterable[str], word: str) -> str:
    """The choices, and the nearest of them to a word that is none."""
    near = difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.5)
    return ", ".join(choices) + (f" (did you mean {near[0]!r}?)" if near else "")


@dataclass(frozen=True)
class _Recipe:
    """How to combine; the arguments of `combine`."""

    kind: str
    r: int | None
    density: float | None
    on: str
    majority_sign_method: Any
    seed: int

    def check(self) -> None:
        if self.kind in _THEIRS:
            raise ValueError(f"kind = {self.kind!r} is HF PEFT's name; here it is {_THEIRS[self.kind]}.")
        if self.kind not in KINDS:
            raise ValueError(f"kind = {self.kind!r} is none of {_listed(KINDS, self.kind)}.")
        check_choice("on", self.on, ("change", "factors"))
        check_choice("majority_sign_method", self.majority_sign_method, ("total", "frequency"))
        if self.r is not None:
            check_range("r", self.r, 1)
            if not isinstance(self.r, int):
                raise ValueError(f"r must be a whole number, not {self.r!r}.")
            if self.on == "factors":
                raise ValueError(
                    f"r = {self.r} has no effect on='factors', which keeps the adapters' rank: leave it out."
                )
        if self.kind == "linear":
            if self.density is not None:
                raise ValueError(f"density = {self.density} has no effect with kind = 'linear': leave it out.")
        elif self.density is None:
            raise ValueError(f"kind = {self.kind!r} needs density, the share of the entries that it keeps.")
        else:
            check_range("density", self.density, 0, 1)
            if self.density == 0:
                raise ValueError("density must be above 0: nothing would be left.")

    def apply(self, sites: Mapping[str, Mapping[str, Factors]], weights: Mapping[str, float]) -> dict[str, Factors]:
        """Path -> the new factors, for path -> {adapter: its factors}."""
        largest = max(len(part.A) for parts in sites.values() for part in parts.values())
        do = self._on_factors if self.on == "factors" else self._on_change
        return {path: do(path, parts, [weights[name] for name in parts], largest) for path, parts in sites.items()}

    def _on_change(self, path: str, parts: Mapping[str, Factors], weights: list[float], largest: int) -> Factors:
        if self.kind != "linear":
            changes = {f"{name}/{path}": part.change() for name, part in parts.items()}
            return nearest_of_rank(self._mix(changes, weights), self.r or largest)
        exact = concatenate(list(parts.values()), weights)
        rank = len(exact.A)
        r = min(self.r or rank, len(exact.B), exact.A.shape[1])
        return exact if r == rank else truncate(exact, r)

    def _on_factors(self, path: str, parts: Mapping[str, Factors], weights: list[float], _: int) -> Factors:
        if len({len(part.A) for part in parts.values()}) > 1:
            ranks = ", ".join(f"{name} {len(part.A)}" for name, part in parts.items())
            raise ValueError(f"{path}: on='factors' needs equal ranks, and here they are {ranks}; combine on='change'.")
        scalings = [weight * part.scaling for weight, part in zip(weights, parts.values(), strict=True)]
        roots = [math.sqrt(abs(scaling)) for scaling in scalings]
        signed = [math.copysign(root, scaling) for root, scaling in zip(roots, scalings, strict=True)]
        A = self._mix({f"{name}/{path}/A": part.A for name, part in parts.items()}, signed)
        B = self._mix({f"{name}/{path}/B": part.B for name, part in parts.items()}, roots)
        return Factors(A, B)

    def _mix(self, named: Mapping[str, Tensor], weights: Sequence[float]) -> Tensor:
        """The kind itself, on tensors of one shape; their names are those of the random streams."""
        tensors = list(named.values())
        if self.density is not None:
            if self.kind == "ties":
                tensors = [trim(T, self.density) for T in tensors]
            else:
                keeps = (
                    draw_keep(T.shape, self.density, f"{self.seed}/{key}").to(T.device) for key, T in named.items()
                )
                tensors = [drop(T, keep, self.density) for T, keep in zip(tensors, keeps, strict=True)]
        if self.kind in ("ties", "dare_ties"):
            return merge_disjoint(tensors, weights, self.majority_sign_method)
        return weighted_sum(tensors, weights)
