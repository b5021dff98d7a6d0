"""VeRA: one frozen random pair of factors for all layers, and two trained vectors for each."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Call, Delta, dropped
from lit_peft.core.hf_peft import stores_transposed
from lit_peft.core.layers import layer_ops
from lit_peft.core.targets import Site
from lit_peft.methods.base import TargetedMethod
from lit_peft.methods.checks import check_range


class VeRA(TargetedMethod):
    """Vector-based random matrix adaptation: `W' = W + diag(b) B diag(d) A`; `A`: [r, in] and `B`: [out, r] are frozen.

    Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", section 3. `A` and `B` are drawn once, as
    large as the largest layer, and each layer takes its part of them. `b` starts at zero, so that training starts from
    the base. Trains `r + out` parameters a layer; a step costs more than LoRA's, since r is large. The checkpoint holds
    `A` and `B` once, so that it does not rest on a random generator. Merging makes inference free.

    Args:
        r: Rank. It costs one parameter a layer, so that it can be large; 256 as in the paper's smaller models.
        d_initial: What `d` starts at; .1 is the paper's choice (section 4.6).
        dropout: Dropout on the adapter's input.
        seed: Seed of `A` and `B`.
        save_projection: Whether an adapter folder holds `A` and `B`; else it rests on torch's generator and `seed`.
        **common: See `TargetedMethod` and `Method`.
    """

    may_change = frozenset({"dropout"})
    learning_rate = 1e-2  # the best of a sweep on SST-2, docs/results/sst2.md: the vectors have far to go
    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "VERA"}
    hf_options: ClassVar[dict[str, Any]] = {
        "r": 256,
        "d_initial": 0.1,
        "vera_dropout": 0.0,
        "projection_prng_key": 0,
        "save_projection": True,
        **dict.fromkeys(("bias", "fan_in_fan_out", "init_weights")),  # change nothing, or stand in the tensors
    }

    def __init__(
        self,
        r: int = 256,
        d_initial: float = 0.1,
        dropout: float = 0.0,
        seed: int = 0,
        save_projection: bool = True,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_range("r", r, 1)
        check_range("dropout", dropout, 0, 1, open_above=True)
        if d_initial == 0:
            raise ValueError("d_initial must not be 0: with b at zero too, nothing would get a gradient.")
        self.r, self.d_initial, self.dropout, self.seed = r, d_initial, dropout, seed
        self.save_projection = save_projection

    def plan(self, sites: list[Site]) -> None:
        sizes = [site.size for site in sites]
        self._shared: Projections | None = None
        if sizes:
            self._shared = Projections(self.r, max(out for out, _ in sizes), max(in_ for _, in_ in sizes), self.seed)
        self._holder = sites[0].path if sites else ""

    def build(self, site: Site) -> "VeRADelta":
        assert self._shared is not None
        return VeRADelta(self._shared, site.path == self._holder, *site.size, self.d_initial, self.dropout)

    def to_hf_peft(self, sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's VERA; see `lit_peft.saving.folder`."""
        shared = sites[0][1].shared
        tensors = {"vera_A": shared.vera_A, "vera_B": shared.vera_B} if self.save_projection else {}
        for site, delta in sites:
            tensors |= {f"{site.path}.{key}": value for key, value in delta.named_parameters()}
        return {
            "r": self.r,
            "d_initial": self.d_initial,
            "vera_dropout": self.dropout,
            "projection_prng_key": self.seed,
            "save_projection": self.save_projection,
            "bias": "none",
            "fan_in_fan_out": stores_transposed(sites),
        }, tensors

    @staticmethod
    def hf_has(site: Site, delta: Any) -> bool:
        """At linear layers alone."""
        return layer_ops(site.layer).is_linear

    @classmethod
    def from_hf_peft(cls, options: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same VeRA; see `lit_peft.saving.folder`."""
        return {
            "r": options["r"],
            "d_initial": options["d_initial"],
            "dropout": options["vera_dropout"],
            "seed": options["projection_prng_key"],
            "save_projection": options["save_projection"],
        }


class Projections(nn.Module):
    """`A`: [r, largest in], `B`: [largest out, r], uniform as in He et al. 2015; buffers, which nothing shards."""

    def __init__(self, r: int, out_features: int, in_features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        bounds = math.sqrt(6 / in_features), math.sqrt(6 / r)
        A, B = torch.empty(r, in_features), torch.empty(out_features, r)
        self.register_buffer("vera_A", A.uniform_(-bounds[0], bounds[0], generator=generator))
        self.register_buffer("vera_B", B.uniform_(-bounds[1], bounds[1], generator=generator))


class VeRADelta(Delta):
    """`W + diag(b) B diag(d) A`; `vera_lambda_b`: [out], `vera_lambda_d`: [r]."""

    def __init__(
        self, shared: Projections, holds: bool, out_features: int, in_features: int, d_initial: float, dropout: float
    ) -> None:
        super().__init__()
        if holds:  # one layer moves and saves what all of them use
            self.shared = shared
        else:
            self.__dict__["shared"] = shared
        self.vera_lambda_b = nn.Parameter(torch.zeros(out_features))
        self.vera_lambda_d = nn.Parameter(torch.full((len(shared.vera_A),), d_initial))  # type: ignore[arg-type]
        self.in_features, self.dropout = in_features, dropout

    def describe(self) -> dict[str, Any]:
        return {"r": len(self.vera_lambda_d)}

    def factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """`diag(d) A`, [r, in], and `diag(b) B`, [out, r]."""
        A: Any = self.shared.vera_A
        B: Any = self.shared.vera_B
        A, B = A[:, : self.in_features].to(like.device), B[: len(self.vera_lambda_b)].to(like.device)
        return self.vera_lambda_d[:, None] * A, self.vera_lambda_b[:, None] * B

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.factors(W)
        return W + (B @ A).to(W.dtype)

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        y = call(x)
        return layer_ops(layer).add_low_rank(layer, y, dropped(x, self.dropout, self.training), *self.factors(y))
