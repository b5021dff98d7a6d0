"""Scores of predicted tokens: likelihood, perplexity, accuracy and calibration, from sums of fixed size."""

import math
from typing import Any, NamedTuple

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lit_peft.metrics.base import MeanMetric, checked_logits
from lit_peft.metrics.calibration import CalibrationError


class TokenScores(NamedTuple):
    """What the metrics of tokens need of the logits of N tokens, which are too large to keep.

    Attributes:
        nll: Negative log-likelihood of the true token, in nats, float32 [N].
        confidence: Largest probability, float32 [N].
        correct: Whether that is the true token's, bool [N].
    """

    nll: Tensor
    confidence: Tensor
    correct: Tensor


def token_scores(preds: Tensor, target: Tensor) -> TokenScores:
    """The scores of some tokens.

    Args:
        preds: Logits [N, C], any float dtype; the softmax is taken in float32.
        target: Ids of the true tokens, integers [N].

    Raises:
        ValueError: On inputs that `checked_logits` refuses.

    Example:
        >>> import torch
        >>> token_scores(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 1]))
        TokenScores(nll=tensor([0.1269, 1.3133]), confidence=tensor([0.8808, 0.7311]), correct=tensor([ True, False]))
    """
    logits = checked_logits(preds, target)
    log_partition, (top, label) = logits.logsumexp(dim=1), logits.max(dim=1)
    true_token = logits.gather(1, target.long()[:, None])[:, 0]
    return TokenScores(log_partition - true_token, (top - log_partition).exp(), label == target)


class TokenNLL(MeanMetric):
    """Mean negative log-likelihood of a token, in nats: the logarithm of the perplexity.

    `update` takes `TokenScores`. `compute` returns a float32 scalar, NaN before any token was seen.

    Args:
        **kwargs: As for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> nll = TokenNLL()
        >>> nll.update(token_scores(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 1])))
        >>> nll.compute()
        tensor(0.7201)
    """

    def update(self, tokens: TokenScores) -> None:
        """Add the tokens of one batch."""
        self.add(tokens.nll)


class Perplexity(TokenNLL):
    """Perplexity: the number of equally likely tokens among which one would be as unsure.

    Over all N tokens that are scored::

        PPL = exp(-1/N sum_n log p(token_n | what is before it))        in [1, inf], 1 is best

    It depends on the tokenizer, which says what a token is, and on how much of the text before it a token sees.

    `update` takes `TokenScores`. `compute` returns a float32 scalar, NaN before any token was seen.

    Args:
        **kwargs: As for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> perplexity = Perplexity()
        >>> perplexity.update(token_scores(torch.zeros(3, 50), torch.tensor([7, 0, 49])))
        >>> perplexity.compute()
        tensor(50.0000)
    """

    def compute(self) -> Tensor:
        """Perplexity of all tokens since the last reset, on all ranks: a float32 scalar."""
        return self.mean().exp().float()


class WordPerplexity(TokenNLL):
    """Perplexity by word: the likelihood of the same text, whatever a tokenizer makes of it, by its original words.

    With L tokens in a text of W words, NLL the mean over tokens::

        PPL_word = exp(NLL * L / W)        in [1, inf], 1 is best

    `update` takes `TokenScores`. `compute` returns a float32 scalar, NaN before any token was seen.

    Args:
        tokens_per_word: L / W of the text; it may be set later. Until then `compute` gives NaN.
        **kwargs: As for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> perplexity = WordPerplexity(tokens_per_word=1.5)
        >>> perplexity.update(token_scores(torch.zeros(3, 16), torch.tensor([7, 0, 15])))
        >>> perplexity.compute()
        tensor(64.)
    """

    def __init__(self, tokens_per_word: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens_per_word = tokens_per_word

    def compute(self) -> Tensor:
        """Word perplexity of all tokens since the last reset, on all ranks: a float32 scalar."""
        rate = math.nan if self.tokens_per_word is None else self.tokens_per_word
        return (self.mean() * rate).exp().float()


class TokenAccuracy(MeanMetric):
    """Share of tokens that get the largest probability, in [0, 1], 1 is best.

    `update` takes `TokenScores`. `compute` returns a float32 scalar, NaN before any token was seen.

    Args:
        **kwargs: As for `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> accuracy = TokenAccuracy()
        >>> accuracy.update(token_scores(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 1])))
        >>> accuracy.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def update(self, tokens: TokenScores) -> None:
        """Add the tokens of one batch."""
        self.add(tokens.correct)


class TokenCalibrationError(CalibrationError):
    """`CalibrationError` over tokens: how far the probability of the likeliest token is from its being right.

    `update` takes `TokenScores`; bins, arguments and results are those of `CalibrationError`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0], [1.0, 0.0]])
        >>> ece = TokenCalibrationError()
        >>> ece.update(token_scores(logits, torch.tensor([1, 1, 0, 0])))
        >>> ece.compute()
        tensor(0.2278)
    """

    def update(self, tokens: TokenScores) -> None:  # type: ignore[override]
        """Add the tokens of one batch."""
        self.add(tokens.confidence, tokens.correct)


def language_modeling_metrics(prefix: str = "", masked: bool = False) -> MetricCollection:
    """The metrics of a language model, all fed with the `TokenScores` of the tokens that are scored.

    - `nll`: `TokenNLL`; 0 is best.
    - `perplexity` and `word_perplexity`: `Perplexity` and `WordPerplexity`, whose `tokens_per_word` is to be set.
      Of a masked model it is `masked_perplexity`, exp(nll) over masked tokens, which see the text on both sides: it is
      no likelihood of a text and compares with no causal model's.
    - `acc`: `TokenAccuracy`, the share of right top tokens; 1 is best.
    - `ece`: `TokenCalibrationError` with 15 bins; 0 is best.

    Log the metric objects, never the values of a batch: batches differ in their numbers of tokens.

    Args:
        prefix: Put before each key, as in "val/".
        masked: Whether the tokens were masked.

    Returns:
        A collection with `update(tokens)` and `compute()`.

    Example:
        >>> import torch
        >>> metrics = language_modeling_metrics("val/", masked=True)
        >>> metrics.update(token_scores(torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([1, 1])))
        >>> for name, value in metrics.compute().items():
        ...     print(f"{name} {value:.3f}")
        val/acc 0.500
        val/ece 0.425
        val/masked_perplexity 2.055
        val/nll 0.720
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "nll": TokenNLL(),
        "acc": TokenAccuracy(),
        "ece": TokenCalibrationError(),
    }
    metrics |= (
        {"masked_perplexity": Perplexity()}
        if masked
        else {"perplexity": Perplexity(), "word_perplexity": WordPerplexity()}
    )
    # Nothing to join: no two of these keep the same state.
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)
