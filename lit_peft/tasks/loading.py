"""Loading the models of tasks, straight into 4 or 8 bit where a method asks for that."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lit_peft import hub
from lit_peft.core.quantize import Quantize, choose_layers, make_quantizer, recognise
from lit_peft.core.weightless import is_weightless, without_weights
from lit_peft.methods.base import Method
from lit_peft.methods.positions import position_room
from lit_peft.saving.left_alone import left_alone
from lit_peft.training.bringing import methods_of

_LANGUAGE = {
    "AutoModelForCausalLM": ("causal", "CausalLanguageModeling"),
    "AutoModelForMaskedLM": ("masked", "MaskedLanguageModeling"),
}
"""Kind and task of transformers' classes for language models."""


@dataclass(frozen=True)
class BaseStorage:
    """How the base of a task is to be stored, as the methods of its trainer say.

    Attributes:
        quantize: A method's `quantize`; None: in its own dtype.
        methods: The methods, whose trained weights are left alone.
        root: Name of the model in the task.
        device: Where weights are quantised, and stay.
    """

    quantize: Quantize
    methods: Sequence[Method]
    root: str
    device: torch.device

    @classmethod
    def of(cls, task: pl.LightningModule, root: str = "model") -> "BaseStorage | None":
        """What the methods of a task's trainer ask for; None where it has no trainer or none of them quantises."""
        methods = methods_of(task)
        quantize = next((found for method in methods if (found := method.base_storage()) is not None), None)
        return None if quantize is None else cls(quantize, methods, root, task.trainer.strategy.root_device)

    def arguments(self, skeleton: nn.Module) -> dict[str, Any]:
        """Arguments of `from_pretrained` with which it quantises each weight as it reads it.

        None, and the whole model is quantised afterwards, where transformers cannot store weights in this way, or they
        are quantised already.

        Args:
            skeleton: The model on the meta device.
        """
        if getattr(skeleton.config, "quantization_config", None) is not None:
            return {}
        quantizer, holder = make_quantizer(self.quantize), nn.ModuleDict({self.root: skeleton})
        avoid = set[str]().union(*(method.keeps_float(holder) for method in self.methods))
        chosen = choose_layers(holder, quantizer, avoid)
        paths = {path.removeprefix(f"{self.root}.") for path, why in chosen.items() if why is None}
        config = quantizer.loading_config(left_alone(skeleton, paths))
        if config is None:
            return {}
        # Without a device_map transformers takes the first GPU; on a CPU it needs none.
        return {"quantization_config": config} | (
            {} if self.device.type == "cpu" else {"device_map": {"": self.device}}
        )


def load_classifier(
    backbone: str, label_names: Sequence[str], dtype: torch.dtype, storage: BaseStorage | None = None
) -> tuple[Any, list[str]]:
    """Loads a sequence-classification model, see `load_model`.

    Args:
        backbone: Hub id, local folder, or demo.
        label_names: Names of the classes; they go into the model's configuration.
        dtype: Dtype of the loaded weights; of quantised ones, the one that they are quantised from.
        storage: How the base is to be stored; None: in that dtype.

    Returns:
        The model, and the names of the parameters that the checkpoint did not hold.
    """
    model, fresh = load_model(
        "AutoModelForSequenceClassification",
        backbone,
        dtype,
        storage,
        resized=True,
        num_labels=len(label_names),
        id2label=dict(enumerate(label_names)),
        label2id={name: i for i, name in enumerate(label_names)},
    )
    if model.config.pad_token_id is None:  # decoders pool the last token before the padding
        model.config.pad_token_id = model.config.eos_token_id
    return model, fresh


