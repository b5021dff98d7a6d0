"""AdaLoRA: a budget of ranks that moves to the layers which need them."""

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_peft.core.addition import Call, Delta, dropped
from lit_peft.core.hf_peft import stores_transposed
from lit_peft.core.layers import layer_ops
from lit_peft.core.sharded import sharded_like, whole
from lit_peft.core.targets import Site
from lit_peft.faults import TrainingFault
from lit_peft.methods.base import TargetedMethod
from lit_peft.methods.checks import by_pattern, check_pattern, check_positive, check_range, check_rank, longest_first
from lit_peft.training.pruning import Pruned

_SAME = {
    "init_r": "init_r",
    "target_r": "target_r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "deltaT": "every",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orthogonal",
}
"""HF PEFT's names of arguments that mean the same."""


class AdaLoRA(TargetedMethod):
    """Adaptive budget allocation: `W' = W + s B diag(E) A`; `A`: [r, in], `E`: [r, 1], `B`: [out, r], `s = alpha / r`.

    Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", section 3. Each rank,
    a row of `A`, a number of `E` and a column of `B`, has an importance: of each of its entries the moving average of
    |p dL/dp| times that of its uncertainty, averaged over `A`'s row and `B`'s column, summed with `E`'s. Of all layers
    the least important are masked, `E = 0`, until `target_r` a layer are left on average: a cubic schedule from `tinit`
    to the end but `tfinal` (equation 12), after which the masks stay. Shapes stay too: the checkpoint and a step cost
    what `init_r` ranks cost. `E` starts at zero, so that training starts from the base.

    Importances, masks and the step are buffers of the additions: they belong to the module, are in its checkpoint, and
    are whole and equal on every rank. Gradients are read before clipping. Trains `r (in + out + 1)` parameters a layer,
    with two to three times that in memory for the importances.

    Args:
        init_r: Ranks of each layer at the start; half as many again as in the end, as in the paper (section 4.1).
        target_r: Ranks of a layer in the end, on average.
        alpha: Numerator of the scaling; null means init_r, so that `s` is 1. It is not changed as ranks are masked.
        dropout: Dropout on the adapter's input.
        tinit: Share of the steps before ranks are masked.
        tfinal: Share of the steps, the last ones, with the masks that were reached. Early stopping waits for them, and
            so does the best checkpoint.
        every: Steps between two choices of masks.
        beta1: Decay of the average of the importance; .85, the paper's.
        beta2: Decay of the average of its uncertainty; .85, the paper's.
        orthogonal: Weight of the penalty, the mean of `|A A^T - I|` and `|B^T B - I|` over the layers (equation 4).
        total_steps: Optimizer steps of the run; null: the trainer's.
        rank_pattern: Fewer ranks of particular layers: {role, name, glob or re: -> r}; the first that matches
            counts. Their `s` is that of `init_r`: it is how `lit_peft.save` writes layers that have lost ranks.
        **common: See `TargetedMethod` and `Method`.
    """

    learning_rate = 1e-2  # E starts at zero and A and B small: the best of a sweep on SST-2, docs/results/sst2.md
    may_change = frozenset({"dropout", "total_steps"})
    hf_peft: ClassVar[dict[str, Any]] = {"peft_type": "ADALORA"}
    hf_options: ClassVar[dict[str, Any]] = {
        "init_r": 12,
        "target_r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "deltaT": 1,
        "beta1": 0.85,
        "beta2": 0.85,
        "orth_reg_weight": 0.5,
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,
        "rank_pattern": {},
        # Change nothing, or stand in the tensors:
        **dict.fromkeys(("r", "bias", "fan_in_fan_out", "init_lora_weights", "megatron_core", "qalora_group_size")),
    }

    def __init__(
        self,
        init_r: int = 12,
        target_r: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        tinit: float = 0.1,
        tfinal: float = 0.3,
        every: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orthogonal: float = 0.5,
        total_steps: int | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_range("init_r", init_r, 1)
        check_range("target_r", target_r, 1, init_r)
        check_range("dropout", dropout, 0, 1, open_above=True)
        check_range("tinit", tinit, 0, 1, open_above=True)
        check_range("tfinal", tfinal, 0, 1 - tinit, open_above=True)
        check_range("every", every, 1)
        check_range("beta1", beta1, 0, 1, open_above=True)
        check_range("beta2", beta2, 0, 1, open_above=True)
        check_range("orthogonal", orthogonal, 0)
        check_range("total_steps", 1 if total_steps is None else total_steps, 1)
        for key, r in (rank_pattern or {}).items():
            check_range(f"rank_pattern[{key!r}]", r, 1, init_r)
        check_positive("alpha", 1.0 if alpha is None else alpha)
        check_positive("beta1", beta1)  # at 0 the uncertainty would be 0 throughout
        self.init_r, self.target_r, self.alpha, self.dropout = init_r, target_r, alpha, dropout
        self.tinit, self.tfinal, self.every = tinit, tfinal, every
        self.beta1, self.beta2, self.orthogonal, self.total_steps = beta1, beta2, orthogonal, total_steps
        self.rank_pattern = dict(rank_pattern or {})
        self._total = total_steps
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._gone: tuple[str, ...] = ()

    def plan(self, sites: list[Site]) -> None:
        check_pattern("rank_pattern", self.rank_pattern, sites)

    def build(self, site: Site) -> "AdaLoRADelta":
        r = by_pattern(self.rank_pattern, site, self.init_r)
        check_rank("init_r", r, site)
        scaling = self._alpha / (self.init_r + 1e-5)  # as the authors' code and HF PEFT have it
        return AdaLoRADelta(*site.size, r, scaling, self.dropout)

    @property
    def _alpha(self) -> float:
        return self.init_r if self.alpha is None else self.alpha

    # ------------------------------------------------------------------------------------------- in training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        steps = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if not 0 < steps < float("inf"):
            raise ValueError(
                "AdaLoRA's budget falls until the run ends: set trainer.max_epochs, max_steps or total_steps."
            )
        self._total = int(steps)
        self._gone = tuple(
            f"{path}.peft.{self.name}." for path, delta in self.additions(pl_module).items() if not delta.kept.any()
        )

    def lacks_gradient(self, name: str) -> bool:
        # A layer that had lost all of its ranks when this fit began, from a checkpoint.
        return name.startswith(self._gone)

    def notes(self, module: nn.Module) -> list[str]:
        ranks = [len(delta.kept) for delta in self.additions(module).values()]
        return [f"Ranks in all: {sum(ranks)} at first, {min(sum(ranks), len(ranks) * self.target_r)} in the end."]

    def pruned(self, module: nn.Module) -> Pruned:
        live = [delta.live() for delta in self.additions(module).values()]
        total = sum(map(len, live))
        return Pruned(int(torch.cat(live).sum()), total, "ranks", min(total, len(live) * self.target_r))

    def penalty(self, module: nn.Module) -> Tensor | None:
        if not self.orthogonal:
            return None
        terms = []
        for delta in self.additions(module).values():
            for rows in (whole(delta.lora_A), whole(delta.lora_B).t()):
                product = rows @ rows.t()
                terms.append(torch.linalg.matrix_norm(product - torch.eye(len(product)).to(product)))
        return self.orthogonal * torch.stack(terms).mean()

    def before_optimizer_step(self, module: nn.Module) -> None:
        """Keeps the step's gradients, which a module may have zeroed when it is made."""
        parameters = (p for delta in self.additions(module).values() for p in delta.parameters())
        self._gradients = {p: whole(p.grad).clone() for p in parameters if p.grad is not None}

    @torch.no_grad()
    def after_optimizer_step(self, module: nn.Module) -> None:
        """Updates the importances from the values after the step and the gradients before it, and masks.

        Raises:
            TrainingFault: When masks are due and there never was a gradient to choose them by.
        """
        if self._total is None:
            raise ValueError("AdaLoRA needs total_steps where no trainer tells it.")
        deltas = list(self.additions(module).values())
        gradients, self._gradients = self._gradients, {}
        step = int(deltas[0].step)
        for delta in deltas:
            delta.step += 1
        first, last = int(self.tinit * self._total), self._total - max(1, int(self.tfinal * self._total))
        finite = [gradient.isfinite().all() for gradient in gradients.values()]
        if step < max(1, last) and finite and torch.stack(finite).all():  # else a gradient scaler left the step out
            for delta in deltas:
                delta.weigh(gradients, self.beta1, self.beta2)
        if step == last or (first < step < last and step % self.every == 0):
            left = 0.0 if step == last else 1 - (step - first) / (last - first)
            _allocate(deltas, len(deltas) * self.target_r, left**3)
        elif step > last:
            for delta in deltas:
                delta.mask()

    # ---------------------------------------------------------------------------------------------- folders

    def exported(self, sites: list[tuple[Site, Any]]) -> tuple["AdaLoRA", list[tuple[Site, Any]]]:
        """What a folder holds in the place of this: the ranks that are left; see `lit_peft.saving.folder`."""
        left = [(site, delta.compacted()) for site, delta in sites]
        ranks = {site.path or "*": len(delta.kept) for site, delta in left}
        if all(delta is old for (_, delta), (_, old) in zip(left, sites, strict=True)):
            return self, left
        return type(self)(**self.arguments() | {"rank_pattern": longest_first(ranks)}), left

    def to_hf_peft(self, sites: list[tuple[Site, Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """HF PEFT's ADALORA, its schedule in steps; see `lit_peft.saving.folder`."""
        tensors = {f"{site.path}.{key}": value for site, delta in sites for key, value in delta.named_parameters()}
        steps = self.total_steps or 1000  # HF PEFT wants a number; `from_hf_peft` reads shares
        # By then it is only told how many ranks are left; the scaling stays that of init_r.
        ranks = {f"{site.path}.lora_E": [i < len(delta.kept) for i in range(self.init_r)] for site, delta in sites}
        return {
            **{theirs: getattr(self, ours) for theirs, ours in _SAME.items()},
            "lora_alpha": self._alpha,
            "tinit": int(self.tinit * steps),
            "tfinal": int(self.tfinal * steps),
            "total_step": steps,
            "rank_pattern": None if all(map(all, ranks.values())) else ranks,
            "bias": "none",
            "fan_in_fan_out": stores_transposed(sites),
        }, tensors

    @staticmethod
    def hf_has(site: Site, delta: Any) -> bool:
        """At linear layers, and at convolutions without groups and with no other padding than zeros."""
        ops, layer = layer_ops(site.layer), site.layer
        return ops.is_linear or (not ops.looks_up and ops.separable(layer) and layer.padding_mode == "zeros")

    @classmethod
    def from_hf_peft(cls, options: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
        """Arguments of the same AdaLoRA; see `lit_peft.saving.folder`."""
        r, steps = options["init_r"], options["total_step"]
        left = {key.removesuffix(".lora_E"): sum(kept) for key, kept in options["rank_pattern"].items()}
        return {
            **{ours: options[theirs] for theirs, ours in _SAME.items()},
            "tinit": options["tinit"] / steps,
            "tfinal": options["tfinal"] / steps,
            "rank_pattern": longest_first({path: left.get(path, r) for path in paths}) if left else {},
        }


def _allocate(deltas: list["AdaLoRADelta"], target: int, left: float) -> None:
    """Keeps of all layers' ranks the most important ones: `target` and this share of the others."""
    if not any(delta.importance_E.any() for delta in deltas):
        raise TrainingFault(
            "AdaLoRA must mask ranks and has seen no gradient of theirs: call before_optimizer_step once gradients are "
            "there and after_optimizer_step once parameters have moved, as a trainer does under automatic optimization."
        )
    sizes = [len(delta.kept) for delta in deltas]
    scores = torch.cat([delta.scores().to(deltas[0].kept.device) for delta in deltas])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    budget = target + int((len(scores) - target) * left)
    kept[scores.argsort(descending=True, stable=True)[:budget]] = True  # stable: equal on every rank, ties too
    for delta, mask in zip(deltas, kept.split(sizes), strict=True):
        delta.kept.copy_(mask)
        delta.mask()


class AdaLoRADelta(Delta):
    """`W + s B diag(E) A`; `lora_A`: [r, in], `lora_E`: [r, 1], `lora_B`: [out, r].

    Buffers: `importance_A` and so on, `uncertainty_A` and so on, of the shapes of these; `kept`: [r], False where a
    rank is masked; `step`: [1], the number of steps made.
    """

    kept: Tensor
    step: Tensor
    importance_E: Tensor

    def __init__(self, out_features: int, in_features: int, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_E = nn.Parameter(torch.zeros(r, 1))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))
        self.scaling, self.dropout = scaling, dropout
        for x in "AEB":
            for kind in ("importance", "uncertainty"):
                self.register_buffer(f"{kind}_{x}", torch.zeros(getattr(self, f"lora_{x}").shape))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool))
        self.register_buffer("step", torch.zeros(1, dtype=torch.long))

    def init(self, site: Site, generator: torch.Generator) -> None:
        for factor in (self.lora_A, self.lora_B):
            nn.init.normal_(factor, std=0.02, generator=generator)  # as in the authors' code

    def describe(self) -> dict[str, Any]:
        return {"r": len(self.lora_A), "scaling": round(self.scaling, 4)}

    def weigh(self, gradients: Mapping[nn.Parameter, Tensor], beta1: float, beta2: float) -> None:
        """Updates importances and uncertainties, equations 9 and 10."""
        for x in "AEB":
            p, importance, uncertainty = (
                getattr(self, f"{kind}_{x}") for kind in ("lora", "importance", "uncertainty")
            )
            if p in gradients:
                found = (whole(p) * gradients[p]).abs()
                importance.lerp_(found, 1 - beta1)
                uncertainty.lerp_((found - importance).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """The importance of each rank, [r]."""
        A, E, B = (getattr(self, f"importance_{x}") * getattr(self, f"uncertainty_{x}") for x in "AEB")
        return E[:, 0] + A.mean(1) + B.mean(0)

    @torch.no_grad()
    def mask(self) -> None:
        """Sets the numbers of `E` to zero whose ranks are not kept."""
        self.lora_E.mul_(sharded_like(self.kept[:, None].to(self.lora_E.dtype), self.lora_E))

    def after_averaging(self) -> None:
        self.mask()

    @torch.no_grad()
    def live(self) -> Tensor:
        """Which ranks count, [r] of booleans; what is masked may grow again between two choices."""
        return self.kept | (whole(self.lora_E)[:, 0] != 0)

    @torch.no_grad()
    def compacted(self) -> "AdaLoRADelta":
        """A copy without the ranks that are masked, or this where none is; of a layer that has lost all, one stays."""
        A, E, B = (whole(p) for p in (self.lora_A, self.lora_E, self.lora_B))
        left = self.live()
        left[:1] |= ~left.any()
        if left.all():
            return self
        twin = AdaLoRADelta(len(B), A.shape[1], int(left.sum()), self.scaling, self.dropout).to(A.device, A.dtype)
        twin.lora_A, twin.lora_E, twin.lora_B = (nn.Parameter(t) for t in (A[left], E[left], B[:, left]))
        return twin

    def factors(self) -> tuple[Tensor, Tensor]:
        """`diag(E) A` and `B`, as two factors of a LoRA."""
        return self.lora_E * self.lora_A, self.lora_B

    def weight(self, W: Tensor) -> Tensor:
        A, B = self.factors()
        return W + (self.scaling * B @ A).to(W.dtype)

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        y, d = call(x), dropped(x, self.dropout, self.training)
        return layer_ops(layer).add_low_rank(layer, y, d, *self.factors(), self.scaling)
