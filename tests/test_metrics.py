"""Metrics against scikit-learn and torchmetrics, under any split of the data, and their refusals."""

import copy
import doctest
import io
import pickle
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

import lit_peft.metrics
from lit_peft.metrics import (
    NLL,
    BrierScore,
    CalibrationBins,
    CalibrationError,
    calibration,
    classification,
    classification_metrics,
    language_modeling,
    reliability_diagram,
)
from lit_peft.metrics.base import sum_dtype

OWN = [CalibrationError, BrierScore, NLL]


def sample(classes, n=300, seed=0):
    """Logits of an overconfident, half-right classifier, and the targets."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    target = torch.multinomial((logits / 2).softmax(1), 1, generator=generator)[:, 0] if n else torch.zeros(0).long()
    return logits, target


def ece_oracle(p, y):
    return MulticlassCalibrationError(p.shape[1], n_bins=15)(torch.tensor(p, dtype=torch.float32), torch.tensor(y))


def f1_oracle(p, y):
    return sk.f1_score(y, p.argmax(1), average="binary" if p.shape[1] == 2 else "macro")


# name: the metric for C classes, and its value by other hands from float64 probabilities [N, C], targets [N]
CASES = {
    "ece": (lambda c: CalibrationError(), ece_oracle),
    "brier": (
        lambda c: BrierScore(),
        lambda p, y: sk.brier_score_loss(y, p, labels=range(p.shape[1]), scale_by_half=False),
    ),
    "nll": (lambda c: NLL(), lambda p, y: sk.log_loss(y, p, labels=range(p.shape[1]))),
    "acc": (lambda c: classification_metrics(c)["acc"], lambda p, y: sk.accuracy_score(y, p.argmax(1))),
    "f1": (lambda c: classification_metrics(c)["f1"], f1_oracle),
    "mcc": (lambda c: classification_metrics(c)["mcc"], lambda p, y: sk.matthews_corrcoef(y, p.argmax(1))),
}


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("name", CASES)
class TestEveryMetric:
    """What holds for each metric alone, in the manner of torchmetrics' MetricTester."""

    def test_equals_the_oracle(self, name, classes):
        make, oracle = CASES[name]
        logits, target = sample(classes)
        metric = make(classes)
        metric.update(logits, target)
        expected = oracle(logits.double().softmax(1).numpy(), target.numpy())
        assert metric.compute().dtype == torch.float32
        assert float(metric.compute()) == pytest.approx(float(expected), abs=2e-6)

    def test_merged_states_are_the_whole(self, name, classes):
        logits, target = sample(classes)
        whole, first, second = (CASES[name][0](classes) for _ in range(3))
        whole.update(logits, target)
        first.update(logits[:50], target[:50])
        second.update(logits[50:], target[50:])
        first.merge_state(second)
        assert float(first.compute()) == pytest.approx(float(whole.compute()), abs=1e-6)

    def test_synchronised_ranks_are_the_whole(self, name, classes):
        logits, target = sample(classes)
        whole, here, there = (CASES[name][0](classes) for _ in range(3))
        whole.update(logits, target)
        here.update(logits[:50], target[:50])
        there.update(logits[50:], target[50:])
        alone = float(copy.deepcopy(here).compute())
        gathered = iter(there.metric_state.values())
        here.distributed_available_fn = lambda: True
        here.dist_sync_fn = lambda state, group: [state, next(gathered)]
        together = float(here.compute())
        assert together == pytest.approx(float(whole.compute()), abs=1e-6)
        assert together != pytest.approx(alone, abs=1e-6)

    def test_pickle_deepcopy_and_reset(self, name, classes):
        logits, target = sample(classes)
        whole, metric = (CASES[name][0](classes) for _ in range(2))
        whole.update(logits, target)
        metric.update(logits[:50], target[:50])
        copies = [pickle.loads(pickle.dumps(metric)), copy.deepcopy(metric)]
        for other in copies:
            other.update(logits[50:], target[50:])
        metric.reset()
        metric.update(logits, target)
        values = [float(m.compute()) for m in (metric, *copies)]
        assert values == pytest.approx([float(whole.compute())] * 3, abs=1e-6)

    def test_bfloat16_logits_count_as_their_float32_values(self, name, classes):
        logits, target = sample(classes)
        half, full = (CASES[name][0](classes) for _ in range(2))
        half.update(logits.bfloat16(), target)
        full.update(logits.bfloat16().float(), target)
        assert torch.equal(half.compute(), full.compute())


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    classes=st.sampled_from([2, 3, 7]),
    n=st.integers(1, 120),
    seed=st.integers(0, 10**6),
    cuts=st.lists(st.integers(0, 120), max_size=5),
    forward=st.booleans(),
)
def test_any_split_into_batches_gives_the_same(classes, n, seed, cuts, forward):
    logits, target = sample(classes, n, seed)
    whole, split = classification_metrics(classes), classification_metrics(classes)
    whole.update(logits, target)
    edges = [0, *sorted(min(cut, n) for cut in cuts), n]  # equal edges give empty batches
    for start, end in pairwise(edges):
        batch = logits[start:end], target[start:end]
        split(*batch) if forward else split.update(*batch)
    expected = {name: float(value) for name, value in whole.compute().items()}
    assert {name: float(value) for name, value in split.compute().items()} == pytest.approx(expected, abs=1e-6)
    assert torch.equal(split["ece"].bins().count, whole["ece"].bins().count)