def load_model(
    auto_class: str,
    backbone: str,
    dtype: torch.dtype,
    storage: BaseStorage | None = None,
    *,
    resized: bool = False,
    **config: Any,
) -> tuple[Any, list[str]]:
    """Loads a transformers model with a head in training mode; under `without_weights` its shapes alone.

    Args:
        auto_class: Name of the class of transformers that loads it, AutoModelForCausalLM for instance.
        backbone: Hub id, local folder, or demo.
        dtype: Dtype of the loaded weights; of quantised ones, the one that they are quantised from.
        storage: How the base is to be stored; None: in that dtype.
        resized: Whether a head of another size than the checkpoint's is a new one, and no error.
        **config: Entries of the model's configuration.

    Returns:
        The model, and the names of the parameters that the checkpoint did not hold. One that is tied to a parameter
        which it held is not new.

    Raises:
        ValueError: When the architecture has no model of that class.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    source, auto = hub.locate(backbone), getattr(transformers, auto_class)
    quantised: dict[str, Any] = {}
    with hub.explained(backbone):
        found = transformers.AutoConfig.from_pretrained(source, **config)
        _check_head(auto, found, backbone)
    if storage is not None or is_weightless():
        with hub.explained(backbone), torch.device("meta"):
            skeleton = auto.from_config(found)
        if is_weightless():
            return skeleton.to(dtype).train(), _new_heads(skeleton)
        assert storage is not None
        quantised = storage.arguments(skeleton)
    # Lightning's context would place, and rename the hooks of, what is loaded.
    with hub.explained(backbone), torch.device("cpu"):
        model, report = auto.from_pretrained(
            source,
            **config,
            dtype=dtype,
            ignore_mismatched_sizes=resized,
            output_loading_info=True,
            **quantised,
        )
    recognise(model)
    fresh = {*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])}
    # `from_pretrained` returns evaluation mode, which Lightning keeps: dropout would stay off.
    return model.train(), _untied(model, fresh)


def _check_head(auto: Any, config: Any, backbone: str) -> None:
    """Raises ValueError where transformers has no model of an auto class for a configuration."""
    if not _has_head(auto, config) and "AutoModel" not in str(getattr(config, "auto_map", "")):
        kind, task = _LANGUAGE.get(auto.__name__, (None, None))
        what = f"{kind} language model" if kind else auto.__name__
        raise ValueError(
            f"backbone: {backbone} is of type {config.model_type}, of which transformers has no {what}: "
            f"{use_instead(config, task)}."
        )


def use_instead(config: Any, task: str | None) -> str:
    """What trains a model for which a task is not: the other language task, or a module of one's own."""
    import transformers

    for name, (_, other) in _LANGUAGE.items():
        reads_back = name == "AutoModelForCausalLM" and config.model_type == "xlnet"  # by its name alone it is causal
        if task not in (None, other) and not reads_back and _has_head(getattr(transformers, name), config):
            return f"use {other}"
    return "train it in a LightningModule of your own, to which methods attach as to any"


def _has_head(auto: Any, config: Any) -> bool:
    return type(config) in auto._model_mapping


def _untied(model: nn.Module, fresh: set[str]) -> list[str]:
    """The parameters among these names, without those that also go by a name which is not among them."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return sorted(own[0] for own in names.values() if fresh.issuperset(own))


def max_positions(backbone: str, model: nn.Module | None = None) -> int | None:
    """Tokens of the longest text that a model has positions for: its table's rows, or what its configuration says.

    Args:
        backbone: Where it is loaded from; nothing but its configuration is read.
        model: The model, where it is there already.

    Returns:
        Their number; None for positions without an end, as T5's, which are relative.
    """
    if model is None:
        with without_weights():
            model, _ = load_model("AutoModel", backbone, torch.float32)
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # the others are MPT's and Whisper's
    told = [getattr(model.config, name, None) for name in names]
    return min((room for room in (*told, position_room(model)) if room and room > 0), default=None)


def check_tokenizer(name: str, tokenizer: Any, backbone: str, model: Any = None) -> None:
    """Whether a model can read what a tokenizer writes; its own is not looked at.

    Args:
        name: Where the tokenizer is from.
        tokenizer: The tokenizer.
        backbone: Where the model is from.
        model: The model of transformers, where it is there already.

    Raises:
        ValueError: When it has ids that the model has no embedding for.
    """
    from transformers import AutoConfig, AutoTokenizer

    if name == backbone:  # as a rule: the hub need not be asked
        return
    source = hub.locate(backbone)
    if hub.locate(name) == source:
        return
    ids, advice = tokenizer.get_vocab(), "Leave data.tokenizer out, which takes the model's own."
    if model is not None:
        size: int | None = len(model.get_input_embeddings().weight)
    else:
        with hub.explained(backbone):
            size = getattr(AutoConfig.from_pretrained(source).get_text_config(), "vocab_size", None)
    if size is not None and max(ids.values(), default=0) >= size:
        raise ValueError(
            f"data.tokenizer: {name} has ids up to {max(ids.values()):,}, {backbone} embeds {size:,} tokens. {advice}"
        )
    try:
        own = {id: token for token, id in AutoTokenizer.from_pretrained(source).get_vocab().items()}
    except Exception:  # none that can be read here, which may be why another is given
        return
    if size is None or 2 * len(own) < size:  # from weights alone transformers makes one of special tokens
        return
    others = sum(own.get(id, token) != token for token, id in ids.items())
    if others > len(ids) / 100:  # some are renamed, as unused ones
        rank_zero_warn(
            f"data.tokenizer: {others:,} of {len(ids):,} tokens of {name} are other tokens to {backbone}, which will "
            f"misread them. {advice}"
        )


def _new_heads(skeleton: Any) -> list[str]:
    """Names of the parameters that a checkpoint will not hold, by what its configuration says that it is of."""
    if type(skeleton).__name__ in (skeleton.config.architectures or ()):
        return []
    body = f"{skeleton.base_model_prefix}."
    outside = {name for name, _ in skeleton.named_parameters(remove_duplicate=False) if not name.startswith(body)}
    return _untied(skeleton, outside)
