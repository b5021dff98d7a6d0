"""What two states of one model answer to the same batches, compared batch by batch."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_peft.saving.merged import find_model

MOST = 2**24
"""Numbers of logits that are kept, 64 MB; what comes after them is not compared."""
ROWS = 8
"""Rows of the first batch that are kept as inputs."""
CACHE = ("past_key_values", "cache_position", "use_cache")
"""Inputs by which `generate` hands on what was computed before; a call changes them."""


class LogitsComparison(pl.Callback):
    """Keeps what the transformers model in a module answers in one test, and compares what it answers in the next.

    Nothing is compared, and `why_not` says why, where the two tests ask something else, or where the answers are no
    logits by rows. Calls of `generate` with a cache are passed over: what they are asked, the model has answered.

    Args:
        most: Numbers that are kept; of a first batch that has more, at least one row.
    """

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.comparing = False
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """Of the first call, positional and by name, on the host."""
        self.rows = 0
        self.difference = torch.tensor(0.0)
        self.largest = torch.tensor(0.0)
        self.flips: int | None = 0
        self.compared: str | None = None
        self.why_not: str | None = None
        self._kept: list[tuple[str, Tensor]] = []
        """Of each call: a digest of its inputs, and the answer."""
        self._calls = 0
        self._cached = False
        self._of_batch = 0
        """Rows of the batch at hand that are counted."""
        self._path: str | None = None
        self._handle: Any = None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._path is None:
            self._path = find_model(pl_module).path
        self._handle = pl_module.get_submodule(self._path).register_forward_hook(self._take, with_kwargs=True)

    def on_test_batch_start(self, *args: Any) -> None:
        self._of_batch = 0

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._handle.remove()

    @torch.no_grad()
    def ask(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Takes the answer to one batch without a trainer, in evaluation mode; a model that gives none is no error."""
        self._of_batch = 0
        try:
            answer = model.eval()(**inputs)
        except Exception as error:  # somebody's model: whatever it raises, it cannot be asked this
            self._give_up(f"asked fixed inputs, it raises {type(error).__name__}")
        else:
            self._take(model, (), inputs, answer)

    def compare(self) -> "LogitsComparison":
        """From now on answers are compared to those that were kept."""
        self.comparing = True
        return self

    def _take(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.why_not is not None:
            return
        if kwargs.get("past_key_values") is not None:
            self._cached = True
            return
        if not self.comparing and self.most <= sum(kept.numel() for _, kept in self._kept):
            return
        if self.comparing and self._calls >= len(self._kept):
            return
        name, found = logits_of(output)
        if found is None:
            return self._give_up(f"its {type(output).__name__} has no logits by rows")
        if model.training:
            return self._give_up("the test runs it in training mode, with dropout")
        kwargs = {key: value for key, value in kwargs.items() if key not in CACHE}
        digest, found = _digest((args, kwargs)), found.detach().float().cpu()
        if not self.comparing:
            self._keep(name, args, kwargs, digest, found)
        elif self._kept[self._calls][0] != digest:
            self._give_up("its inputs differ between the two passes, as with random data")
        else:
            self._compare(self._kept[self._calls][1], found)
            self._calls += 1

    def _keep(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], digest: str, found: Tensor) -> None:
        if self.inputs is None:
            self.compared, rows = name, len(found)
            self.inputs = (
                tuple(_first(value, rows) for value in args),
                {key: _first(value, rows) for key, value in kwargs.items()},
            )
        room = self.most - sum(kept.numel() for _, kept in self._kept)
        fitting = max(room // max(found[:1].numel(), 1), 0 if self._kept else 1)
        if fitting:
            self._kept.append((digest, found[:fitting].clone()))

    def _compare(self, before: Tensor, after: Tensor) -> None:
        after = after[: len(before)]
        if before.shape != after.shape:
            return self._give_up("its answers differ in shape between the two passes")
        difference = torch.where(before == after, 0.0, (after - before).abs())  # infinities may be equal
        self.difference = torch.maximum(self.difference, difference.max())
        self.largest = torch.maximum(self.largest, before.abs().max())
        again = self._of_batch > 0  # the model is asked several times a batch: its rows are counted once
        self.rows += max(0, len(before) - self._of_batch)
        self._of_batch = max(self._of_batch, len(before))
        labels = self.compared == "logits" and before.ndim == 2 and before.shape[1] > 1 and not again
        if labels and self.flips is not None:
            self.flips += int((before.argmax(-1) != after.argmax(-1)).sum())
        else:
            self.flips = None

    def _give_up(self, why: str) -> None:
        self.why_not = self.why_not or why

    def figures(self) -> dict[str, Any]:
        """What was found, null where nothing was compared, and then why: for a report."""
        if self.comparing and self._calls < len(self._kept):
            self._give_up("it is asked less often in the second pass")
        if self.rows == 0:
            self._give_up("all calls have a cache, as those of generate" if self._cached else "no inputs are known")
        nothing = self.why_not is not None
        return {
            "compared": None if nothing else self.compared,
            "not_compared": self.why_not,
            "rows": 0 if nothing else self.rows,
            "max_logit_difference": None if nothing else self.difference.item(),
            "largest_logit": None if nothing else self.largest.item(),
            "label_flips": None if nothing else self.flips,
        }


def logits_of(output: Any) -> tuple[str, Tensor | None]:
    """What a transformers model answers: its logits, its last hidden state where it has no head; None: neither."""
    for name in ("logits", "last_hidden_state"):
        if torch.is_tensor(found := getattr(output, name, None)) and found.ndim:
            return name, found
    first = output[0] if isinstance(output, tuple | list) and output else output
    return "output", first if torch.is_tensor(first) and first.ndim else None


def _first(value: Any, rows: int) -> Any:
    """The first rows of what goes by rows, on the host; anything else as it is."""
    if not torch.is_tensor(value):
        return value
    return (value[:ROWS] if value.ndim and len(value) == rows else value).detach().cpu().clone()


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    for tensor in _tensors(value):
        digest.update(str((tensor.dtype, tensor.shape)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a model is called with."""
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, Mapping):
        for key in value:
            yield from _tensors(value[key])
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
