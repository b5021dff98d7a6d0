"""Sparse LoRA: entries or whole ranks of a LoRA become exactly zero while it trains."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_peft.core.checkpoint import whole
from lit_peft.core.targets import Site
from lit_peft.methods.base import check_choice, check_range, longest_first
from lit_peft.methods.lora import LoRA, LoRADelta

GATE = 0.03
"""Where gates start. They act as `g / GATE`, so that training starts as LoRA's; Adam moves a parameter by about the
rate a step, and would not bring it from 1 to zero within a short run. To plain gradient descent they are steep."""


class SparseLoRA(LoRA):
    """LoRA with zeros: `W' = W + s B A` or `W + s B diag(g) A`, `A`: [r, in], `B`: [out, r], `g`: [r], `s = alpha / r`.

    Three ways, by `sparsity`:

    - structured: a gate on each rank, under an L1 penalty. Ding et al. 2023, "Sparse Low-rank Adaptation of
      Pre-trained Language Models" (SoRA), section 3. The gates train, `r` parameters more a layer.
    - magnitude: the smallest entries of each `A` and each `B` are masked, a share of them that rises as
      `target (1 - (1 - t)^3)`. Zhu and Gupta 2017, "To prune, or not to prune", section 3. What is masked stays zero.
    - l1: the penalty on `A` and `B` themselves.

    The objective of l1 and structured is `L_task + l |A| + l |B|`, or `L_task + l |g|`. The optimizer steps along the
    task's gradient alone, then the penalty's proximal operator shrinks, `p <- sign(p) max(|p| - lr l, 0)` with the
    rate of that step: this makes zeros exact. So the penalty has no gradient of its own, which would shrink twice; it
    is added to the loss as a number, and logged as `train/l1`. Under Adam the shrinking is apart from the adaptive
    step, as AdamW's decay is: what is pushed by less than the share `l` of a full step falls to zero. Shrunk to zero,
    an entry or a gate may come back while training goes on.

    Shapes stay in training, which therefore costs what LoRA does, and in its checkpoints. `lit_peft.save` drops ranks
    whose gate, row of `A` or column of `B` is zero and folds the gates into `A`: an ordinary LoRA to HF PEFT, and
    with what is left `lit_peft.load` gives a SparseLoRA that trains on. `train/sparsity` is logged: the share of gates
    (structured), masked entries (magnitude) or entries (l1) that are zero.

    Args:
        sparsity: structured, magnitude or l1. structured, because whole ranks are the zeros that make an adapter
            smaller and faster without special kernels.
        strength: `l`. null means .5 for gates and .35 for entries, with which Adam leaves about half of either in
            short runs; what survives falls with the sum of the rates, so longer runs can do with less.
        target: Share of the entries that magnitude masks in the end.
        begin: Share of the steps before it masks any: `B` must have moved from its zeros.
        end: Share of the steps after which the target is reached; what is left then has time to settle.
        every: Steps between two choices of masks, which sort all entries.
        **lora: As for LoRA.
    """

    _gone: tuple[str, ...] = ()
    may_change = LoRA.may_change | {"strength", "target", "begin", "end", "every"}

    def __init__(
        self,
        sparsity: Literal["structured", "magnitude", "l1"] = "structured",
        strength: float | None = None,
        target: float = 0.5,
        begin: float = 0.1,
        end: float = 0.7,
        every: int = 10,
        **lora: Any,
    ) -> None:
        super().__init__(**lora)
        check_choice("sparsity", sparsity, ("structured", "magnitude", "l1"))
        if strength is not None and not 0 < strength < math.inf:
            raise ValueError(f"strength must be above 0, not {strength}.")
        check_range("target", target, 0, 1, open_above=True)
        check_range("begin", begin, 0, 1, open_above=True)
        check_range("end", end, begin, 1)
        check_range("every", every, 1)
        self.sparsity, self.strength, self.target = sparsity, strength, target
        self.begin, self.end, self.every = begin, end, every

    def delta(self, site: Site, r: int, alpha: float, scaling: float) -> "SparseLoRADelta":
        return SparseLoRADelta(self.sparsity, *site.size, r, alpha, scaling, self.dropout, self.init)

    def notes(self, module: nn.Module) -> list[str]:
        if self.sparsity != "magnitude":
            return [
                f"Sparsity: {self.sparsity}, each step shrinks by {self._strength:g} x its rate; see train/sparsity."
            ]
        return [f"Sparsity: {self.target:.0%} of A and B masked, from {self.begin:.0%} to {self.end:.0%} of the steps."]

    def lacks_gradient(self, name: str) -> bool:
        # A layer that had lost all of its ranks when this fit began, from a checkpoint.
        return name.startswith(self._gone)

    # ------------------------------------------------------------------------------------------- in training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps_in_all = trainer.estimated_stepping_batches  # anew in each fit: max_epochs may have changed
        self._gone = tuple(
            f"{path}.peft.{self.name}." for path, delta in self.additions(pl_module).items() if not delta.live().any()
        )
        if self.sparsity == "magnitude" and math.isinf(self._steps_in_all):
            raise ValueError("The masks' schedule needs the run's end: set trainer.max_epochs or max_steps.")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        reached = self.achieved(pl_module).item()
        if self.sparsity == "magnitude" and reached < self.target - 0.02:
            rank_zero_warn(
                f"Training ended before {self.end:.0%} of its steps: {reached:.0%} of the entries are masked, "
                f"not {self.target:.0%}."
            )

    def penalty(self, module: nn.Module) -> Tensor | None:
        """`l |p|`, a number without a gradient: `sparsify` does what it would."""
        if self.sparsity == "magnitude":
            return None
        tensors = [p.detach() for delta in self.additions(module).values() for p in delta.shrunk()]
        value = self._strength * whole(torch.stack(torch._foreach_norm(tensors, 1)).float().sum())
        self.log_step(module, "train/l1", value)
        return value

    def before_optimizer_step(self, module: nn.Module) -> None:
        """Keeps what is masked out of the norm that is clipped, and out of moments."""
        for p, mask in self._masked(module):
            if p.grad is not None:
                p.grad.masked_fill_(~mask, 0.0)

    def after_optimizer_step(self, module: nn.Module) -> None:
        trainer: pl.Trainer = module.trainer  # type: ignore[assignment]
        self.sparsify(module, trainer.optimizers, trainer.global_step + 1, int(self._steps_in_all))
        self.log_step(module, "train/sparsity", self.achieved(module))

    @torch.no_grad()
    def sparsify(self, module: nn.Module, optimizers: Iterable[Optimizer], step: int, steps: int) -> None:
        """Shrinks or masks, once the parameters have moved; a loop without a trainer calls this after each step.

        Args:
            module: What the method is attached to.
            optimizers: Those that moved its parameters, for their rates.
            step: Number of steps made, this one included.
            steps: Number of steps of the whole run.
        """
        rates = {id(p): float(group["lr"]) for o in optimizers for group in o.param_groups for p in group["params"]}
        for p in (p for delta in self.additions(module).values() for p in delta.shrunk() if p.grad is not None):
            if p.dtype == torch.bfloat16:
                raise ValueError("Shrinking gets lost in bfloat16's rounding: train with adapter_dtype float32.")
            threshold = rates[id(p)] * self._strength
            if self.sparsity == "structured" and threshold >= GATE:
                raise ValueError(
                    f"A step at rate {rates[id(p)]:g} with strength {self._strength:g} shrinks gates by {threshold:g}, "
                    f"and they start at {GATE}: lower one of the two."
                )
            p.sub_(p.clamp(-threshold, threshold))  # below the threshold p - p, an exact zero
        first, last = int(self.begin * steps), max(1, math.ceil(self.end * steps))
        chooses = first < step and (step in (last, steps) or (step - first) % self.every == 0)
        for p, mask in self._masked(module):
            if chooses:
                done = min(1.0, (step - first) / max(1, last - first))
                _mask_smallest(p, mask, self.target * (1 - (1 - done) ** 3))
            p.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def achieved(self, module: nn.Module) -> Tensor:
        """The share of gates, or of entries, that is zero or masked."""
        tensors = [t for delta in self.additions(module).values() for t in (delta.masks() or delta.shrunk())]
        kept = whole(torch.stack([t.count_nonzero() for t in tensors]).sum())
        return 1 - kept / sum(t.numel() for t in tensors)

    @property
    def _strength(self) -> float:
        return self.strength if self.strength is not None else 0.5 if self.sparsity == "structured" else 0.35

    def _masked(self, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        pairs = [
            pair
            for delta in self.additions(module).values()
            for pair in zip((delta.lora_A, delta.lora_B), delta.masks(), strict=False)
        ]
        if any(hasattr(p, "device_mesh") for p, _ in pairs):
            raise ValueError("Masks by magnitude need whole factors, and these are sharded: use structured or l1.")
        return pairs

    # ---------------------------------------------------------------------------------------------- folders

    def exported(self, sites: list[tuple[Site, Any]]) -> tuple["SparseLoRA", list[tuple[Site, Any]]]:
        """What a folder holds in the place of this: the ranks that are left; see `lit_peft.methods.folder`."""
        left = [(site, delta.compacted(site, self.use_rslora)) for site, delta in sites]
        fewer = [(s, d) for (s, d), (_, old) in zip(left, sites, strict=True) if len(d.lora_A) < len(old.lora_A)]
        if not fewer:
            return self, left
        ranks = longest_first({site.path or "*": len(delta.lora_A) for site, delta in fewer})
        alphas = longest_first({site.path or "*": delta.alpha for site, delta in fewer})
        changes = {"rank_pattern": ranks | self.rank_pattern, "alpha_pattern": alphas | self.alpha_pattern}
        return type(self)(**self.arguments() | changes), left


def _mask_smallest(p: Tensor, mask: Tensor, share: float) -> None:
    """Extends the mask to this share of the entries; those that are masked already come first."""
    sizes = p.abs().masked_fill_(~mask, -1.0).flatten()
    smallest = sizes.argsort(stable=True)[: round(share * mask.numel())]  # stable: equal on every rank, ties too
    mask.view(-1)[smallest] = False


class SparseLoRADelta(LoRADelta):
    """`W + s B diag(g / GATE) A` (structured), or LoRA's equation; `mask_A`, `mask_B`: False where magnitude pruned."""

    mask_A: Tensor
    mask_B: Tensor

    def __init__(self, sparsity: str, *args: Any) -> None:
        super().__init__(*args)
        self.sparsity = sparsity
        if sparsity == "structured":
            self.gate = nn.Parameter(torch.full((len(self.lora_A),), GATE))
        elif sparsity == "magnitude":
            self.register_buffer("mask_A", torch.ones_like(self.lora_A, dtype=torch.bool))
            self.register_buffer("mask_B", torch.ones_like(self.lora_B, dtype=torch.bool))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sparsity": self.sparsity}

    def factors(self) -> tuple[Tensor, Tensor]:
        gated = self.sparsity == "structured"
        return (self.gate / GATE)[:, None] * self.lora_A if gated else self.lora_A, self.lora_B

    def shrunk(self) -> list[nn.Parameter]:
        """The tensors under an L1 penalty."""
        if self.sparsity == "structured":
            return [self.gate]
        return [self.lora_A, self.lora_B] if self.sparsity == "l1" else []

    def masks(self) -> list[Tensor]:
        """The masks of `A` and `B`, if it has them."""
        return [self.mask_A, self.mask_B] if self.sparsity == "magnitude" else []

    @torch.no_grad()
    def after_averaging(self) -> None:
        for factor, mask in zip((self.lora_A, self.lora_B), self.masks(), strict=False):
            factor.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def live(self) -> Tensor:
        """Which ranks change something, [r] of booleans."""
        A, B = (whole(factor.detach()) for factor in self.factors())
        return A.any(1) & (B.any(0) | ~B.any())  # a B of zeros throughout is where training starts

    @torch.no_grad()
    def compacted(self, site: Site, use_rslora: bool) -> "SparseLoRADelta":
        """A copy without the ranks that change nothing, its gates folded into `A`."""
        keep = self.live()
        r = max(1, int(keep.sum()))  # HF PEFT has no rank 0
        alpha = self.scaling * (math.sqrt(r) if use_rslora else r)
        twin = SparseLoRADelta(self.sparsity, *site.size, r, alpha, self.scaling, self.dropout, self.init_kind)
        twin.to(keep.device, self.lora_A.dtype)
        if not keep.any():
            twin.init(site, torch.Generator().manual_seed(0))  # one that changes nothing yet, and can be trained
            return twin
        A, B = (whole(factor) for factor in self.factors())
        twin.lora_A, twin.lora_B = nn.Parameter(A[keep]), nn.Parameter(B[:, keep])
        if self.masks():
            twin.mask_A, twin.mask_B = self.mask_A[keep], self.mask_B[:, keep]
        return twin
