"""Bottleneck adapters: a small network after, or beside, parts of each block."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_peft.core.addition import Addition, Call
from lit_peft.core.layers import layer_ops
from lit_peft.core.passing import InputReader, PassedInput
from lit_peft.core.targets import Site, closest_site, sites_of_role
from lit_peft.methods.base import TargetedMethod
from lit_peft.methods.checks import check_choice, check_positive, check_range

PLACEMENTS = {"houlsby": ("output", "ffn_down"), "pfeiffer": ("ffn_down",), "parallel": ("ffn_down",)}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckAdapter(TargetedMethod):
    """Bottleneck adapters: `y' = y + s f(z W_down^T + b_down) W_up^T + b_up`, `z` being `y` or, in parallel, the input.

    `y`: [..., d], what a layer returns; `W_down`: [b, d], `W_up`: [d, b], `b = d // reduction_factor`; s scales all
    that is added, `b_up` too. Placements:

    - houlsby: after the output projection of attention and after the feed-forward network, before each residual sum.
      Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1.
    - pfeiffer: after the feed-forward network alone, half of the parameters. Pfeiffer et al. 2021, "AdapterFusion:
      Non-Destructive Task Composition for Transfer Learning". Their choice of layer norms around it is not part of it.
    - parallel: beside the feed-forward network, `z` being what that network reads. He et al. 2022, "Towards a Unified
      View of Parameter-Efficient Transfer Learning", section 3.3.

    Where the block has a dropout after the projection, it acts on `y'`. Trains `b (d_z + d) + b + d` parameters a site,
    `2 b d + b + d` where `z` is as wide as `y`. The step and inference get longer by two narrow products, one after
    the other, at each site: the change depends on the input, so that it cannot be merged.

    Args:
        placement: houlsby, pfeiffer or parallel. pfeiffer, for half of houlsby's parameters and products.
        reduction_factor: Width of `z` by width of the bottleneck. 16 for all placements, so that they compare; it is
            Pfeiffer's. He et al. spend more on the parallel one: 512 of 1024, a factor of 2.
        activation: f: relu, gelu, silu or tanh. relu is Pfeiffer's and He's, but a narrow bottleneck of relus may be
            dead from the start for all that it reads, and then only `b_up` trains; silu has a gradient everywhere.
        scale: s; null: 1, and 4 in parallel, He et al.'s value.
        **common: See `TargetedMethod` and `Method`. `target_modules` replaces the layers that the placement means;
            the adapter then stands after each of them, or, in parallel, beside it. A feed-forward network's down
            projection that is named alone still means the whole network in parallel. To train layer norms too, as
            Houlsby et al. do, name them in `train_also`.
    """

    def __init__(
        self,
        placement: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer",
        reduction_factor: float = 16,
        activation: Literal["relu", "gelu", "silu", "tanh"] = "silu",
        scale: float | None = None,
        **common: Any,
    ) -> None:
        check_choice("placement", placement, tuple(PLACEMENTS))
        check_choice("activation", activation, tuple(ACTIVATIONS))
        check_range("reduction_factor", reduction_factor, 1)
        check_positive("scale", 1.0 if scale is None else scale)
        if common.get("target_modules") is None:
            common["target_modules"] = PLACEMENTS[placement]
        super().__init__(**common)
        self.placement, self.reduction_factor = placement, reduction_factor
        self.activation, self.scale = activation, scale

    def companions(self, module: nn.Module, sites: list[Site]) -> list[Site]:
        """In parallel, the up projections, at which the inputs of feed-forward networks are read."""
        self._reads: dict[str, int] = {}  # path of a down projection -> width of what its network reads
        self._inputs: dict[str, PassedInput] = {}
        if self.placement != "parallel":
            return []
        found: list[Site] = []
        ups, named = sites_of_role(module, "ffn_up"), {site.path for site in sites}
        for site in sites:
            if "ffn_down" not in site.roles:
                continue
            up = closest_site(site, ups)
            if up is None:
                raise ValueError(
                    f"placement parallel: {site.path} has no up projection (role ffn_up) beside it; use pfeiffer."
                )
            if up.path in named:
                continue  # both were named: each has an adapter beside itself
            if up.path in self._inputs:
                raise ValueError(f"placement parallel: {up.path} feeds several down projections; use pfeiffer.")
            found.append(up)
            self._reads[site.path] = up.in_features
            self._inputs[site.path] = self._inputs[up.path] = PassedInput(site.path.rpartition(".")[2])
        return found

    def build(self, site: Site) -> Addition:
        passed = self._inputs.get(site.path)
        if passed is not None and site.path not in self._reads:
            return InputReader(passed)
        ops, kind = layer_ops(site.layer), type(site.layer).__name__
        if not ops.features_last:
            raise ValueError(
                f"{site.path} is a {kind}, whose features are channels, and a bottleneck reads the last dimension; "
                "use LoRA, or name linear layers."
            )
        if self.placement == "parallel" and not ops.is_linear:
            raise ValueError(f"placement parallel: {site.path} is a {kind}, whose input is no vector; use pfeiffer.")
        series = self.placement != "parallel"
        reads = site.out_features if series else self._reads.get(site.path, site.in_features)
        width = int(reads // self.reduction_factor)
        if width < 1:
            raise ValueError(
                f"reduction_factor = {self.reduction_factor:g} leaves no bottleneck of the "
                f"{reads} features of {site.path}."
            )
        scale = self.scale if self.scale is not None else 1.0 if series else 4.0
        make = SeriesAdapter if series else ParallelAdapter
        adapter = make(site.out_features, reads, width, self.activation, scale)
        adapter.passed = passed
        return adapter

    def lacks_gradient(self, name: str) -> bool:
        return self.activation == "relu" and not name.endswith("up_bias")  # all relus of a narrow one may be dead


class SeriesAdapter(Addition):
    """`y' = y + s (f(y W_down^T + b_down) W_up^T + b_up)`; `down_weight`: [b, d], `up_weight`: [d, b]."""

    not_mergeable = "a bottleneck has an activation inside, which no weight can hold."
    passed: PassedInput | None = None
    """Where the input comes from that the adapter reads, if not from its own layer."""

    def __init__(self, out_features: int, in_features: int, width: int, activation: str, scale: float) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(width, in_features))
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up_weight = nn.Parameter(torch.zeros(out_features, width))
        self.up_bias = nn.Parameter(torch.zeros(out_features))
        self.activation, self.scale = activation, scale

    def init(self, site: Site, generator: torch.Generator) -> None:
        # `up` stays zero, as LoRA's B does: training starts from the base exactly, and loses nothing by it, since the
        # first gradient of `up` is not zero. N(0, .01^2) for both, as in Houlsby et al., only starts near the base.
        bound = 1 / math.sqrt(self.down_weight.shape[1])
        nn.init.uniform_(self.down_weight, -bound, bound, generator=generator)

    def describe(self) -> dict[str, Any]:
        return {"bottleneck": len(self.down_weight), "activation": self.activation, "scale": self.scale}

    def change(self, z: Tensor) -> Tensor:
        """`f(z W_down^T + b_down) W_up^T + b_up`, [..., d]."""
        h = F.linear(z, self.down_weight.to(z.dtype), self.down_bias.to(z.dtype))
        h = ACTIVATIONS[self.activation](h)
        return F.linear(h, self.up_weight.to(h.dtype), self.up_bias.to(h.dtype))

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        y = call(x)
        return torch.add(y, self.change(y), alpha=self.scale)


class ParallelAdapter(SeriesAdapter):
    """The same of the input: `y' = y + s (f(z W_down^T + b_down) W_up^T + b_up)`, with `W_down`: [b, d_z]."""

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        z = x if self.passed is None else self.passed.take()
        return torch.add(call(x), self.change(z), alpha=self.scale)
