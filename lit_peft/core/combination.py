"""Several low-rank changes of one weight made into one: sums, TIES, DARE, and the nearest product of a rank.

Pure functions of tensors, computed in their dtype. `lit_peft.combine` applies them to the adapters of a module.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_peft.core.streams import stream

MajoritySign = Literal["total", "frequency"]


class Factors(NamedTuple):
    """The change `s B A` of a weight [out, in]; `A`: [r, in], `B`: [out, r], `s` the scaling."""

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def change(self) -> Tensor:
        """`s B A`, [out, in]."""
        return self.scaling * (self.B @ self.A)


def concatenate(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """`sum_i w_i s_i B_i A_i` exactly: factors side by side, of the sum of the ranks.

    One part alone keeps its factors bit for bit, the weight going into the scaling where that stays above 0; of
    several each `w_i s_i` goes into `A_i`, and the scaling is 1.
    """
    scalings = [weight * part.scaling for part, weight in zip(parts, weights, strict=True)]
    if len(parts) == 1 and scalings[0] > 0:
        return Factors(parts[0].A, parts[0].B, scalings[0])
    A = torch.cat([s * part.A for s, part in zip(scalings, parts, strict=True)])
    return Factors(A, torch.cat([part.B for part in parts], dim=1))


def truncate(factors: Factors, r: int) -> Factors:
    """The nearest change of rank `r` to `s B A` in Frobenius norm, by the SVD of a core no larger than its rank.

    Eckart and Young 1936. With `B = Q_B R_B` and `A^T = Q_A R_A` only `R_B R_A^T` is decomposed: no matrix [out, in].
    """
    Q_B, R_B = torch.linalg.qr(factors.B)
    Q_A, R_A = torch.linalg.qr(factors.A.t())
    core = nearest_of_rank(factors.scaling * (R_B @ R_A.t()), r)
    return Factors(core.A @ Q_A.t(), Q_B @ core.B)


def nearest_of_rank(change: Tensor, r: int) -> Factors:
    """The nearest product `B A` of rank `r` to a change [out, in]: `A = V_r^T`, `B = U_r S_r` of its SVD."""
    U, S, Vh = torch.linalg.svd(change, full_matrices=False)
    return Factors(Vh[:r], U[:, :r] * S[:r])


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`sum_i w_i T_i`."""
    return sum((w * T for w, T in zip(weights[1:], changes[1:], strict=True)), weights[0] * changes[0])


def trim(change: Tensor, density: float) -> Tensor:
    """Keeps the `int(density n)` of its n entries that are the largest in size, and makes the others 0.

    Yadav et al. 2023, "TIES-Merging: Resolving Interference When Merging Models", section 4.2, step 1.
    """
    flat = change.flatten()
    largest = flat.abs().topk(int(density * len(flat))).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view_as(change)


def drop(change: Tensor, keep: Tensor, density: float) -> Tensor:
    """Drops what is not kept and divides what is by `density`, so that the expectation stays.

    Yu et al. 2024, "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    section 3.2 (DARE), with `density` = 1 - p.

    Args:
        change: The change, of any shape.
        keep: Booleans of that shape, see `draw_keep`.
        density: The share that was to be kept.
    """
    return change * keep / density


def draw_keep(shape: Sequence[int], density: float, name: str) -> Tensor:
    """Booleans that are True with probability `density`, drawn on the host from the stream of that name."""
    return torch.rand(*shape, generator=stream(name), device="cpu") < density


def merge_disjoint(changes: Sequence[Tensor], weights: Sequence[float], method: MajoritySign) -> Tensor:
    """Elects a sign for each entry, and averages what has it: `sum_i w_i T_i [sign agrees] / #{i: sign agrees}`.

    Yadav et al. 2023, section 4.2, steps 2 and 3, with weights as HF PEFT puts them: they scale what is averaged, while
    the vote and the count are of the changes themselves. A zero has no vote and is not counted; a draw elects +.

    Args:
        changes: The trimmed or dropped changes `T_i`, of one shape.
        weights: `w_i`.
        method: What the vote sums: total, the entries; or frequency, their signs.
    """
    stacked = torch.stack(list(changes))
    signs = stacked.sign()
    votes = (stacked if method == "total" else signs).sum(0)
    agrees = signs == torch.where(votes < 0, -1.0, 1.0)
    return weighted_sum(list(stacked * agrees), weights) / agrees.sum(0).clamp(min=1)
