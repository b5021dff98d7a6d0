"""(IA)^3: scales keys, values and feed-forward activations."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Call, Delta
from lit_peft.core.hf_peft import stores_transposed
from lit_peft.core.kernels import scale_features
from lit_peft.core.layers import layer_ops
from lit_peft.core.targets import Site
from lit_peft.methods.base import TargetedMethod


class IA3(TargetedMethod):
    """(IA)^3, one vector a layer: `W' = diag(l) W`, `b' = l * b` at outputs, `W' = W diag(l)` at inputs.

    Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section
    3.3. Keys and values are scaled as they come out, feed-forward activations as they go into the down projection.
    `l` starts at one, so that training starts from the base. Trains `out` or `in` parameters a layer, the fewest of
    all methods that reach into the layers; the step costs two products by a vector. Merging makes inference free.

    On a fused projection (GPT-2's c_attn) the queries are scaled with keys and values, which the table says.

    Args:
        feedforward_modules: Which of the targets are scaled at their input, in the language of `target_modules`;
            the others are scaled at their output.
        **common: See `TargetedMethod` and `Method`. Targets default to key, value and ffn_down, the paper's.
    """

    default_targets = ("key", "value", "ffn_down")
    learning_rate = 5e-3  # factors start at one and have far to go: the best of a sweep on SST-2, docs/results/sst2.md

    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "IA3"}
    hf_options: ClassVar[dict[str, Any]] = {
        "feedforward_modules": [],
        **dict.fromkeys(("fan_in_fan_out", "init_ia3_weights")),  # change nothing
    }

    def __init__(self, feedforward_modules: str | Sequence[str] = ("ffn_down",), **common: Any) -> None:
        super().__init__(**common)
        self.feedforward_modules = (
            [feedforward_modules] if isinstance(feedforward_modules, str) else list(feedforward_modules)
        )

    def build(self, site: Site) -> Delta:
        if any(site.answers_to(pattern) for pattern in self.feedforward_modules):
            return InputScale(site.in_features)
        return OutputScale(site.out_features)

    def to_hf_peft(self, sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's IA3, whose vectors are rows or columns; see `lit_peft.saving.folder`."""
        inputs = [site.path for site, delta in sites if isinstance(delta, InputScale)]
        outputs = [site.path for site, delta in sites if isinstance(delta, OutputScale)]
        tensors = {}
        for site, delta in sites:
            ops = layer_ops(site.layer)
            own = delta.row_or_column() if ops.is_linear else ops.along_features(delta.ia3_l)[None]
            tensors[f"{site.path}.ia3_l"] = own
        return {
            "feedforward_modules": _expression(inputs, outputs),
            "fan_in_fan_out": stores_transposed(sites),
        }, tensors

    @staticmethod
    def hf_has(site: Site, delta: Any) -> bool:
        """At linear layers, and at the outputs of convolutions; at their inputs it scales channels, ours places."""
        ops = layer_ops(site.layer)
        return ops.is_linear or (isinstance(delta, OutputScale) and not ops.looks_up)

    @classmethod
    def from_hf_peft(cls, options: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same IA3; see `lit_peft.saving.folder`."""
        named = options["feedforward_modules"]
        if isinstance(named, str):
            return {"feedforward_modules": [path for path in paths if re.fullmatch(named, path)]}
        return {"feedforward_modules": [path for path in paths if path.endswith(tuple(named))]}


def _expression(paths: list[str], others: list[str]) -> str | list[str]:
    """An expression for these paths and not for the others, by their last parts where that is enough.

    A list of names would not do: HF PEFT wants them among the names of the targets.
    """
    leaves, taken = ({path.rpartition(".")[2] for path in group} for group in (paths, others))
    if not paths:
        return []
    if leaves.isdisjoint(taken):
        return rf"(.*\.)?({'|'.join(map(re.escape, sorted(leaves)))})"
    return "|".join(map(re.escape, paths))


class Scale(Delta):
    """A factor for each feature of one side, `ia3_l`."""

    scales = True

    def __init__(self, features: int) -> None:
        super().__init__()
        self.ia3_l = nn.Parameter(torch.ones(features))


class OutputScale(Scale):
    """`diag(l) W` and `l * b`; `ia3_l`: [out]."""

    def describe(self) -> dict[str, Any]:
        return {"scales": "outputs"}

    def row_or_column(self) -> Tensor:
        """`l` as it stands in the equation, [out, 1]."""
        return self.ia3_l[:, None]

    def weight(self, W: Tensor) -> Tensor:
        return self.row_or_column().to(W.dtype) * W

    def bias(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else self.ia3_l.to(b.dtype) * b

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        y, ops = call(x), layer_ops(layer)
        return scale_features(y, self.ia3_l) if ops.features_last else y * ops.along_features(self.ia3_l.to(y.dtype))


class InputScale(Scale):
    """`W diag(l)`; `ia3_l`: [in]."""

    def describe(self) -> dict[str, Any]:
        return {"scales": "inputs"}

    def row_or_column(self) -> Tensor:
        """`l` as it stands in the equation, [1, in]."""
        return self.ia3_l[None, :]

    def weight(self, W: Tensor) -> Tensor:
        return W * self.row_or_column().to(W.dtype)

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        if layer_ops(layer).is_linear:
            return call(scale_features(x, self.ia3_l))
        return super().forward(layer, call, x)  # of a convolution a column is one place in the kernel
