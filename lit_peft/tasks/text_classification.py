"""Sequence classification with any transformers model that has a head for it."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_peft import hub
from lit_peft.metrics import classification_metrics
from lit_peft.tasks.base import Batch, TransformersTask
from lit_peft.tasks.documents import document_logits
from lit_peft.tasks.loading import BaseStorage, load_classifier


class TextClassification(TransformersTask):
    """Classifies texts, or pairs of texts, with a transformers sequence-classification model.

    Logs `train/loss`; in evaluation acc, f1, mcc, nll, brier and ece under `val/` or `test/`.

    Args:
        backbone: Model to start from: a hub id, a local folder, or demo for the bundled encoder.
        label_names: Names of the classes in the order of their codes; null: the data module's.
        class_weights: Weights of the classes in the loss: one number each, or balanced for the inverse of their
            frequencies; null: equal.
        **common: See `TransformersTask`.
    """

    auto_class = "AutoModelForSequenceClassification"

    def __init__(
        self,
        backbone: str = hub.DEMO,
        label_names: Sequence[str] | None = None,
        *,
        class_weights: Literal["balanced"] | Sequence[float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(backbone, **common)
        self.label_names = None if label_names is None else list(label_names)
        self.class_weights = class_weights
        self.loss_weights: Tensor | None = None

    # ------------------------------------------------------------------------------------------- the model

    def setup(self, stage: str) -> None:
        """Takes the classes from the data module, or holds it to the ones that are known.

        Our data modules encode labels by the known names; the order of another one's codes must be the model's.
        To predict with known classes, the data need no labels, and what labels there are do not matter.
        """
        if stage == "predict" and self.label_names is not None:
            return
        names = list(getattr(getattr(self.trainer, "datamodule", None), "label_names", None) or [])
        if self.label_names is None:
            if not names:
                raise ValueError("The classes are unknown: give label_names, or a data module that has them.")
            self.label_names = names
            self.hparams["label_names"] = names
        elif names and names != self.label_names:
            raise ValueError(
                f"The data's classes are {', '.join(names)}; this model's are {', '.join(self.label_names)}. Their "
                "order is the order of the codes, so a file that lacks a class cannot be scored as it is."
            )

    def load_model(self, storage: BaseStorage | None) -> tuple[Any, list[str]]:
        if self.label_names is None:
            raise ValueError("The classes are unknown: give label_names when there is no trainer.")
        return load_classifier(self.backbone, self.label_names, self.base_dtype, storage)

    def build_metrics(self) -> None:
        assert self.label_names is not None
        classes = len(self.label_names)
        self.val_metrics = classification_metrics(classes, "val/")
        self.test_metrics = classification_metrics(classes, "test/")

    def sample(self, size: int, length: int) -> Batch:
        """A batch of so many texts of that length, or of the longest that the model takes; on the meta device."""
        batch = self.sample_ids(size, length)
        return batch | {"labels": batch["input_ids"][:, 0]}

    def _class_weights(self, counts: Sequence[int] | None) -> Tensor | None:
        if self.class_weights is None or self.label_names is None:
            return None
        if self.class_weights == "balanced":
            if not counts:
                raise ValueError("class_weights: balanced needs a data module with class_counts.")
            frequency = torch.tensor(counts, dtype=torch.float32)
            return frequency.sum() / (len(frequency) * frequency)
        weights = torch.tensor([float(w) for w in self.class_weights])
        if len(weights) != len(self.label_names):
            raise ValueError(
                f"class_weights has {len(weights)} numbers; there are {len(self.label_names)} classes: "
                f"{', '.join(self.label_names)}."
            )
        if not (weights.isfinite() & (weights >= 0)).all() or not weights.any():
            raise ValueError(f"model.class_weights is {weights.tolist()}, expected numbers from 0, not all of them 0.")
        return weights

    def forward(self, batch: Batch) -> Tensor:
        """Logits in float32, [texts, classes], of one batch of the data module; its labels are not looked at.

        Of texts in windows they are the logarithms of the mean probabilities; see `document_logits`.
        """
        return document_logits(lambda inputs: self.model(**inputs).logits.float(), batch, self._trainer)

    def folder_record(self) -> dict[str, Any]:
        return super().folder_record() | {"label_names": self.label_names}

    # --------------------------------------------------------------------------------------------- the loop

    def on_fit_start(self) -> None:
        super().on_fit_start()
        weights = self._class_weights(getattr(getattr(self.trainer, "datamodule", None), "class_counts", None))
        self.loss_weights = None if weights is None else weights.to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch), batch["labels"], weight=self.loss_weights)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_metrics.update(self(batch), batch["labels"])
        self.log_dict(self.val_metrics, prog_bar=False, batch_size=len(batch["labels"]))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_metrics.update(self(batch), batch["labels"])
        self.log_dict(self.test_metrics, batch_size=len(batch["labels"]))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One dict a text: `label`, its name; `probability` of it; `probabilities` of all classes by name."""
        assert self.label_names is not None
        rows = self(batch).softmax(-1).tolist()
        return [
            {
                "label": self.label_names[max(range(len(row)), key=row.__getitem__)],
                "probability": max(row),
                "probabilities": dict(zip(self.label_names, row, strict=True)),
            }
            for row in rows
        ]
