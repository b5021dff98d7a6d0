"""Metrics of tokens, against torchmetrics' and by definition."""

import copy
import math

import pytest
import torch
from torchmetrics.text import Perplexity as Reference

from lit_peft.faults import TrainingFault
from lit_peft.metrics import CalibrationError, WordPerplexity, language_modeling_metrics, token_scores


def tokens(n: int = 300, classes: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return logits, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("sizes", [[300], [1, 99, 0, 200], [150, 150]])
def test_any_split_of_the_tokens_gives_what_torchmetrics_gives(sizes):
    logits, target = tokens()
    metrics = language_modeling_metrics("val/")
    metrics["word_perplexity"].tokens_per_word = 1.4
    for preds, true in zip(logits.split(sizes), target.split(sizes), strict=True):
        metrics.update(token_scores(preds, true))
    found = {name.removeprefix("val/"): value.item() for name, value in metrics.compute().items()}
    perplexity = Reference()(logits[None], target[None]).item()
    ece = CalibrationError()
    ece.update(logits, target)
    assert found["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert found["nll"] == pytest.approx(math.log(perplexity), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(perplexity**1.4, rel=1e-5)
    assert found["acc"] == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert found["ece"] == pytest.approx(ece.compute().item(), abs=1e-6)


def test_a_masked_models_perplexity_has_a_name_of_its_own():
    metrics = language_modeling_metrics("test/", masked=True)
    metrics.update(token_scores(*tokens()))
    found = metrics.compute()
    assert set(found) == {f"test/{name}" for name in ("nll", "masked_perplexity", "acc", "ece")}
    assert found["test/masked_perplexity"].item() == pytest.approx(found["test/nll"].exp().item(), rel=1e-5)


def test_sums_outlive_a_cast_and_a_reset_clears_them():
    metrics = language_modeling_metrics().to(torch.bfloat16)
    logits, target = tokens(2000)
    for _ in range(3):
        metrics.update(token_scores(logits.bfloat16(), target))
    assert all(getattr(metric, name).dtype == torch.float64 for metric in metrics.values() for name in metric._defaults)
    assert metrics["nll"].count == 6000
    again = copy.deepcopy(metrics)
    metrics.reset()
    assert metrics["nll"].count == 0 and again["nll"].count == 6000


def test_what_is_not_known_is_nan():
    metric = WordPerplexity()
    metric.update(token_scores(*tokens()))
    assert metric.compute().isnan()
    empty = language_modeling_metrics()
    empty.update(token_scores(*tokens(0)))
    assert all(value.isnan() for value in empty.compute().values())


def test_logits_without_a_softmax_and_targets_without_a_class_are_refused():
    logits, target = tokens(4)
    with pytest.raises(TrainingFault, match="no softmax in 1 of 4 rows"):
        token_scores(logits.index_fill(0, torch.tensor([2]), torch.nan), target)
    with pytest.raises(ValueError, match="target -100 in row 0 is outside"):
        token_scores(logits, torch.full_like(target, -100))
