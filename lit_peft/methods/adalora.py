"""AdaLoRA: a budget of ranks that moves to the layers which need them."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_peft.core.addition import Call, Delta, dropped
from lit_peft.core.layers import layer_ops
from lit_peft.core.targets import Site
from lit_peft.methods.base import TargetedMethod, check_range, check_rank


class AdaLoRA(TargetedMethod):
    """Adaptive budget allocation: `W' = W + s B diag(E) A`; `A`: [r, in], `E`: [r, 1], `B`: [out, r], `s = alpha / r`.

    Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", section 3. Each rank,
    a row of `A`, a number of `E` and a column of `B`, has an importance: of each of its entries the moving average of
    |p dL/dp| times that of its uncertainty, averaged over `A`'s row and `B`'s column, summed with `E`'s. Of all layers
    the least important are masked, `E = 0`, until `target_r` a layer are left on average: a cubic schedule from `tinit`
    to the end but `tfinal`, after which the masks stay. Shapes stay too: the checkpoint and a step cost what `init_r`
    ranks cost. `E` starts at zero, so that training starts from the base.

    The importances are part of the checkpoint. Trains `r (in + out + 1)` parameters a layer, with two to three times
    that in memory for the importances.

    Args:
        init_r: Ranks of each layer at the start; half as many again as in the end, as in the paper (section 4.1).
        target_r: Ranks of a layer in the end, on average.
        alpha: Numerator of the scaling; null means init_r, so that `s` is 1. It is not changed as ranks are masked.
        dropout: Dropout on the adapter's input.
        tinit: Share of the steps before ranks are masked.
        tfinal: Share of the steps, the last ones, with the masks that were reached.
        every: Steps between two choices of masks.
        beta1: Decay of the average of the importance; .85, the paper's.
        beta2: Decay of the average of its uncertainty; .85, the paper's.
        orthogonal: Weight of the penalty, the mean of `|A A^T - I|` and `|B^T B - I|` over the layers (equation 4).
        total_steps: Optimizer steps of the run; null: the trainer's.
        **common: See `TargetedMethod` and `Method`.
    """

    learning_rate = 1e-2  # E starts at zero and A and B small: the best of a sweep on SST-2, docs/results/sst2.md
    may_change = frozenset({"dropout", "total_steps"})

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
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha}.")
        self.init_r, self.target_r, self.alpha, self.dropout = init_r, target_r, alpha, dropout
        self.tinit, self.tfinal, self.every = tinit, tfinal, every
        self.beta1, self.beta2, self.orthogonal, self.total_steps = beta1, beta2, orthogonal, total_steps
        self._step = 0
        self._importance: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}
        self._total = total_steps

    def build(self, site: Site) -> "AdaLoRADelta":
        check_rank("init_r", self.init_r, site)
        alpha = self.init_r if self.alpha is None else self.alpha
        return AdaLoRADelta(*site.size, self.init_r, alpha / self.init_r, self.dropout)

    # ------------------------------------------------------------------------------------------- in training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        steps = trainer.estimated_stepping_batches if self.total_steps is None else self.total_steps
        if not 0 < steps < float("inf"):
            raise ValueError(
                "AdaLoRA's budget falls until the run ends: set trainer.max_epochs, max_steps or total_steps."
            )
        self._total = int(steps)

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "importance": self._importance,
            "uncertainty": self._uncertainty,
            "masks": self._masks,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step, self._masks = state_dict["step"], dict(state_dict["masks"])
        self._importance, self._uncertainty = dict(state_dict["importance"]), dict(state_dict["uncertainty"])

    def notes(self, module: nn.Module) -> list[str]:
        n = len(self.additions(module))
        return [f"Ranks in all: {n * self.init_r} at first, {n * self.target_r} in the end."]

    def penalty(self, module: nn.Module) -> Tensor | None:
        if not self.orthogonal:
            return None
        terms = []
        for delta in self.additions(module).values():
            for rows in (delta.lora_A, delta.lora_B.t()):
                product = rows @ rows.t()
                terms.append(torch.linalg.matrix_norm(product - torch.eye(len(product)).to(product)))
        return self.orthogonal * torch.stack(terms).mean()

    def after_optimizer_step(self, module: nn.Module) -> None:
        """Updates the importances from the gradients of the step that was made, and masks."""
        if self._total is None:
            raise ValueError("AdaLoRA needs total_steps where no trainer tells it.")
        step, deltas = self._step, self.additions(module)
        self._step += 1
        first, last = int(self.tinit * self._total), self._total - int(self.tfinal * self._total)
        if step < last:
            self._weigh(deltas)
        if step <= first:
            return
        if step > last and self._masks:
            for path, delta in deltas.items():
                delta.mask(self._masks[path].to(delta.lora_E.device))
        elif step >= last or step % self.every == 0:
            left = max(0.0, 1 - (step - first) / max(1, last - first))
            self._mask(deltas, int(len(deltas) * (self.target_r + (self.init_r - self.target_r) * left**3)))

    @torch.no_grad()
    def _weigh(self, deltas: dict[str, "AdaLoRADelta"]) -> None:
        tensors = [
            (f"{path}.{key}", p) for path, d in deltas.items() for key, p in d.named_parameters() if p.grad is not None
        ]
        if not tensors or not torch.stack([p.grad.isfinite().all() for _, p in tensors]).all():  # type: ignore[union-attr]
            return  # a step that a gradient scaler left out
        for name, p in tensors:
            found = (p * p.grad).abs()  # type: ignore[operator]
            zero = torch.zeros_like(p)
            average = self._importance.get(name, zero).to(p.device).lerp(found, 1 - self.beta1)
            uncertain = self._uncertainty.get(name, zero).to(p.device).lerp((found - average).abs(), 1 - self.beta2)
            self._importance[name], self._uncertainty[name] = average, uncertain

    @torch.no_grad()
    def _mask(self, deltas: dict[str, "AdaLoRADelta"], budget: int) -> None:
        """Keeps so many ranks of all layers, the most important ones."""
        if not self._importance:
            return
        scores = {path: self._scores(path) for path in deltas}
        everything = torch.cat(list(scores.values()))
        gone = len(everything) - budget
        threshold = everything.kthvalue(gone).values if gone > 0 else everything.new_tensor(-1.0)
        for path, delta in deltas.items():
            self._masks[path] = scores[path] > threshold
            delta.mask(self._masks[path])

    def _scores(self, path: str) -> Tensor:
        A, E, B = (
            self._importance[f"{path}.lora_{x}"] * self._uncertainty[f"{path}.lora_{x}"] for x in ("A", "E", "B")
        )
        return E[:, 0] + A.mean(1) + B.mean(0)


class AdaLoRADelta(Delta):
    """`W + s B diag(E) A`; `lora_A`: [r, in], `lora_E`: [r, 1], `lora_B`: [out, r]."""

    def __init__(self, out_features: int, in_features: int, r: int, scaling: float, dropout: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_E = nn.Parameter(torch.zeros(r, 1))
        self.lora_B = nn.Parameter(torch.empty(out_features, r))
        self.scaling, self.dropout = scaling, dropout

    def init(self, site: Site, generator: torch.Generator) -> None:
        for factor in (self.lora_A, self.lora_B):
            nn.init.normal_(factor, std=0.02, generator=generator)  # as in the authors' code

    def describe(self) -> dict[str, Any]:
        return {"r": len(self.lora_A), "scaling": self.scaling}

    def mask(self, keep: Tensor) -> None:
        """Sets the numbers of `E` to zero that are not kept."""
        with torch.no_grad():
            self.lora_E.mul_(keep[:, None])

    def weight(self, W: Tensor) -> Tensor:
        return W + (self.scaling * self.lora_B @ (self.lora_E * self.lora_A)).to(W.dtype)

    def forward(self, layer: nn.Module, call: Call, x: Tensor) -> Tensor:
        y, d = call(x), dropped(x, self.dropout, self.training)
        return layer_ops(layer).add_low_rank(layer, y, d, self.lora_E * self.lora_A, self.lora_B, self.scaling)