def test_ece_is_of_the_top_label_and_not_of_class_one():
    # All 20 are 90 % sure. Of 10 for class 0, 8 are right, of 10 for class 1 all: 90 % right, calibrated. Yet
    # class 1 is the truth of 20 % of the first 10, where it was given 10 %, and of all others, given 90 %.
    p1 = torch.tensor([0.1] * 10 + [0.9] * 10)
    target = torch.tensor([0] * 8 + [1] * 2 + [1] * 10)
    ece = CalibrationError()
    ece.update(torch.stack([1 - p1, p1], dim=1).log(), target)
    assert float(ece.compute()) == pytest.approx(0, abs=1e-6)
    assert float(BinaryCalibrationError(n_bins=15)(p1, target)) == pytest.approx(0.1, abs=1e-6)


@pytest.mark.parametrize(
    ("logits", "n_bins", "expected"),
    [([0.0, 0.0], 10, 4), ([0.0] * 5, 5, 0), ([0.0, 1e-3], 10, 5), ([0.0, 200.0], 10, 9), ([0.0, 3.0], 1, 0)],
    ids=["0.5 in (.4, .5]", "0.2 in (0, .2]", "just above 0.5", "1.0 in (.9, 1]", "one bin"],
)
def test_an_upper_edge_belongs_to_its_bin(logits, n_bins, expected):
    ece = CalibrationError(n_bins=n_bins)
    ece.update(torch.tensor([logits]), torch.tensor([0]))
    assert ece.bins().count.tolist() == [int(i == expected) for i in range(n_bins)]


def test_bins_hold_what_ece_and_accuracy_are_made_of():
    logits, target = sample(5)
    metrics = classification_metrics(5)
    metrics.update(logits, target)
    bins = metrics["ece"].bins()
    filled = bins.count > 0
    assert torch.equal(bins.accuracy.isnan(), ~filled) and torch.equal(bins.confidence.isnan(), ~filled)
    edges = torch.arange(16) / 15
    assert ((edges[:-1] < bins.confidence) & (bins.confidence <= edges[1:]))[filled].all()
    weight = bins.count / len(target)
    assert float((weight * bins.accuracy).nansum()) == pytest.approx(float(metrics["acc"].compute()))
    gaps = (bins.accuracy - bins.confidence).abs()
    assert float((weight * gaps).nansum()) == pytest.approx(float(metrics["ece"].compute()))


def test_bins_are_of_all_ranks():
    logits, target = sample(2)
    here, there = CalibrationError(), CalibrationError()
    here.update(logits[:50], target[:50])
    there.update(logits[50:], target[50:])
    here.distributed_available_fn = lambda: True
    here.dist_sync_fn = lambda state, group: [state, there.sums]
    assert int(here.bins().count.sum()) == 300
    assert int(here.sums[0].sum()) == 50  # this rank's own state is back


