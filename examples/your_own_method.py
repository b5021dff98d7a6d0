"""A method of one's own in one file: LoRA-XS, which trains r x r numbers a layer."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_peft import Delta, TargetedMethod


class LoRAXSDelta(Delta):
    def __init__(self, out_features: int, in_features: int, r: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.empty(out_features, r), requires_grad=False)  # frozen, but saved
        self.R = nn.Parameter(torch.zeros(r, r))
        self.A = nn.Parameter(torch.empty(r, in_features), requires_grad=False)

    def init(self, site: Any, generator: torch.Generator) -> None:
        U, S, V = torch.linalg.svd(site.matrix().float(), full_matrices=False)
        r = len(self.R)
        self.B.copy_(U[:, :r] * S[:r])
        self.A.copy_(V[:r])

    def weight(self, W: Tensor) -> Tensor:
        return W + (self.B @ self.R @ self.A).to(W.dtype)


class LoRAXS(TargetedMethod):
    """`W' = W + B R A`: B [out, r] and A [r, in] from the SVD of W, frozen; R [r, r] trains (Bałazy et al. 2024)."""

    def __init__(self, r: int = 16, **common: Any) -> None:
        super().__init__(**common)
        self.r = r

    def build(self, site: Any) -> LoRAXSDelta:
        return LoRAXSDelta(*site.size, self.r)
