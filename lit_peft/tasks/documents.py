"""Logits of documents that a model reads in several windows."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Batch = dict[str, Tensor]


def document_logits(classify: Callable[[Batch], Tensor], batch: Batch, trainer: Any = None) -> Tensor:
    """Classifies a batch; of windows, the arithmetic mean of the probabilities of each document's windows.

    Of a document with the windows 1, ..., n::

        logits = log(1/n sum_i softmax(logits_i))        so that softmax(logits) is the mean

    A document is one sample to every metric, then, however long it is. No more windows go through the model at once
    than the batch has documents: memory is that of a batch that was cut off. Ranks may have different numbers of them,
    and a sharded model communicates whenever it runs: all ranks run it equally often.

    Args:
        classify: Gives float32 logits [rows, classes] of inputs.
        batch: Inputs [rows, width], and `labels`, which are not looked at. Where rows are windows, `document` [rows]
            numbers from 0 the document that each is of, the windows of one side by side.
        trainer: The trainer in which every rank classifies a batch now; None: this process is alone.

    Returns:
        Logits in float32, [documents, classes]; those of `classify` where there are no windows.
    """
    inputs = {name: part for name, part in batch.items() if name not in ("labels", "document")}
    if "document" not in batch:
        return classify(inputs)
    windows = batch["document"].bincount().tolist()
    starts = range(0, sum(windows), len(windows))
    passes = most_passes(len(starts), batch["document"].device, trainer)
    parts = [{name: part[at : at + len(windows)] for name, part in inputs.items()} for at in starts]
    logits = [classify(part) for part in parts]
    for _ in range(passes - len(parts)):
        classify({name: part[:1] for name, part in inputs.items()})
    scores = torch.cat(logits).log_softmax(-1).split(windows)
    return torch.stack([score.logsumexp(0) - math.log(len(score)) for score in scores])


def most_passes(own: int, device: torch.device, trainer: Any) -> int:
    """The most passes that any rank makes: a sharded model communicates in each, and all must make as many."""
    if trainer is None or trainer.world_size == 1:
        return own
    return int(trainer.strategy.reduce(torch.tensor(own, device=device), reduce_op="max"))