@pytest.mark.parametrize("metric_class", OWN)
def test_a_cast_of_the_module_leaves_the_sums_alone(metric_class):
    # As Lightning's bf16-true does. 2000 samples: a bfloat16 count would stop at 256.
    logits, target = sample(3, n=2000)
    metric, plain = metric_class(), metric_class()
    plain.update(logits, target)
    for _ in range(2):
        for start in range(0, 2000, 100):
            torch.nn.ModuleList([metric]).to(torch.bfloat16)
            metric.update(logits[start : start + 100], target[start : start + 100])
        assert float(metric.compute()) == pytest.approx(float(plain.compute()), abs=1e-6)
        metric.reset()
        assert all(state.dtype == torch.float64 for state in metric.metric_state.values())


def test_sums_are_float32_only_where_float64_is_missing():
    assert sum_dtype(torch.device("mps")) == torch.float32
    assert sum_dtype(torch.device("cuda")) == sum_dtype(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("metric_class", OWN)
def test_states_made_in_inference_mode_serve_outside_of_it(metric_class):
    logits, target = sample(2)
    mixed, plain = metric_class(), metric_class()
    with torch.inference_mode():
        mixed.reset()
    mixed.update(logits[:50], target[:50])
    with torch.inference_mode():
        mixed.update(logits[50:100], target[50:100])
    mixed.update(logits[100:], target[100:])
    plain.update(logits, target)
    assert float(mixed.compute()) == pytest.approx(float(plain.compute()), abs=1e-6)


@pytest.mark.parametrize("metric_class", OWN)
def test_no_graph_is_kept(metric_class):
    logits, target = sample(2)
    metric = metric_class()
    assert not metric(logits.requires_grad_(), target).requires_grad


def test_automatic_compute_groups_keep_nll_and_brier_apart():
    # Both are exactly 0 on the first batch; equal state names would make torchmetrics join them for good.
    metrics = MetricCollection([NLL(), BrierScore()])
    metrics.update(torch.tensor([[200.0, 0.0]]), torch.tensor([0]))
    metrics.update(torch.tensor([[200.0, 0.0]]), torch.tensor([1]))
    assert {name: float(value) for name, value in metrics.compute().items()} == {
        "NLL": 100.0,
        "BrierScore": 1.0,
    }


def test_keys_and_prefix():
    metrics = classification_metrics(3, prefix="val/")
    assert set(metrics) == {f"val/{key}" for key in ("acc", "f1", "mcc", "nll", "brier", "ece")}
    assert isinstance(metrics["ece"], CalibrationError)


def test_mcc_is_zero_when_one_class_is_predicted():
    target = torch.tensor([1] * 6 + [0] * 4)
    metrics = classification_metrics(2)
    metrics.update(torch.tensor([[0.0, 1.0]]).repeat(10, 1), target)
    values = metrics.compute()
    assert float(values["mcc"]) == sk.matthews_corrcoef(target, np.ones(10)) == 0
    assert float(values["f1"]) == pytest.approx(0.75)


def test_a_ruled_out_class_is_allowed():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    nll, brier = NLL(), BrierScore()
    nll.update(logits, torch.tensor([0]))
    brier.update(logits, torch.tensor([0]))
    assert float(nll.compute()) == pytest.approx(np.log(2)) and float(brier.compute()) == pytest.approx(0.5)
    nll.update(logits, torch.tensor([2]))
    assert float(nll.compute()) == torch.inf


NAN = torch.tensor([[0.0, 1.0], [1.0, 0.0], [torch.nan, 1.0], [0.0, 1.0]])
REFUSED = {
    "NaN": (NAN, [0, 1, 0, 1], r"no softmax in 1 of 4 rows; row 2 starts with \[nan, 1.0\]"),
    "inf": (NAN.nan_to_num(torch.inf).clamp(min=0) / 0, [0, 1, 0, 1], "no softmax in 4 of 4 rows"),
    "all -inf": (torch.full((2, 2), -torch.inf), [0, 1], "no softmax in 2 of 2 rows"),
    "float16 overflow": (torch.tensor([[7e4, 0.0]]).half(), [0], "no softmax in 1 of 1 rows"),
    "target -100": (torch.zeros(3, 2), [0, 1, -100], r"target -100 in row 2 is outside \[0, 2\).*unlabelled"),
    "target 2": (torch.zeros(3, 2), [2, 1, 0], r"target 2 in row 0 is outside \[0, 2\)"),
    "probabilities of class 1": (torch.zeros(3), [0, 1, 0], r"\[N, .*not torch.float32 \[3\]"),
    "one logit": (torch.zeros(3, 1), [0, 0, 0], r"\[N, .*not torch.float32 \[3, 1\]"),
    "labels": (torch.zeros(3, 2, dtype=torch.int64), [0, 1, 0], r"float logits .*not torch.int64 \[3, 2\]"),
    "lengths": (
        torch.zeros(3, 2),
        [0, 1],
        r"target must be integer class indices \[3\].*not torch.int64 \[2\]",
    ),
    "float target": (torch.zeros(2, 2), [0.0, 1.0], "target must be integer .*not torch.float32"),
    "bool target": (torch.zeros(2, 2), [False, True], "target must be integer .*not torch.bool"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("make", [*OWN, lambda: classification_metrics(2)], ids=["ECE", "Brier", "NLL", "collection"])
def test_bad_inputs_are_refused_by_name(make, case):
    preds, target, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make().update(preds, torch.tensor(target))
    with pytest.raises(ValueError, match=message):
        make()(preds, torch.tensor(target))


def test_the_number_of_classes_is_held_to():
    with pytest.raises(ValueError, match=r"float logits \[N, 3\], not torch.float32 \[4, 2\]"):
        classification_metrics(3).update(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_classes must be at least 2, not 1"):
        classification_metrics(1)
    with pytest.raises(ValueError, match="n_bins must be at least 1, not 0"):
        CalibrationError(n_bins=0)


def test_empty_batches_add_nothing():
    empty = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    metrics, plain = classification_metrics(2), classification_metrics(2)
    metrics.update(*empty)
    metrics.update(*sample(2))
    assert all(value.isnan() for value in metrics(*empty).values())
    plain.update(*sample(2))
    assert metrics.compute() == plain.compute()


def test_no_samples_give_nan_and_a_warning():
    with pytest.warns(UserWarning, match="before the ``update``"):
        values = classification_metrics(2).compute()
    assert all(values[key].isnan() for key in ("nll", "brier", "ece"))
    assert all(values[key] == 0 for key in ("acc", "f1", "mcc"))


def test_the_diagram_draws_the_gaps_that_make_ece():
    ece = CalibrationError()
    ece.update(*sample(5, n=2000))
    figure = reliability_diagram(ece.bins(), "five classes")
    top, bottom = figure.axes
    assert top.get_title() == f"five classes\nECE {float(ece.compute()):.3f}, 15 bins, 2,000 samples"
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in top.containers}
    share = [bar.get_height() for bar in bottom.containers[0]]
    assert sum(share) == pytest.approx(1)
    drawn = 0.0
    for bars in top.containers:
        if bars.get_label().startswith("gap"):
            drawn += sum(share[int(bar.get_center()[0] * 15)] * abs(bar.get_height()) for bar in bars)
    assert drawn == pytest.approx(float(ece.compute()), abs=1e-5)
    assert heights["accuracy"] == pytest.approx(ece.bins().accuracy.nan_to_num().tolist())
    png = io.BytesIO()
    figure.savefig(png)
    assert png.getvalue().startswith(b"\x89PNG")


def test_a_diagram_needs_samples():
    nothing = CalibrationBins(torch.full((4,), torch.nan), torch.full((4,), torch.nan), torch.zeros(4).long())
    with pytest.raises(ValueError, match="all 4 bins are empty"):
        reliability_diagram(nothing, "empty")


@pytest.mark.parametrize("module", [calibration, classification, language_modeling], ids=lambda m: m.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0
    documented = {test.name.rpartition(".")[2] for test in doctest.DocTestFinder().find(module) if test.examples}
    public = {
        name for name in lit_peft.metrics.__all__ if getattr(lit_peft.metrics, name).__module__ == module.__name__
    }
    assert public - {"CalibrationBins", "TokenScores"} <= documented


def test_the_package_itself_does_not_import_torchmetrics():
    code = "import sys, lit_peft; sys.exit('torchmetrics' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
