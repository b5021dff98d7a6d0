"""What every metric of this package shares: the check of its inputs, and sums that keep their precision."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_peft.faults import TrainingFault


def checked_logits(preds: Tensor, target: Tensor, num_classes: int | None = None) -> Tensor:
    """Refuse what would give a wrong number in silence, and return the logits ready for a softmax.

    Args:
        preds: Logits [N, C], any float dtype, C >= 2. A logit of -inf is a class that is ruled out.
        target: Class indices [N], any integer dtype, in [0, C).
        num_classes: C, where the caller knows it; by default it is read from `preds`.

    Returns:
        The logits [N, C] in float32, cut from the autograd graph.

    Raises:
        ValueError: On a wrong shape or dtype, or a target outside [0, C).
        TrainingFault: A ValueError too; on a row of logits that has no softmax (it holds NaN or +inf, or is -inf
            throughout). The text names the first such row.
    """
    classes = preds.shape[1] if preds.ndim == 2 else 0
    if not preds.is_floating_point() or classes < 2 or classes != (num_classes or classes):
        expected = f"[N, {num_classes}]" if num_classes else "[N, C] with C >= 2"
        raise ValueError(f"preds must be float logits {expected}, not {preds.dtype} {list(preds.shape)}")
    if target.is_floating_point() or target.dtype == torch.bool or target.shape != preds.shape[:1]:
        raise ValueError(
            f"target must be integer class indices [{len(preds)}], one for each row of preds, "
            f"not {target.dtype} {list(target.shape)}"
        )
    logits = preds.detach().float()
    no_softmax = ~logits.logsumexp(dim=1).isfinite()
    outside = (target < 0) | (target >= classes)
    if (no_softmax | outside).any():  # the one wait for the device
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"target {int(target[row])} in row {row} is outside [0, {classes}), the classes of preds; "
                "drop unlabelled examples before they reach a metric"
            )
        row = int(no_softmax.nonzero()[0])
        raise TrainingFault(
            f"preds have no softmax in {int(no_softmax.sum())} of {len(preds)} rows; "
            f"row {row} starts with {logits[row, :4].tolist()}. Has the training diverged?"
        )
    return logits


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


class SumMetric(Metric):
    """A metric whose whole state is float64 sums over the samples.

    Their size is fixed, and any split of the data into batches and ranks gives the same result.
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        """Register the state `name`: zeros of `shape`, added up over batches and ranks."""
        self.add_state(name, torch.zeros(shape, dtype=sum_dtype(self.device)), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> "SumMetric":
        """Follow the module to a device, but not to a dtype.

        `module.to(torch.bfloat16)`, which Lightning's "bf16-true" calls, would cast the sums as well, and
        a bfloat16 count stops growing at 256.
        """
        super()._apply(fn, exclude_state=tuple(self._defaults))
        for name in self._defaults:
            value = getattr(self, name)
            if value.is_meta:  # of a copy without values, which counts nothing and has none to move
                continue
            value = value.to(self.device, sum_dtype(self.device))
            setattr(self, name, value)
            self._defaults[name] = torch.zeros_like(value)
        return self


class MeanMetric(SumMetric):
    """The mean of one number a sample, over all samples since the last reset, on all ranks.

    `compute` returns a float32 scalar, NaN before any sample was seen (torchmetrics warns).
    """

    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # torchmetrics' compute groups take metrics for one whose states have equal names, and equal values once.
        self._total = f"total_{type(self).__name__}"
        self.add_sum(self._total)
        self.add_sum("count")

    def add(self, values: Tensor) -> None:
        """Add the samples of one batch: a number of each, any dtype [N]."""
        total = getattr(self, self._total)
        setattr(self, self._total, total + values.sum(dtype=total.dtype))
        self.count = self.count + len(values)

    def mean(self) -> Tensor:
        """The mean in the dtype of the sums."""
        mean: Tensor = getattr(self, self._total) / self.count
        return mean

    def compute(self) -> Tensor:
        return self.mean().float()
