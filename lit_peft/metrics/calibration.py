"""Calibration: is a prediction made with confidence 0.8 right in 80 % of the cases?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lit_peft.metrics.base import SumMetric, checked_logits


@dataclass(frozen=True, eq=False)
class CalibrationBins:
    """What a reliability diagram shows; bin i (from 1) holds the samples with confidence in ((i-1)/n, i/n].

    Attributes:
        confidence: Mean top-label confidence in each bin, float32 [n]; NaN where a bin is empty.
        accuracy: Share of right top labels in each bin, float32 [n]; NaN where a bin is empty.
        count: Samples in each bin, int64 [n].
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor


class CalibrationError(SumMetric):
    """Expected calibration error (ECE) of the top label, over bins of equal width, with the L1 norm.

    With conf the largest softmax probability of a sample, acc whether that class is the right one, and
    B_i the samples with conf in ((i-1)/n_bins, i/n_bins]::

        ECE = sum_i |B_i| / N * |mean acc over B_i - mean conf over B_i|        in [0, 1], 0 is best

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2, eq. 3. An upper edge is the
    float32 nearest to i/n_bins and belongs to its bin.

    This is not `torchmetrics.classification.BinaryCalibrationError`: that one bins the probability of
    class 1 and compares it with the frequency of class 1. Its bins are filled from 0 to 1, those of the
    top label of two classes from 1/2, so the two disagree on the same predictions. ECE here equals
    `MulticlassCalibrationError` up to the side to which a bin edge belongs, and keeps 3 * n_bins sums
    where that keeps every sample.

    `update` takes logits `preds` [N, C], any float dtype (the softmax is taken in float32), and integer
    `target` [N]. `compute` returns a float32 scalar, NaN before any sample was seen (torchmetrics warns).

    Args:
        n_bins: Number of bins. ECE depends on it, so report it. 15, as in Guo et al.
        **kwargs: As for `torchmetrics.Metric`.

    Raises:
        ValueError: On `n_bins` < 1; in `update`, on inputs that `checked_logits` refuses.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0], [1.0, 0.0]])
        >>> logits.softmax(dim=1).amax(dim=1)
        tensor([0.8808, 0.8808, 0.8808, 0.7311])
        >>> ece = CalibrationError()
        >>> ece.update(logits, torch.tensor([1, 1, 0, 0]))
        >>> ece.compute()
        tensor(0.2278)
        >>> bins = ece.bins()
        >>> bins.accuracy[bins.count > 0], bins.count[bins.count > 0]
        (tensor([1.0000, 0.6667]), tensor([1, 3]))
    """

    sums: Tensor  # [3, n_bins]: samples, their confidences, their hits

    def __init__(self, n_bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_bins < 1:
            raise ValueError(f"n_bins must be at least 1, not {n_bins}")
        self.n_bins = n_bins
        self.add_sum("sums", 3, n_bins)

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add the samples of one batch: logits [N, C], class indices [N]."""
        logits = checked_logits(preds, target)
        self.add(logits.softmax(dim=1).amax(dim=1), logits.argmax(dim=1) == target)

    def add(self, confidence: Tensor, correct: Tensor) -> None:
        """Put samples into their bins: confidences, float32 [N], and whether they were right, bool [N]."""
        upper_edges = torch.arange(1, self.n_bins, device=confidence.device, dtype=torch.float32) / self.n_bins
        bin_index = torch.bucketize(confidence, upper_edges)
        terms = torch.stack([torch.ones_like(confidence), confidence, correct]).to(self.sums.dtype)
        # Not in place: sums reset under inference_mode could not be changed outside of it.
        self.sums = self.sums.index_add(1, bin_index, terms)

    def compute(self) -> Tensor:
        """ECE of all samples since the last reset, on all ranks: a float32 scalar."""
        count, confidence, correct = self.sums
        return ((correct - confidence).abs().sum() / count.sum()).float()

    def bins(self) -> CalibrationBins:
        """The bins behind `compute`, summed over all ranks: under DDP every rank must call this."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync):
            count, confidence, correct = self.sums
            return CalibrationBins((confidence / count).float(), (correct / count).float(), count.long())


def reliability_diagram(bins: CalibrationBins, title: str) -> Figure:
    r"""Draw accuracy against confidence, bin by bin, and below it how the samples fall into the bins.

    The layout of Guo et al. 2017, figure 1. The shaded gap reaches from a bin's accuracy to its mean
    confidence, so that ECE is the mean height of the gaps, weighted by the histogram below.

    Args:
        bins: From `CalibrationError.bins()`.
        title: First line of the title; the second gives ECE and the numbers of bins and samples.

    Returns:
        A figure bound to no display, for `savefig` or a logger's `add_figure`.

    Raises:
        ValueError: When the bins hold no sample.

    Example:
        >>> import torch
        >>> ece = CalibrationError(n_bins=10)
        >>> ece.update(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 0]))
        >>> figure = reliability_diagram(ece.bins(), "SST-2, LoRA r 16")
        >>> figure.axes[0].get_title()
        'SST-2, LoRA r 16\nECE 0.194, 10 bins, 2 samples'
    """
    count = bins.count.cpu().numpy()
    samples = int(count.sum())
    if samples == 0:
        raise ValueError(f"a reliability diagram needs samples; all {len(count)} bins are empty")
    centres = (np.arange(len(count)) + 0.5) / len(count)
    share = count / samples
    confidence = bins.confidence.cpu().double().nan_to_num().numpy()  # 0 where empty: a gap of no height
    accuracy = bins.accuracy.cpu().double().nan_to_num().numpy()
    gap = confidence - accuracy
    width = 0.94 / len(count)

    figure = Figure(figsize=(5.0, 6.4), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.bar(centres, accuracy, width, color="#4c78a8", label="accuracy")
    for name, pale, dark, mask in (
        ("over", "#f3c6cb", "#d1495b", gap > 0),
        ("under", "#c9e6dd", "#2a9d8f", gap < 0),
    ):
        if mask.any():
            top.bar(
                centres[mask],
                gap[mask],
                width,
                bottom=accuracy[mask],
                label=f"gap, {name}confident",
                facecolor=pale,
                edgecolor=dark,
                hatch="///",
            )
    top.plot([0, 1], [0, 1], color="#555555", linestyle="--", linewidth=1, label="perfect calibration")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    ece = float((share * abs(gap)).sum())
    top.set_title(f"{title}\nECE {ece:.3f}, {len(count)} bins, {samples:,} samples", fontsize=11)
    top.legend(loc="upper left", frameon=False, fontsize=9)

    bottom.bar(centres, share, width, color="#b8c4d0")
    for name, colour, line, values in (
        ("accuracy", "#4c78a8", "-", accuracy),
        ("confidence", "#d1495b", ":", confidence),
    ):
        mean = float((share * values).sum())
        style = {"color": colour, "linestyle": line, "linewidth": 2, "clip_on": False}
        bottom.axvline(mean, label=f"mean {name} {mean:.3f}", **style)
    bottom.set(xlabel="confidence", ylabel="share of samples")
    bottom.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    return figure
