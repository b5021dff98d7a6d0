"""Sparse LoRA: entries or whole ranks of a LoRA become exactly zero while it trains."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_peft.core.sharded import sharded_like, whole
from lit_peft.core.targets import Site
from lit_peft.methods.checks import check_choice, check_positive, check_range, longest_first
from lit_peft.methods.lora import LoRA, LoRADelta
from lit_peft.training.pruning import Pruned

GATE = 0.03
"""Where gates start. They act as `g / GATE`, so that training starts as LoRA's; Adam moves a parameter by about the
rate a step, and would not bring it from 1 to zero within a short run. To plain gradient descent they are steep."""


class SparseLoRA(LoRA):
    """LoRA with zeros: `W' = W + s B A` or `W + s B diag(g) A`, `A`: [r, in], `B`: [out, r], `g`: [r], `s = alpha / r`.

    A share of zeros rises as `target (1 - (1 - t)^3)` (Zhu and Gupta 2017, "To prune, or not to prune", section 3) and
    ends at the target within rounding, whatever optimizer, rates and steps. What is chosen is masked, zero for good:

    - structured: gates of the ranks that change their layer the least, by `s |g| |A_r| |B_r|` over all layers. Ding et
      al. 2023, "Sparse Low-rank Adaptation of Pre-trained Language Models" (SoRA), section 3, has the gates. They
      train, `r` parameters more a layer.
    - magnitude: the smallest entries of each `A` and each `B`.
    - l1: the same by the penalty's proximal operator, `p <- sign(p) max(|p| - h, 0)`, `h` the quantile that meets the
      share: survivors shrink too. It is what `l |p|` does in `every` steps of rate `lr`, with `l = h / (every lr)`.

    A `strength` is a fixed `l` in the place of a target, for l1 and structured: `L_task + l |A| + l |B|`, or `L_task +
    l |g|`. The optimizer steps along the task's gradient alone, then the proximal operator shrinks by `lr l`. Under
    Adam that is apart from the adaptive step, as AdamW's decay is: what is pushed by less than the share `l` of a full
    step falls to zero, and may come back. How much does depends on the sum of the rates (docs/results/sst2.md).

    The penalty is added to the loss as a number, without a gradient, which would shrink twice, and logged as
    `train/l1`; the share of gates or entries that is masked or zero as `train/sparsity`. Shapes stay in training, which
    costs what LoRA does, and in its checkpoints. `lit_peft.save` drops ranks whose gate, row of `A` or column of `B` is
    zero and folds the gates into `A`: an ordinary LoRA to HF PEFT. `lit_peft.load` gives a SparseLoRA of what is left
    that trains on, to the zeros that are still to come.

    Args:
        sparsity: structured, magnitude or l1. structured, because whole ranks are the zeros that make an adapter
            smaller and faster without special kernels.
        strength: `l` of a fixed penalty, without a target.
        target: Share of the gates or entries that is zero in the end; null means .5, unless there is a strength.
        begin: Share of the steps before anything is masked: `B` must have moved from its zeros.
        end: Share of the steps after which the target is reached; what is left then has time to settle. Early stopping
            waits for it, and so does the best checkpoint.
        every: Steps between two choices of masks, which sort all entries.
        **lora: As for LoRA.
    """

    _gone: tuple[str, ...] = ()
    may_change = LoRA.may_change | {"strength", "target", "begin", "end", "every"}

    def __init__(
        self,
        sparsity: Literal["structured", "magnitude", "l1"] = "structured",
        strength: float | None = None,
        target: float | None = None,
        begin: float = 0.1,
        end: float = 0.7,
        every: int = 10,
        **lora: Any,
    ) -> None:
        super().__init__(**lora)
        check_choice("sparsity", sparsity, ("structured", "magnitude", "l1"))
        check_positive("strength", 1.0 if strength is None else strength)
        if strength is not None and (sparsity == "magnitude" or target is not None):
            other = "sparsity = magnitude" if target is None else f"target = {target}"
            raise ValueError(f"strength = {strength} is a fixed penalty, and {other} asks for a share: leave one out.")
        self._target = 0.5 if target is None else target
        check_range("target", self._target, 0, 1, open_above=True)
        check_range("begin", begin, 0, 1, open_above=True)
        check_range("end", end, begin, 1)
        check_range("every", every, 1)
        self.sparsity, self.strength, self.target = sparsity, strength, target
        self.begin, self.end, self.every = begin, end, every

    def delta(self, site: Site, r: int, alpha: float, scaling: float) -> "SparseLoRADelta":
        masks = self.strength is None
        return SparseLoRADelta(self.sparsity, masks, *site.size, r, alpha, scaling, self.dropout, self.init)

    def notes(self, module: nn.Module) -> list[str]:
        if self.strength is not None:
            return [f"Sparsity: each step shrinks by {self.strength:g} x its rate; see train/sparsity."]
        goal = f"{self._target:.0%} of {'the ranks' if self.sparsity == 'structured' else 'A and B'} are masked"
        return [f"Sparsity: {goal}, between {self.begin:.0%} and {self.end:.0%} of the steps."]

    def pruned(self, module: nn.Module) -> Pruned:
        sizes = [tensor.numel() for tensor in self._countable(module)]
        total, parts = sum(sizes), "entries of A and B"
        if self.sparsity == "structured":
            sizes, parts = [total], "ranks"
        goal = sum(n - round(self._target * n) for n in sizes) if self.strength is None else None
        return Pruned(int(self._kept(module)), total, parts, goal)

    def lacks_gradient(self, name: str) -> bool:
        return name.startswith(self._gone)

    # ------------------------------------------------------------------------------------------- in training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._steps_in_all = trainer.estimated_stepping_batches  # anew in each fit: max_epochs may have changed
        self._find_gone(pl_module)
        if self.strength is None and math.isinf(self._steps_in_all):
            raise ValueError("The masks' schedule needs the run's end: set trainer.max_epochs or max_steps.")

    def penalty(self, module: nn.Module) -> Tensor | None:
        """`l |p|`, a number without a gradient: `sparsify` does what it would."""
        if self.strength is None and self.sparsity != "l1":
            return None
        deltas = self.additions(module).values()
        norms = whole(torch.stack(torch._foreach_norm([p.detach() for d in deltas for p in d.sparse()], 1)).float())
        strengths = torch.cat([d.strengths for d in deltas]) if self.strength is None else self.strength
        value = (norms * strengths).sum()
        self.log_step(module, "train/l1", value)
        return value

    def before_optimizer_step(self, module: nn.Module) -> None:
        """Keeps what is masked out of the norm that is clipped, and out of moments."""
        for delta in self.additions(module).values():
            delta.mask([p.grad for p in delta.sparse()])

    def after_optimizer_step(self, module: nn.Module) -> None:
        trainer: pl.Trainer = module.trainer  # type: ignore[assignment]
        self.sparsify(module, trainer.optimizers, trainer.global_step + 1, int(self._steps_in_all))
        self.log_step(module, "train/sparsity", self.achieved(module))
        if not self._watch.ended:
            self._find_gone(module)

    @torch.no_grad()
    def sparsify(self, module: nn.Module, optimizers: Iterable[Optimizer], step: int, steps: int) -> None:
        """Shrinks or masks, once the parameters have moved; a loop without a trainer calls this after each step.

        Args:
            module: What the method is attached to.
            optimizers: Those that moved its parameters, for their rates.
            step: Number of steps made, this one included.
            steps: Number of steps of the whole run.
        """
        deltas = list(self.additions(module).values())
        rates = {id(p): float(group["lr"]) for o in optimizers for group in o.param_groups for p in group["params"]}
        fixed = self.strength or 0.0
        for p in (p for delta in deltas for p in delta.sparse() if p.grad is not None and fixed):
            if p.dtype == torch.bfloat16:
                raise ValueError("Shrinking gets lost in bfloat16's rounding: train with adapter_dtype float32.")
            threshold = rates[id(p)] * fixed
            if self.sparsity == "structured" and threshold >= GATE:
                shrinks = f"A step at rate {rates[id(p)]:g} with strength {fixed:g} shrinks gates by {threshold:g}"
                raise ValueError(f"{shrinks}, and they start at {GATE}: lower one of the two.")
            p.sub_(p.clamp(-threshold, threshold))  # below the threshold p - p, an exact zero
        first, last = int(self.begin * steps), max(1, math.ceil(self.end * steps))
        if not fixed and first < step and (step in (last, steps) or (step - first) % self.every == 0):
            done = min(1.0, (step - first) / max(1, last - first))
            self._choose(deltas, self._target * (1 - (1 - done) ** 3), rates)
        for delta in deltas:
            delta.mask(delta.sparse())

    def _choose(self, deltas: list["SparseLoRADelta"], share: float, rates: Mapping[int, float]) -> None:
        """Masks this share of the gates, or of the entries of each factor."""
        if self.sparsity == "structured":
            _mask_smallest([delta.mask_gate for delta in deltas], [delta.sizes() for delta in deltas], share)
            return
        for delta, i in ((delta, i) for delta in deltas for i in range(2)):
            p = delta.sparse()[i]
            largest = _mask_smallest([delta.masks()[i]], [whole(p).abs()], share)
            if self.sparsity == "l1":
                p.sub_(p.clamp(-largest, largest))
                rate = rates.get(id(p), 0.0)
                delta.strengths[i] = largest / (self.every * rate) if rate else 0.0

    def achieved(self, module: nn.Module) -> Tensor:
        """The share of gates, or of entries, that is zero or masked: a tensor, without waiting for a GPU."""
        return 1 - self._kept(module) / sum(tensor.numel() for tensor in self._countable(module))

    @torch.no_grad()
    def _kept(self, module: nn.Module) -> Tensor:
        return whole(torch.stack([tensor.count_nonzero() for tensor in self._countable(module)]).sum())

    def _countable(self, module: nn.Module) -> list[Tensor]:
        """The tensors whose zeros count: the masks, where there are any."""
        return [t for delta in self.additions(module).values() for t in (delta.masks() or delta.sparse())]

    def _find_gone(self, module: nn.Module) -> None:
        """Notes the layers that have lost all of their ranks, which get no gradient."""
        live = {path: delta.live().any() for path, delta in self.additions(module).items()}
        self._gone = tuple(f"{path}.peft.{self.name}." for path, any_ in live.items() if not any_)

    # ---------------------------------------------------------------------------------------------- folders

    def exported(self, sites: list[tuple[Site, Any]]) -> tuple["SparseLoRA", list[tuple[Site, Any]]]:
        """What a folder holds in the place of this: the ranks that are left; see `lit_peft.saving.folder`."""
        left = [(site, delta.compacted(site, self.use_rslora)) for site, delta in sites]
        if all(len(d.lora_A) == len(old.lora_A) for (_, d), (_, old) in zip(left, sites, strict=True)):
            return self, left
        changes: dict[str, Any] = {
            "rank_pattern": longest_first({site.path or "*": len(delta.lora_A) for site, delta in left}),
            "alpha_pattern": longest_first({site.path or "*": delta.alpha for site, delta in left}),
        }
        if self.strength is None:  # of what is left, the share that is to go yet
            old, new = (sum(p.numel() for _, d in pairs for p in d.sparse()) for pairs in (sites, left))
            changes["target"] = max(0.0, 1 - (1 - self._target) * old / new)
        return type(self)(**self.arguments() | changes), left


def _mask_smallest(masks: list[Tensor], sizes: list[Tensor], share: float) -> Tensor:
    """Extends masks to this share of all their entries, by size; those that are masked already come first.

    Returns:
        The largest size that is masked anew, 0 where none is.
    """
    found = [size.masked_fill(~mask, -1.0).flatten() for size, mask in zip(sizes, masks, strict=True)]
    flat = torch.cat([size.to(found[0].device) for size in found])
    smallest = flat.argsort(stable=True)[: round(share * len(flat))]  # stable: equal on every rank, ties too
    kept = torch.ones_like(flat, dtype=torch.bool).index_fill_(0, smallest, False)
    for mask, part in zip(masks, kept.split([mask.numel() for mask in masks]), strict=True):
        mask &= part.view_as(mask).to(mask.device)
    return flat[smallest[-1:]].clamp(min=0).sum()


class SparseLoRADelta(LoRADelta):
    """`W + s B diag(g / GATE) A` (structured), or LoRA's equation.

    Buffers, where it has masks: `mask_gate`: [r], or `mask_A`, `mask_B`, False where something is zero for good; of l1
    `strengths`: [2], the penalty's `l` of `A` and `B` at the last choice.
    """

    mask_gate: Tensor
    strengths: Tensor

    def __init__(self, sparsity: str, masks: bool, *args: Any) -> None:
        super().__init__(*args)
        self.sparsity = sparsity
        if sparsity == "structured":
            self.gate = nn.Parameter(torch.full((len(self.lora_A),), GATE))
        names = ("gate",) if sparsity == "structured" else ("A", "B")
        for name, p in zip(names, self.sparse(), strict=True) if masks else ():
            self.register_buffer(f"mask_{name}", torch.ones_like(p, dtype=torch.bool))
        if masks and sparsity == "l1":
            self.register_buffer("strengths", torch.zeros(2))

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"sparsity": self.sparsity}

    def factors(self) -> tuple[Tensor, Tensor]:
        gated = self.sparsity == "structured"
        return (self.gate / GATE)[:, None] * self.lora_A if gated else self.lora_A, self.lora_B

    def sparse(self) -> list[nn.Parameter]:
        """The tensors in which zeros are made."""
        return [self.gate] if self.sparsity == "structured" else [self.lora_A, self.lora_B]

    def masks(self) -> list[Tensor]:
        """Their masks, if it has them."""
        return [buffer for buffer in self.buffers() if buffer.dtype == torch.bool]

    @torch.no_grad()
    def mask(self, tensors: Sequence[Tensor | None]) -> None:
        """Zeroes what is masked in these, the sparse tensors or their gradients."""
        for tensor, mask in zip(tensors, self.masks(), strict=False):
            if tensor is not None:
                tensor.masked_fill_(sharded_like(~mask, tensor), 0.0)

    def sizes(self) -> Tensor:
        """Frobenius norm of what each rank adds to the weight, [r]."""
        A, B = whole(self.lora_A).float().norm(dim=1), whole(self.lora_B).float().norm(dim=0)
        return self.scaling * whole(self.gate).abs() * A * B

    def after_averaging(self) -> None:
        self.mask(self.sparse())

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
        masks, sizes = bool(self.masks()), (r, alpha, self.scaling)
        twin = SparseLoRADelta(self.sparsity, masks, *site.size, *sizes, self.dropout, self.init_kind)
        twin.to(keep.device, self.lora_A.dtype)
        if not keep.any():
            twin.init(site, torch.Generator().manual_seed(0))  # one that changes nothing yet, and can be trained
            return twin
        A, B = (whole(factor) for factor in self.factors())
        twin.lora_A, twin.lora_B = nn.Parameter(A[keep]), nn.Parameter(B[:, keep])
        if masks and self.sparsity != "structured":
            mask_A, mask_B = self.masks()
            twin.mask_A, twin.mask_B = mask_A[keep], mask_B[:, keep]
        return twin
