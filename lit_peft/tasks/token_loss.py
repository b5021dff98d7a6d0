"""The loss over tokens, from hidden states: the logits of a whole batch are never there.

A batch of b texts of w tokens has b w V logits over a vocabulary of V tokens, the largest tensor of a step by far: in
float32, 8 texts of 1,024 tokens over 128,000 take 4 GB, and as much again for their gradient. Here the model hands its
last hidden states over, and the logits of some tokens at a time are made, scored and dropped; in training they are made
again in the backward pass (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_peft.core.sharded import is_sharded
from lit_peft.labels import IGNORED

CHUNK_NUMBERS = 2**25
"""Logits that are there at a time, a 128 MB float32 tensor."""


class Rows(NamedTuple):
    """What is left to do for N tokens that are scored.

    Attributes:
        states: A row for each token: hidden states [N, d], or logits [N, V].
        targets: Ids of the true tokens, int64 [N].
        head: Makes logits [n, V] of rows.
        size: How many rows to give to it at a time.
    """

    states: Tensor
    targets: Tensor
    head: Callable[[Tensor], Tensor]
    size: int

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits in the model's dtype and targets, some tokens at a time."""
        for states, targets in zip(self.states.split(self.size), self.targets.split(self.size), strict=True):
            yield self.head(states), targets


def score_rows(model: Any, inputs: dict[str, Any], targets: Tensor, passes: bool, share: float = 1.0) -> Rows:
    """Runs a model and picks the tokens that are scored.

    Args:
        model: A transformers model with a head over the vocabulary.
        inputs: What its forward takes.
        targets: What each position is to predict, int64 [b, w]; -100 where it is not scored.
        passes: Whether the head may be left out, see `head_is_last`; else the model makes all logits itself.
        share: Share of the positions that are scored, where fake tensors cannot tell which.
    """
    head = model.get_output_embeddings() if passes else None
    with _passing(head):
        states = model(**inputs).logits.flatten(0, 1)
    targets = targets.flatten()
    if _has_no_values(targets):
        count = -int(-share * len(targets) // 1)
        states, targets = states[:count], targets[:count]
    else:
        scored = targets != IGNORED
        states, targets = states[scored], targets[scored]
    vocabulary = states.shape[-1] if head is None else model.config.get_text_config().vocab_size
    return Rows(states, targets, _as_it_is if head is None else head, max(1, CHUNK_NUMBERS // vocabulary))


def summed_nll(rows: Rows) -> Tensor:
    """Negative log-likelihood of all rows, in nats: a float32 scalar, 0 where there are none.

    It keeps rows for the backward pass, and no logits that it has made.
    """

    def part(states: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(rows.head(states).float(), targets, reduction="sum")

    parts = zip(rows.states.split(rows.size), rows.targets.split(rows.size), strict=True)
    return torch.stack([checkpoint(part, *some, use_reentrant=False) for some in parts]).sum()


def head_is_last(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a model's logits are what its head makes of its input, and nothing behind that.

    Some cap, scale or cast them, or add to them (Gemma 2, Cohere, BART), which the loss over hidden states would miss.
    A few tokens tell; equal values do not, as BART adds zeros, as many as the vocabulary has tokens. A head that FSDP2
    has sharded is not left out either: its weights are gathered for the model's forward alone.

    Args:
        model: A transformers model with a head over the vocabulary.
        inputs: What its forward takes.
    """
    head = model.get_output_embeddings()
    if head is None or "forward" in vars(head) or is_sharded(head):
        return False
    made: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, args, output: made.append(output))
    try:
        logits = _asked(model, {k: v[:1, :8] if torch.is_tensor(v) else v for k, v in inputs.items()})
    finally:
        hook.remove()
    return len(made) == 1 and made[0] is logits


def keeps_apart(model: Any, ids: Tensor) -> bool:
    """Whether a model that is given `position_ids` and no mask lets no text of a row see another.

    Most of transformers' decoders look where positions begin anew; OPT, Bloom, Falcon, MPT, Mamba and others do not,
    and say nothing. Two texts of two tokens tell.

    Args:
        model: A causal model of transformers.
        ids: A tensor where its inputs are.
    """
    if _has_no_values(ids):
        return True
    row, other = _two_texts(model, ids, slice(2))
    positions = torch.tensor([[0, 1, 0, 1]], device=ids.device)
    inputs = {"position_ids": positions, "use_cache": False}
    return _agree(*(_asked(model, {"input_ids": asked, **inputs})[:, 2:] for asked in (row, other)))


def sees_ahead(model: Any, ids: Tensor) -> bool:
    """Whether what a model says of the first tokens of a text changes with its last one.

    Transformers loads encoders as causal models, too; some of their layers say so in `is_causal`, and those of XLNet,
    XLM, BigBird, RoFormer and others do not. A few tokens tell.

    Args:
        model: A causal model of transformers.
        ids: A tensor where its inputs are.
    """
    if _has_no_values(ids):
        return False
    row, other = _two_texts(model, ids, slice(3, None))
    inputs = {"attention_mask": torch.ones_like(row), "use_cache": False}  # without one XLM looks for padding
    return not _agree(*(_asked(model, {"input_ids": asked, **inputs})[:, :-1] for asked in (row, other)))


def _two_texts(model: Any, ids: Tensor, where: slice) -> tuple[Tensor, Tensor]:
    """Texts of four tokens, [1, 4], that differ in some places.

    Not those of the batch, which on some rank may be a token wide: a sharded model communicates, and all must ask it.
    """
    vocabulary = model.config.get_text_config().vocab_size
    row = torch.arange(4, device=ids.device)[None] % vocabulary
    other = row.clone()
    other[:, where] = (row[:, where] + 1) % vocabulary
    return row, other


def _agree(first: Tensor, second: Tensor) -> bool:
    """Whether logits are the same, but for rounding."""
    first, second = first.float(), second.float()
    return torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()))


def _asked(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits, without a trace: dropout would draw random numbers, which a resumed run draws at another step."""
    modes = [(child, child.training) for child in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            # Not called where it may be compiled, which this is not worth; FSDP2 gathers weights where it is called.
            return (model if is_sharded(model) else model.forward)(**inputs).logits
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def _passing(head: nn.Module | None) -> Iterator[None]:
    """Lets a head, and what stands around it, return its input."""
    if head is None:
        yield
        return
    head.forward = _as_it_is
    try:
        yield
    finally:
        del head.forward


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _has_no_values(x: Tensor) -> bool:
    """Whether a tensor has a shape alone, as those that memory is planned with."""
    from torch._subclasses.fake_tensor import FakeTensor

    return x.is_meta or isinstance(x, FakeTensor)
