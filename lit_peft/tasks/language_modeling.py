"""What causal and masked language models share: loss and scores by token, whatever the batches are."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MetricCollection

from lit_peft import hub
from lit_peft.methods.base import Method
from lit_peft.methods.positions import positions_taken
from lit_peft.metrics import language_modeling_metrics, token_scores
from lit_peft.tasks.base import Batch, TransformersTask
from lit_peft.tasks.token_loss import Rows, head_is_last, score_rows, summed_nll
from lit_peft.training.averaging import is_a
from lit_peft.training.bringing import methods_of
from lit_peft.training.data_module import current_data_module

UNIT = 1024
"""Tokens of the loss that a step returns, a sum: any constant, which the optimizer step takes out again."""


class LanguageModeling(TransformersTask):
    """Base of the tasks that predict tokens. A batch has `input_ids` and `labels` [b, w], see the data modules.

    The loss of an optimizer step is the mean over all tokens that are scored, of all its micro-batches
    (`accumulate_grad_batches`) and on all ranks::

        L = 1/T sum_i -log p(token_i)        T tokens in all

    and not a mean of means, in which a token of a short text weighs more. A step returns its sum; once the gradients
    are there, before they are clipped and any method looks at them, they are divided by T. How it is computed, see
    `lit_peft.tasks.token_loss`, is the same beside `compile`, which then compiles the model below its head, and beside
    Liger's kernels, whose own loss is not used.
    """

    masked: ClassVar[bool]
    """Whether the tokens that are scored were masked."""
    scored_share: float = 1.0
    """Share of the tokens of a text that are scored, for a plan of the memory."""
    batch_weight: float = 1.0
    """What the mean loss of the last micro-batch was multiplied by; the penalties of methods are multiplied alike."""

    def __init__(self, backbone: str = hub.DEMO, **common: Any) -> None:
        super().__init__(backbone, **common)
        self._passes: bool | None = None
        self._tokens = 0

    def setup(self, stage: str) -> None:
        self._passes = None  # another trainer may shard the head

    def build_metrics(self) -> None:
        self.val_metrics = language_modeling_metrics("val/", self.masked)
        self.test_metrics = language_modeling_metrics("test/", self.masked)

    @property
    def text_room(self) -> int | None:
        """What `max_positions` leaves to a text beside virtual tokens; blocks of tokens keep to it where they may.

        Those of the trainer's methods, attached or not yet; where it has none, of the adapters that run.

        Raises:
            ValueError: When nothing is left.
        """
        methods = methods_of(self)
        if methods or self.model is None:
            return self.text_room_beside(methods)
        return self._room_behind(positions_taken(self.model))

    def text_room_beside(self, methods: Sequence[Method]) -> int | None:
        """The same beside these methods."""
        return self._room_behind(sum(method.positions_taken(not self.masked) for method in methods))

    def _room_behind(self, taken: int) -> int | None:
        if (room := self.max_positions) is None:
            return None
        if taken >= room:
            raise ValueError(f"num_virtual_tokens: {taken} leave none of the {room} positions of the model to a text.")
        return room - taken

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of `backbone`."""
        return hub.load_tokenizer(self.backbone)

    def folder_record(self) -> dict[str, Any]:
        return super().folder_record() | {"task": type(self).__name__}

    def sample(self, size: int, length: int) -> Batch:
        """A batch of so many texts of that length, or of the longest that the model takes; on the meta device."""
        batch = self.sample_ids(size, length)
        return batch | {"labels": batch["input_ids"]}

    def inputs_and_targets(self, batch: Batch, training: bool) -> tuple[dict[str, Any], Tensor]:
        """What the model's forward takes, and the token that each position is to predict, [b, w], -100 where none."""
        raise NotImplementedError(f"{type(self).__name__} must define inputs_and_targets(batch, training).")

    def forward(self, batch: Batch) -> Tensor:
        """Logits in float32, [b, w, vocabulary], of one batch of the data module; its labels are not looked at."""
        return self.model(**{k: v for k, v in batch.items() if k != "labels"}).logits.float()

    def rows(self, inputs: dict[str, Any], targets: Tensor) -> Rows:
        """The tokens of a batch that are scored, up to their logits."""
        if self._passes is None:
            self._passes = head_is_last(self.model, inputs)
            if not self._passes:
                rank_zero_info(
                    f"{type(self.model).__name__} does not return what its head makes, so that the loss takes the "
                    "logits of a whole batch, which are kept for the backward pass."
                )
        return score_rows(self.model, inputs, targets, self._passes, self.scored_share)

    # --------------------------------------------------------------------------------------------- the loop

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._tokens = 0
        if is_a(self.trainer.strategy, "DeepSpeedStrategy"):
            raise ValueError(
                "trainer.strategy: DeepSpeed keeps gradients to itself, which a language model divides by the tokens "
                "of a step; take ddp or a ModelParallelStrategy."
            )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The summed loss of the batch over a constant, which the optimizer step turns into the mean of all tokens."""
        rows = self.rows(*self.inputs_and_targets(batch, True))
        nll, count = summed_nll(rows), len(rows.targets)
        self._tokens += count
        self.log("train/loss", nll.detach() / max(count, 1), prog_bar=True, batch_size=max(count, 1))
        unit = max(count, 1) if self._trainer is None else UNIT  # a loop of one's own has the mean of the batch
        self.batch_weight = count / unit
        return nll / unit

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        assert optimizer_closure is not None

        def closure() -> Any:
            """The last micro-batch; then all gradients of the step are there, and neither unscaled nor clipped yet."""
            output = optimizer_closure()
            self._take_mean()
            return output

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _take_mean(self) -> None:
        """Makes gradients of sums over UNIT, which Lightning has averaged over batches and ranks, those of the mean."""
        own = torch.tensor(float(self._tokens), device=self.device)
        tokens = self.trainer.strategy.reduce(own, reduce_op="mean")
        scale = UNIT * self.trainer.accumulate_grad_batches / tokens.clamp(min=1 / UNIT)
        alike: dict[Any, list[Any]] = defaultdict(list)  # one kernel for many, of shards for what lies here
        for grad in (p.grad for p in self.parameters() if p.grad is not None):
            own = grad.to_local() if hasattr(grad, "to_local") else grad
            alike[own.device, own.dtype].append(own)
        for (device, _), grads in alike.items():
            torch._foreach_mul_(grads, scale.to(device))
        self._tokens = 0

    def on_validation_start(self) -> None:
        self._count_words(self.val_metrics, "val")

    def on_test_start(self) -> None:
        self._count_words(self.test_metrics, "test")

    def _count_words(self, metrics: MetricCollection, role: str) -> None:
        if "word_perplexity" in metrics:
            known = getattr(current_data_module(self.trainer), "tokens_per_word", None)
            metrics["word_perplexity"].tokens_per_word = None if known is None else known(role)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.evaluate(batch, self.test_metrics)

    def evaluate(self, batch: Batch, metrics: MetricCollection) -> None:
        """Scores the tokens of a batch, and logs the metrics that are known."""
        rows = self.rows(*self.inputs_and_targets(batch, False))
        for logits, targets in rows.chunks():
            metrics.update(token_scores(logits, targets))
        known = {name: metric for name, metric in metrics.items() if getattr(metric, "tokens_per_word", 1) is not None}
        self.log_dict(known, batch_size=max(len(rows.targets), 1))
