"""LoRA: a low-rank change of a frozen weight."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_peft.core.addition import Call, Delta, dropped
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.dtypes import compute_dtype
from lit_peft.core.hf_peft import match_pattern, stores_transposed
from lit_peft.core.layers import LayerOps, layer_ops
from lit_peft.core.products import as_rows, matmul_in, scaled_matmul
from lit_peft.core.remake import Remade, remade
from lit_peft.core.targets import Site
from lit_peft.methods.base import TargetedMethod
from lit_peft.methods.checks import by_pattern, check_choice, check_pattern, check_positive, check_range, check_rank


class LoRA(TargetedMethod):
    """Low-rank adaptation: `W' = W + s B A`, with `A`: [r, in], `B`: [out, r] and `s = alpha / r`.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. `B` starts at zero, so that
    training starts from the base. Trains `r (in + out)` parameters a layer; merging makes inference free.

    Args:
        r: Rank. Small ranks suffice (section 7.2); 16 leaves room for harder tasks and is still .9 % of DistilBERT.
        alpha: Numerator of the scaling; null means 2 r, so that `s` is 2 whatever the rank, and the learning rate
            need not be tuned again when the rank changes.
        dropout: Dropout on the adapter's input, as in the authors' code. .05 is what Dettmers et al. 2023 (QLoRA)
            use for their larger models; raise it on small sets.
        bias: Biases that train too: none, lora_only (those of the adapted layers) or all. none, because a trained
            bias cannot be switched with the adapter.
        init: How `A` starts: kaiming, uniform within 1 / sqrt(fan in), as the authors' code does, or gaussian
            with standard deviation 1 / r.
        use_rslora: Scale by alpha / sqrt(r) instead (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for
            Fine-Tuning with LoRA", section 3.2), which keeps large ranks learning; give `alpha` explicitly then.
        rank_pattern: Rank of particular layers: {role, name, glob or re: -> r}; the first that matches counts.
        alpha_pattern: The same for alpha.
        loraplus_ratio: Learning rate of `B` by that of `A` (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation
            of Large Models", section 4). Above 1, with 16 the authors' choice, `B` need not wait for `A` in wide
            models; lower the rate itself then. Needs an optimizer made from `lit_peft.param_groups`, as our tasks'.
        **common: See `TargetedMethod` and `Method`. Targets default to attention: at one budget all four
            projections do at least as well as two of them (section 7.1, table 5).
    """

    may_change = frozenset({"dropout", "init"})
    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "LORA"}
    hf_options: ClassVar[dict[str, Any]] = {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        **dict.fromkeys(("fan_in_fan_out", "eva_config", "megatron_core", "qalora_group_size")),  # change nothing
    }

    def __init__(
        self,
        r: int = 16,
        alpha: float | None = None,
        dropout: float = 0.05,
        bias: Literal["none", "all", "lora_only"] = "none",
        init: Literal["kaiming", "gaussian"] = "kaiming",
        use_rslora: bool = False,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        loraplus_ratio: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_range("r", r, 1)
        check_range("dropout", dropout, 0, 1, open_above=True)
        check_choice("bias", bias, ("none", "all", "lora_only"))
        check_choice("init", init, ("kaiming", "gaussian"))
        for name, value in (rank_pattern or {}).items():
            check_range(f"rank_pattern[{name!r}]", value, 1)
        positive: dict[str, float] = {"alpha": 1.0 if alpha is None else alpha, "loraplus_ratio": loraplus_ratio}
        positive |= {f"alpha_pattern[{key!r}]": value for key, value in (alpha_pattern or {}).items()}
        for name, number in positive.items():
            check_positive(name, number)
        self.r, self.alpha, self.dropout, self.bias, self.init = r, alpha, dropout, bias, init
        self.use_rslora, self.loraplus_ratio = use_rslora, loraplus_ratio
        self.rank_pattern, self.alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
        self._biases: set[str] = set()  # of the adapted layers, once they are known

    def plan(self, sites: list[Site]) -> None:
        self._biases = {f"{site.path}.bias".lstrip(".") for site in sites}
        check_pattern("rank_pattern", self.rank_pattern, sites)
        check_pattern("alpha_pattern", self.alpha_pattern, sites)

    def build(self, site: Site) -> "LoRADelta":
        r = by_pattern(self.rank_pattern, site, self.r)
        check_rank("r", r, site)
        default = 2 * r if self.alpha is None else self.alpha
        alpha = by_pattern(self.alpha_pattern, site, default)
        return self.delta(site, r, alpha, alpha / (math.sqrt(r) if self.use_rslora else r))

    def delta(self, site: Site, r: int, alpha: float, scaling: float) -> "LoRADelta":
        """The addition of one site; what a subclass with another equation replaces."""
        return LoRADelta(*site.size, r, alpha, scaling, self.dropout, self.init)

    def trains(self, name: str) -> bool:
        if self.bias == "lora_only":
            return name in self._biases
        return self.bias == "all" and name.rpartition(".")[2] == "bias"

    def param_groups(self, named: Sequence[tuple[str, nn.Parameter]], lr: float) -> list[dict[str, Any]]:
        """`A` at `lr`; `B`, and vectors, at `lr * loraplus_ratio`."""
        slow = [name for name, _ in named if name.endswith("lora_A")]
        fast = [name for name, _ in named if not name.endswith("lora_A")]
        if self.loraplus_ratio == 1.0:
            return [{"params": slow + fast, "lr": lr}]
        return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * self.loraplus_ratio}]

    def to_hf_peft(self, sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's LORA; see `lit_peft.saving.folder`. Ranks and alphas are given by path where they differ."""
        alpha = 2 * self.r if self.alpha is None else self.alpha
        tensors: dict[str, Tensor] = {}
        for site, delta in sites:
            ops = layer_ops(site.layer)
            factors = ops.factor_weights(site.layer, delta.lora_A, delta.lora_B)
            if factors is None:
                raise ValueError(
                    f"{site.path}: HF PEFT's LoRA of a convolution has no groups, dilation or padding_mode."
                )
            names = ("lora_embedding_A", "lora_embedding_B") if ops.looks_up else ("lora_A.weight", "lora_B.weight")
            tensors |= {f"{site.path}.{name}": factor for name, factor in zip(names, factors, strict=True)}
        entries = {
            "r": self.r,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.use_rslora,
            "bias": "none",
            "fan_in_fan_out": stores_transposed(sites),
            "rank_pattern": {f"^{s.path}": len(d.lora_A) for s, d in sites if len(d.lora_A) != self.r},
            "alpha_pattern": {f"^{s.path}": d.alpha for s, d in sites if d.alpha != alpha},
        }
        return entries, tensors

    @classmethod
    def from_hf_peft(cls, options: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same LoRA; see `lit_peft.saving.folder`."""
        if options["init_lora_weights"] not in (True, False, "gaussian", "eva", "orthogonal"):
            raise CheckpointMismatch(
                f"init_lora_weights={options['init_lora_weights']!r} has changed the base too: save the adapter in HF "
                "PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA."
            )
        r, alpha = options["r"], options["lora_alpha"]
        paths = sorted(paths, key=len, reverse=True)  # a path may end with another: the first that matches counts
        ranks = {path: match_pattern(options["rank_pattern"], path, r) for path in paths}
        alphas = {path: match_pattern(options["alpha_pattern"], path, alpha) for path in paths}
        return {
            "r": r,
            "alpha": alpha,
            "dropout": options["lora_dropout"],
            "bias": options["bias"],
            "use_rslora": options["use_rslora"],
            "rank_pattern": {path: value for path, value in ranks.items() if value != r},
            "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        }


class LoRADelta(Delta):
    """`W + s B A`; `lora_A`: [r, in], `lora_B`: [out, r], `s` the scaling."""

    fused_from = 1 << 22
    """Weights of a layer, 2048 x 2048, from which the fused function is used; at 768 x 768 the plain formula wins."""

    def __init__(
        self,
        out_features: int,
        in_features: int,
        r: int,
        alpha: float,
        scaling: float,
        dropout: float,
        init: str,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.alpha, self.scaling, self.dropout, self.init_kind = alpha, scaling, dropout, init
        self.layer_weights = in_features * out_features

    def init(self, site: Site, generator: torch.Generator) -> None:
        if self.init_kind == "kaiming":
            bound = 1 / math.sqrt(site.fan_in)
            nn.init.uniform_(self.lora_A, -bound, bound, generator=generator)
        else:
            nn.init.normal_(self.lora_A, std=1 / self.lora_A.shape[0], generator=generator)

    def describe(self) -> dict[str, Any]:
        r = len(self.lora_A)
        return {
            "r": r,
            "alpha": self.alpha,
            "alpha/r" if self.scaling == self.alpha / r else "scaling": self.scaling,
        }

    def factors(self) -> tuple[Tensor, Tensor]:
        """`A` and `B` of the product; what a subclass that masks or gates them replaces."""
        return self.lora_A, self.lora_B

    def change(self) -> Tensor:
        """`s B A`, [out, in]."""
        A, B = self.factors()
        return self.scaling * (B @ A)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.change()

    @property
    def remakes_input(self) -> bool:
        return self.layer_weights >= self.fused_from

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        if self.fuses(call):
            rows: list[Tensor] = []
            y = LoRAFunction.apply(*self.node_inputs(layer, x), rows)
            with torch.no_grad():
                layer_ops(layer).add_product(layer, *rows)
            return y
        d = dropped(x, self.dropout, self.training)
        return layer_ops(layer).add_low_rank(layer, call(x), d, *self.factors(), self.scaling)

    def fuses(self, call: Call) -> bool:
        """Whether one node is to stand for the layer and this."""
        return self.remakes_input and call.is_fusible

    def node_inputs(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, "Fused"]:
        """What `LoRAFunction` is given."""
        dtype, d = compute_dtype(x), dropped(x, self.dropout, self.training)
        apart = None if d is x else d.to(dtype)
        again = remade(x) if apart is None else None
        return x.to(dtype), apart, *self.factors(), Fused(layer, layer_ops(layer), self.scaling, again)


class Fused(NamedTuple):
    """What `LoRAFunction` stands for, besides tensors: a layer, and a product of factors that counts `s` times."""

    layer: nn.Module
    ops: LayerOps
    s: float
    again: Remade | None
    """How its input can be made again, if it need not be kept."""


class LoRAFunction(torch.autograd.Function):
    """`y = W x + b + s B A d` as one node, `d` being `x` or its dropout.

    Its forward pass leaves `W x` to be added to what it returns. For the node has then kept all that its backward pass
    needs, which `W x` is no part of: a checkpointed block that ends with this layer, and is computed again up to the
    last tensor that is kept, computes it once instead of twice. And the large product, which adds in float32, is
    rounded with the sum; were the small one added to it, that would read and write `y` again.

    Keeps `d`, or what it can be made from again, `s A d` and the factors, of a quantised weight only what is packed.
    Computes in the dtype of `x`; gradients of factors in float32 are returned as they are summed where `matmul_in` can.
    A call of torch costs the host microseconds, for which a small step waits: so `s` is in products that are made
    anyway, and views are made once.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropped: Tensor | None, A: Tensor, B: Tensor, fused: Fused, rows: list[Tensor]
    ) -> Tensor:
        """`s B A d + b`; appends to `rows` the matrices that `x` and it are, for the product that is to be added."""
        y, matrices, kept = LoRAFunction.change(ctx, x, dropped, A, B, fused)
        rows += matrices
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @once_differentiable  # its casts have no gradient of their own
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *LoRAFunction.gradients(ctx, grads[0], *ctx.saved_tensors), None, None

    @staticmethod
    def change(
        ctx: Any, x: Tensor, dropped: Tensor | None, A: Tensor, B: Tensor, fused: Fused
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        """`s B A d + b`, the matrices that `x` and it are, and what `gradients` wants kept."""
        layer, ops, s, again = fused
        ctx.layer, ctx.ops, ctx.s, ctx.apart, ctx.factor_dtype = layer, ops, s, dropped is not None, A.dtype
        ctx.recipe = None if again is None else again.recipe
        A, B, b, x_rows = A.to(x.dtype), B.to(x.dtype), ops.bias(layer), as_rows(x)
        h = scaled_matmul(x_rows if dropped is None else as_rows(dropped), A.t(), s)
        y = x.new_empty(*x.shape[:-1], B.shape[0])  # no view, which autograd would not have written to afterwards
        y_rows = as_rows(y)
        if b is None:
            torch.mm(h, B.t(), out=y_rows)
        else:
            torch.addmm(b.to(x.dtype), h, B.t(), out=y_rows)
        d = x if dropped is None else dropped
        return y, (x_rows, y_rows), (A, B, h, *((d,) if again is None else again.sources))

    @staticmethod
    def gradients(ctx: Any, dy: Tensor, A: Tensor, B: Tensor, h: Tensor, *of_d: Tensor) -> tuple[Tensor | None, ...]:
        """Those of `x`, `dropped`, `A` and `B`, as far as they are needed, from that of `y`."""
        needs_x, needs_d, needs_A, needs_B = ctx.needs_input_grad[:4]
        rows, shape = as_rows(dy), (*dy.shape[:-1], A.shape[1])
        dh = scaled_matmul(rows, B, ctx.s)
        # In this order the two that read `dy` are neighbours, for the cache; an input that is made again is gone before
        # the gradient of `x`, which is as large, and the dense weight that this takes before that of `dropped`.
        dB = matmul_in(ctx.factor_dtype, rows.t(), h) if needs_B else None
        dA = matmul_in(ctx.factor_dtype, dh.t(), as_rows(LoRAFunction.input(ctx, of_d, A.dtype))) if needs_A else None
        onto = torch.mm(dh, A) if needs_x and not ctx.apart else None
        dx = ctx.ops.product_t(ctx.layer, rows, onto).view(shape) if needs_x else None
        dd = torch.mm(dh, A).view(shape) if needs_d else None
        return dx, dd, dA, dB

    @staticmethod
    def input(ctx: Any, of_d: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """`d`, which was kept or is made again."""
        return of_d[0] if ctx.recipe is None else ctx.recipe.again(of_d, dtype)
