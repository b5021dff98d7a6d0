"""Proper scores of predicted probabilities, and the set of metrics that a classification run reports."""

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassMatthewsCorrCoef

from lit_peft.metrics.base import MeanMetric, checked_logits
from lit_peft.metrics.calibration import CalibrationError


class BrierScore(MeanMetric):
    """Brier score: squared error of the predicted probabilities, summed over classes, averaged over samples.

    With p = softmax(preds) and y the one-hot target::

        Brier = 1/N sum_n sum_c (p_nc - y_nc)^2        in [0, 2], 0 is best

    Brier 1950, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review 78.
    For two classes it is twice the common binary form 1/N sum_n (p_n1 - y_n)^2, which lies in [0, 1]:
    halve it to compare.

    `update` takes logits `preds` [N, C], any float dtype (the softmax is taken in float32), and integer
    `target` [N]. `compute` returns a float32 scalar, NaN before any sample was seen (torchmetrics warns).

    Args:
        **kwargs: As for `torchmetrics.Metric`.

    Raises:
        ValueError: In `update`, on inputs that `checked_logits` refuses.

    Example:
        >>> import torch
        >>> brier = BrierScore()
        >>> brier.update(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 1]))
        >>> brier.compute()
        tensor(0.5487)
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the samples of one batch: logits [N, C], class indices [N]."""
        probabilities = checked_logits(preds, target).softmax(dim=1)
        truth = torch.nn.functional.one_hot(target.long(), preds.shape[1])
        self.add((probabilities - truth).square().sum(dim=1))


class NLL(MeanMetric):
    """Mean negative log-likelihood of the true class, in nats.

    With p = softmax(preds)::

        NLL = -1/N sum_n log p_n,target        in [0, inf], 0 is best

    It is inf as soon as one true class was ruled out by a logit of -inf. Guo et al. 2017, "On Calibration
    of Modern Neural Networks", section 2, which takes the sum and not the mean.

    `update` takes logits `preds` [N, C], any float dtype (the softmax is taken in float32), and integer
    `target` [N]. `compute` returns a float32 scalar, NaN before any sample was seen (torchmetrics warns).

    Args:
        **kwargs: As for `torchmetrics.Metric`.

    Raises:
        ValueError: In `update`, on inputs that `checked_logits` refuses.

    Example:
        >>> import torch
        >>> nll = NLL()
        >>> nll.update(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 1]))
        >>> nll.compute()
        tensor(0.7201)
    """

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the samples of one batch: logits [N, C], class indices [N]."""
        log_probabilities = checked_logits(preds, target).log_softmax(dim=1)
        self.add(-log_probabilities.gather(1, target.long()[:, None])[:, 0])


class _PositiveClassF1(MulticlassF1Score):
    """F1 of class 1 alone, from the logits of two classes."""

    def __init__(self) -> None:
        super().__init__(num_classes=2, average="none", validate_args=False)

    def compute(self) -> Tensor:
        return super().compute()[1]


class _CheckedCollection(MetricCollection):
    """A collection that holds all its metrics to the checks of `checked_logits`, and takes empty batches.

    torchmetrics' own would take the argmax of NaN for a prediction, count a target of -1 as a miss, and fail
    on an empty batch.
    """

    def __init__(self, metrics: dict[str, Metric | MetricCollection], num_classes: int, prefix: str) -> None:
        # No compute groups: torchmetrics would join, for good, the metrics whose states are alike after the
        # first batch, and no two of these keep the same state.
        super().__init__(metrics, prefix=prefix, compute_groups=False)
        self.num_classes = num_classes

    def update(self, preds: Tensor, target: Tensor) -> None:  # type: ignore[override]  # nn.ModuleDict.update
        checked_logits(preds, target, self.num_classes)
        if len(preds) > 0:
            super().update(preds, target)

    def forward(self, preds: Tensor, target: Tensor) -> dict[str, Tensor]:
        checked_logits(preds, target, self.num_classes)
        if len(preds) > 0:
            return super().forward(preds, target)
        return {str(name): torch.tensor(torch.nan, device=preds.device) for name in self}


def classification_metrics(num_classes: int, prefix: str = "") -> MetricCollection:
    """The metrics of a classification run, all fed with logits [N, C] and integer class indices [N].

    - `acc`: share of right top labels; 1 is best.
    - `f1`: of two classes, F1 of class 1, as GLUE scores MRPC and QQP; of more, the mean of the classes' F1
      (macro) over those that occur among targets or predictions; 1 is best.
    - `mcc`: Matthews correlation, as GLUE scores CoLA; 0 where it is undefined; 1 is best.
    - `nll`, `brier`, `ece`: `NLL`, `BrierScore` and `CalibrationError` with 15 bins; 0 is best.

    Most of these are no means of what single batches or ranks give: log the metric objects
    (`self.log_dict(metrics)`), never the values of a batch. When no sample came, torchmetrics warns, and
    `nll`, `brier` and `ece` are NaN, torchmetrics' own `acc`, `f1` and `mcc` 0.

    Args:
        num_classes: C, at least 2.
        prefix: Put before each key, as in "val/".

    Returns:
        A collection with `update(preds, target)` and `compute()`; `metrics["ece"].bins()` has the bins.

    Raises:
        ValueError: On `num_classes` < 2; when updated, on inputs that `checked_logits` refuses.

    Example:
        >>> import torch
        >>> metrics = classification_metrics(num_classes=2, prefix="val/")
        >>> metrics.update(torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 0]))
        >>> for name, value in metrics.compute().items():
        ...     print(f"{name} {value:.3f}")
        val/acc 0.333
        val/brier 0.722
        val/ece 0.527
        val/f1 0.500
        val/mcc -0.500
        val/nll 0.918
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, not {num_classes}")
    f1 = _PositiveClassF1() if num_classes == 2 else MulticlassF1Score(num_classes, validate_args=False)
    metrics: dict[str, Metric | MetricCollection] = {
        "acc": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
        "f1": f1,
        # Where only one of two classes is predicted, torchmetrics' MCC is not 0 but, say, .13 (6 of 10
        # right; its issue 3355). A third class that never occurs changes no MCC and avoids that branch.
        "mcc": MulticlassMatthewsCorrCoef(max(num_classes, 3), validate_args=False),
        "nll": NLL(),
        "brier": BrierScore(),
        "ece": CalibrationError(),
    }
    return _CheckedCollection(metrics, num_classes, prefix)
