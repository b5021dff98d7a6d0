"""Trying a result on the command line: `predict --text`, and `--adapter` in the place of a run's checkpoint."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

import lit_peft.data
import lit_peft.tasks
from lit_peft.arguments import CONFIG_FLAGS, options, settings, take, values
from lit_peft.core.quantize import modes
from lit_peft.handover.paths import PLACED
from lit_peft.saving.adapter_folder import quantize_of
from lit_peft.saving.checkpoint_file import AS_TRAINED
from lit_peft.saving.folder_record import open_folder

ALONE = {"devices": "1", "num_nodes": "1", "strategy": "auto", "logger": "false", "enable_progress_bar": "false"}
"""How a trainer runs over texts from the command line."""

_DATA = dict.fromkeys(("CausalLanguageModeling", "MaskedLanguageModeling"), "LanguageModelingDataModule")
"""Data modules of a user's own texts, by the name of the task."""


def take_texts(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Splits off `--text` and `--text_pair`, both of which may be repeated: (the other arguments, texts, pairs).

    Raises:
        ValueError: For a verb other than predict, and a blank text.
    """
    words, texts = take(arguments, "--text")
    words, pairs = take(words, "--text_pair")
    for option, given in (("--text", texts), ("--text_pair", pairs)):
        if blank := [text for text in given if not text.strip()]:
            raise ValueError(f"{option} is {blank[0]!r}, expected a text that is not blank.")
    if pairs and not texts:
        raise ValueError("--text_pair is the second of two texts; give the first, --text.")
    if texts and words[0] != "predict":
        raise ValueError(f"--text is for predict, not for {words[0]}.")
    if texts:
        words += [word for key, value in ALONE.items() for word in (f"--trainer.{key}", value)]
    return words, texts, pairs


def use_adapter(arguments: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Puts what `--adapter FOLDER` means in its place: the method, and model and data where nothing else says them.

    Raises:
        FileNotFoundError: When it is not the folder of an adapter.
        ValueError: For fit and plan; when the base, or what to predict, is not known; for an option of
            `quantize` without its mode.
    """
    words, folders = take(arguments, "--adapter")
    if not folders:
        return words
    folder = folders[-1]
    if words[0] in ("fit", "plan"):
        way_out = (
            "To train an adapter on, go on with its run, lit-peft fit --run FOLDER, or use lit_peft.load in Python."
            if words[0] == "fit"
            else "To plan the training of one, name its run: lit-peft plan --run FOLDER."
        )
        raise ValueError(f"--adapter is for validate, test and predict. {way_out}")
    config, tensors, mine = open_folder(folder)
    known = (mine or {}).get("model", {})
    models = settings(words, "model")
    task = next((s.class_path for s in reversed(models) if s.class_path), None)
    said = {name for setting in models for name, value in setting.init_args.items() if value is not None}
    more: list[str] = []
    backbone = None
    kind = _task(known, config) if task is None else task.rpartition(".")[2]
    if task is None:
        more += ["--model", f"lit_peft.tasks.{kind}"]
        backbone = _base(known.get("backbone"), config.get("base_model_name_or_path"))
        if "backbone" not in said:
            if backbone is None:
                raise ValueError(f"{folder} does not say which base it belongs to: give --model.backbone.")
            more += ["--model.backbone", backbone]
    if "label_names" not in said and kind == "TextClassification":
        given = next((s.init_args["backbone"] for s in reversed(models) if s.init_args.get("backbone")), backbone)
        names = known.get("label_names") or (_labels(tensors, given) if texts or not _has_data(words) else None)
        more += ["--model.label_names", json.dumps(names)] if names else []
    if not any(setting.class_path for setting in settings(words, "data")):
        if not texts and not _has_data(words):
            if words[0] not in PLACED:
                raise ValueError(f"Nothing says what to {words[0]}: give --data.path FILE, a configuration or a run.")
            more += ["--score", "false"] if words[0] == "merge" else []
        more += ["--data", f"lit_peft.data.{_DATA.get(kind, 'TextClassificationDataModule')}"]
    # All of its arguments, or the parser would take those of a run's method that have the same names.
    given = [s.init_args for s in settings(words, "method") if s.class_path is None]  # options, and overlays
    own = {"path": folder, "name": "default", "quantize": AS_TRAINED}
    own |= {key: value for arguments in given for key, value in arguments.items() if key == "quantize"}
    if isinstance(stored := own["quantize"], dict) and stored and "mode" not in stored:
        trained = (quantize_of(mine) or {}).get("mode")
        example = f" {trained}, as in training" if trained else f", one of {', '.join(modes())}"
        raise ValueError(
            f"method.quantize.{next(iter(stored))} needs its mode beside it, which is not taken from an adapter: "
            f"give --method.quantize.mode{example}."
        )
    method = {"class_path": "lit_peft.AdapterFolder", "init_args": own}
    # Behind what names the class, and before the options of the user, which stand above.
    configs = [end for _, end, flag, _ in options(words) if flag in CONFIG_FLAGS]
    at = max(configs, default=1) if task is not None else 1
    return [*words[:at], *more, *words[at:], "--method", json.dumps(method)]


def _task(known: dict[str, Any], config: dict[str, Any]) -> str:
    """Name of the task of an adapter folder: as ours says, or by what HF PEFT calls it."""
    if known.get("task") in lit_peft.tasks.__all__:
        return str(known["task"])
    return "CausalLanguageModeling" if config.get("task_type") == "CAUSAL_LM" else "TextClassification"


def _has_data(words: Sequence[str]) -> bool:
    return bool(values(words, "--data.path")) or any(setting.class_path for setting in settings(words, "data"))


def _base(backbone: str | None, absolute: str | None) -> str | None:
    """The base of an adapter folder: as it was named, or by its absolute path where the name leads nowhere here."""
    if backbone is None or absolute is None or Path(backbone).exists():
        return backbone or absolute
    return absolute if Path(absolute).exists() else backbone


def _labels(tensors: dict[str, Tensor], base: str | None) -> list[str]:
    """Names of the classes of a folder of HF PEFT's: those of a local base with so many, else as transformers numbers.

    The adapter of a finished classifier may have no head of its own: then they are the base's.
    """
    heads = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
    sizes = [len(tensor) for key, tensor in tensors.items() if key.endswith(heads) and "pre_classifier" not in key]
    file = Path(base or "") / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if base and file.is_file() else {}
    named = (
        list((config.get("id2label") or {}).values()) if "Classification" in str(config.get("architectures")) else []
    )
    if named and (not sizes or len(named) == sizes[-1]):
        return named
    return [f"LABEL_{i}" for i in range(sizes[-1])] if sizes else []


class TextPrinter(BasePredictionWriter):
    """Prints what was predicted for each text from the command line.

    Label and probability; the prompt with what was generated behind it; or, of anything else, all of it as JSON.

    Args:
        texts: The texts, in the order of the predictions.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__(write_interval="epoch")
        self.texts = list(texts)

    def write_on_epoch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, predictions: Sequence[Any], batch_indices: Any
    ) -> None:
        rows = [row for batch in predictions for row in (batch.tolist() if isinstance(batch, Tensor) else batch)]
        labels = [str(row["label"]) if isinstance(row, dict) and "label" in row else "" for row in rows]
        width = max(map(len, labels))
        for text, label, row in zip(self.texts, labels, rows, strict=True):
            if isinstance(row, dict) and "generation" in row:
                print(f"{row['prompt']}{row['generation']}")
                continue
            print(f"{label:<{width}}  {row['probability']:.4f}  {text}" if label else f"{json.dumps(row)}  {text}")
