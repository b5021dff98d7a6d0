"""What the round-trip matrix runs on: architectures, and each method as ours and as a configuration of HF PEFT's.

Both sides name the same layers; nothing of ours is used to make HF PEFT's.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn

from lit_peft import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    DoRA,
    FullFineTuning,
    HiRA,
    LinearProbe,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    SparseLoRA,
    VeRA,
)
from lit_peft.methods.base import Method
from lit_peft.testing.subjects import MODELS


@dataclass(frozen=True)
class Arch:
    """An architecture.

    Attributes:
        make: Builds it, random.
        task: HF PEFT's task type.
        head: Its head: our `train_also`, HF PEFT's `modules_to_save`.
        targets: Names of adapted layers: attention's, and a feed-forward network's down projection.
        embedding: Name of its embedding.
        loud: What its matrices are multiplied by, so that its logits hear every layer.
        sizes: Whether HF PEFT must be told its sizes.
        extra: Further inputs.
    """

    make: Callable[[], nn.Module]
    task: str | None
    head: tuple[str, ...]
    targets: tuple[str, ...]
    embedding: str
    loud: float = 5.0
    sizes: bool = False
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter)).mul_(self.loud if parameter.ndim == 2 else 1.0)
        return model

    def inputs(self, padded: bool = True) -> dict[str, Tensor]:
        if self.task is None:
            return {"x": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))}
        ids = torch.tensor([[3, 7, 11, 23, 5, 9], [8, 2, 31, 4, 12, 6]])
        mask = torch.ones_like(ids)
        if padded:
            ids[1, 4:], mask[1, 4:] = 1, 0
        return {"input_ids": ids, "attention_mask": mask, **self.extra}


def _model(name: str, **config: Any) -> Callable[[], nn.Module]:
    kind = name.partition("For")[0]
    return lambda: getattr(tf, name)(getattr(tf, f"{kind}Config")(vocab_size=50, pad_token_id=1, **config))


WIDTH = 16
_BERT = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT_TARGETS = ("query", "value", "attention.output.dense")
_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
_LLAMA = {"num_key_value_heads": 1, "max_position_embeddings": 16, **_BERT}

ARCHS: dict[str, Arch] = {
    "DistilBERT": Arch(
        MODELS["distilbert"].make,
        "SEQ_CLS",
        ("pre_classifier", "classifier"),
        ("q_lin", "v_lin", "lin2"),
        "word_embeddings",
        sizes=True,
    ),
    "BERT": Arch(MODELS["bert"].make, "SEQ_CLS", ("pooler", "classifier"), _BERT_TARGETS, "word_embeddings"),
    "RoBERTa": Arch(MODELS["roberta"].make, "SEQ_CLS", ("classifier",), _BERT_TARGETS, "word_embeddings"),
    "BERT (questions)": Arch(
        _model("BertForQuestionAnswering", max_position_embeddings=16, **_BERT),
        "QUESTION_ANS",
        ("qa_outputs",),
        _BERT_TARGETS,
        "word_embeddings",
    ),
    "BERT (tokens)": Arch(
        _model("BertForTokenClassification", max_position_embeddings=16, **_BERT),
        "TOKEN_CLS",
        ("classifier",),
        _BERT_TARGETS,
        "word_embeddings",
    ),
    "GPT-2": Arch(MODELS["gpt2"].make, "CAUSAL_LM", (), ("c_attn", "mlp.c_proj"), "wte"),
    "GPT-2 (classes)": Arch(
        lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(vocab_size=50, pad_token_id=1, **_GPT2)),
        "SEQ_CLS",
        ("score",),
        ("c_attn", "mlp.c_proj"),
        "wte",
    ),
    "Llama": Arch(MODELS["llama"].make, "CAUSAL_LM", (), ("q_proj", "v_proj", "down_proj"), "embed_tokens"),
    "Llama (classes)": Arch(
        _model("LlamaForSequenceClassification", **_LLAMA),
        "SEQ_CLS",
        ("score",),
        ("q_proj", "v_proj", "down_proj"),
        "embed_tokens",
    ),
    "T5": Arch(
        MODELS["t5"].make,
        "SEQ_2_SEQ_LM",
        (),
        ("q", "v", "wo"),
        "embed_tokens",
        loud=1.0,
        extra={"decoder_input_ids": torch.tensor([[0, 4, 9], [0, 6, 2]])},
    ),
}
TEXT = tuple(ARCHS)
ARCHS["ConvNet"] = Arch(MODELS["conv_net"].make, None, ("head",), ("first", "second"), "", 1.0)
N = 3
"""Virtual tokens."""


@dataclass(frozen=True)
class Row:
    """A method and what changes its format.

    Attributes:
        ours: Our method for an architecture.
        theirs: HF PEFT's configuration of the same; none where it has no such method.
        archs: Architectures it is for.
        prepare: Changes an adapter of ours or a model of HF PEFT's after it was made, by pruning for instance.
        step: Size of the noise that moves additions.
        skip: Virtual tokens in front of HF PEFT's outputs a token.
    """

    ours: Callable[[Arch], Method] | None
    theirs: Callable[[Arch], peft.PeftConfig] | None = None
    archs: tuple[str, ...] = TEXT
    prepare: Callable[[nn.Module], None] = lambda model: None
    step: float = 0.3
    skip: int = 0


def _ours(cls: Any, *args: Any, **more: Any) -> Callable[[Arch], Method]:
    def make(arch: Arch) -> Method:
        given = {key: value(arch) if callable(value) else value for key, value in more.items()}
        return cls(*args, **{"train_also": list(arch.head)} | given)

    return make


def _prompts(cls: Any, **more: Any) -> Callable[[Arch], peft.PeftConfig]:
    """Sizes are given, since HF PEFT does not know all of DistilBERT's."""
    sizes = {"token_dim": WIDTH, "num_attention_heads": 2, "num_layers": 2}
    return lambda arch: _theirs(cls, num_virtual_tokens=N, **more, **(sizes if arch.sizes else {}))(arch)


def _theirs(cls: Any, **more: Any) -> Callable[[Arch], peft.PeftConfig]:
    def make(arch: Arch) -> peft.PeftConfig:
        given = {key: value(arch) if callable(value) else value for key, value in more.items()}
        return cls(task_type=arch.task, modules_to_save=list(arch.head) or None, **given)

    return make


def _targets(arch: Arch) -> list[str]:
    return list(arch.targets)


def _with_embedding(arch: Arch) -> list[str]:
    return [arch.embedding, *arch.targets]


def _down(arch: Arch) -> list[str]:
    return [arch.targets[-1]]


def _lora(ours: Mapping[str, Any] = {}, theirs: Mapping[str, Any] = {}, cls: Any = LoRA, **row: Any) -> Row:
    first = {"r": 4, "alpha": 6, "dropout": 0.0, "target_modules": _targets}
    second = {"r": 4, "lora_alpha": 6, "target_modules": _targets}
    return Row(_ours(cls, **first | dict(ours)), _theirs(peft.LoraConfig, **second | dict(theirs)), **row)


def _ranks(arch: Arch) -> dict[str, int]:
    return {arch.targets[0]: 2}


def _alphas(arch: Arch) -> dict[str, int]:
    return {arch.targets[1]: 5}


def _prune_adalora(model: nn.Module) -> None:
    """Leaves of the first layer two ranks, of the second none."""
    masks = [torch.tensor([False, True, True, False]), torch.zeros(4, dtype=torch.bool)]
    pattern = {}
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_E")]
    for i, (name, layer) in enumerate(layers):
        kept = masks[i] if i < 2 else torch.ones(4, dtype=torch.bool)
        E = layer.lora_E if isinstance(layer.lora_E, Tensor) else layer.lora_E["default"]
        E.data[~kept] = 0
        if hasattr(layer, "kept"):
            layer.kept.copy_(kept)
        pattern[f"{name.removeprefix('base_model.model.')}.lora_E.default"] = kept.tolist()
    if isinstance(model, peft.PeftModel):
        model.peft_config["default"].rank_pattern = pattern


def _prune_sparse(model: nn.Module) -> None:
    """Two gates of the first layer become zero and all of the second's; or rows of `A` and entries."""
    deltas = [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "sparsity")]
    for i, delta in enumerate(deltas[:2]):
        gone = slice(None) if i else slice(1, 3)
        if delta.sparsity == "structured":
            delta.gate.data[gone] = 0
        else:
            delta.lora_A.data[gone] = 0
        delta.lora_B.data[::2] = 0


_ADALORA = Row(
    _ours(AdaLoRA, init_r=4, target_r=2, alpha=6, total_steps=10, target_modules=_targets),
    _theirs(peft.AdaLoraConfig, init_r=4, target_r=2, lora_alpha=6, total_step=10, target_modules=_targets),
)
_PRUNED = {"prepare": _prune_adalora}
_BIASES = tuple(name for name in TEXT if name not in ("T5", "Llama", "Llama (classes)"))


def _at_convolutions(ours: Any, theirs: Any, some: Mapping[str, Any], other: Mapping[str, Any]) -> Row:
    first, second = (
        cls(kind, target_modules=_targets, **more)
        for cls, kind, more in ((_ours, ours, some), (_theirs, theirs, other))
    )
    return Row(first, second, archs=("ConvNet",))


def _sparse(sparsity: str) -> Row:
    ours = _ours(SparseLoRA, sparsity, r=4, alpha=6, dropout=0.0, target_modules=_targets)
    return Row(ours, archs=(*TEXT, "ConvNet"), prepare=_prune_sparse)


def _virtual(
    name: str, ours: Any, theirs: Any, some: Mapping[str, Any] = {}, other: Mapping[str, Any] = {}, skip: int = 0
) -> dict[str, Row]:
    """A prompt method as it is by itself, and with texts placed as HF PEFT places them."""
    return {
        name: Row(_ours(ours, N, **some), skip=skip),
        f"{name} as_hf_peft": Row(_ours(ours, N, as_hf_peft=True, **some), _prompts(theirs, **other), skip=skip),
    }


ROWS: dict[str, Row] = {
    "LoRA": _lora(),
    "LoRA (rank-stabilised)": _lora({"use_rslora": True}, {"use_rslora": True}),
    "LoRA (rank and alpha patterns)": _lora(
        {"rank_pattern": _ranks, "alpha_pattern": _alphas}, {"rank_pattern": _ranks, "alpha_pattern": _alphas}
    ),
    "LoRA (biases of its layers)": _lora({"bias": "lora_only"}, {"bias": "lora_only"}, archs=_BIASES),
    "LoRA (all biases)": _lora({"bias": "all"}, {"bias": "all"}, archs=_BIASES),
    "LoRA (embedding)": _lora({"target_modules": _with_embedding}, {"target_modules": _with_embedding}),
    "LoRA (tied head)": Row(
        _ours(LoRA, r=4, alpha=6, dropout=0.0, target_modules=_targets, train_also=("lm_head",)),
        lambda arch: peft.LoraConfig(
            task_type=arch.task,
            r=4,
            lora_alpha=6,
            target_modules=_targets(arch),
            modules_to_save=["lm_head"],
            ensure_weight_tying=True,
        ),
        archs=("GPT-2", "T5"),
    ),
    "LoRA (convolutions)": _lora(archs=("ConvNet",)),
    "DoRA": _lora(theirs={"use_dora": True}, cls=DoRA),
    "DoRA (embedding)": _lora(
        {"target_modules": _with_embedding}, {"target_modules": _with_embedding, "use_dora": True}, DoRA
    ),
    "DoRA (convolutions)": _lora(theirs={"use_dora": True}, cls=DoRA, archs=("ConvNet",)),
    "HiRA": Row(
        _ours(HiRA, r=4, target_modules=_targets), _theirs(peft.HiraConfig, r=4, target_modules=_targets), step=1.0
    ),
    "HiRA (embedding)": Row(
        _ours(HiRA, r=4, target_modules=_with_embedding),
        _theirs(peft.HiraConfig, r=4, target_modules=_with_embedding),
        step=1.0,
    ),
    "AdaLoRA": _ADALORA,
    "AdaLoRA (pruned)": Row(_ADALORA.ours, _ADALORA.theirs, **_PRUNED),
    "VeRA": Row(
        _ours(VeRA, r=8, seed=5, target_modules=_targets),
        _theirs(peft.VeraConfig, r=8, projection_prng_key=5, target_modules=_targets),
        step=1.0,
    ),
    "VeRA (by its seed)": Row(
        _ours(VeRA, r=8, seed=5, save_projection=False, target_modules=_targets),
        _theirs(peft.VeraConfig, r=8, projection_prng_key=5, save_projection=False, target_modules=_targets),
        step=1.0,
    ),
    "IA3": Row(
        _ours(IA3, feedforward_modules=_down, target_modules=_targets),
        _theirs(peft.IA3Config, feedforward_modules=_down, target_modules=_targets),
    ),
    "HiRA (convolutions)": _at_convolutions(HiRA, peft.HiraConfig, {"r": 2}, {"r": 2}),
    "AdaLoRA (convolutions)": _at_convolutions(
        AdaLoRA, peft.AdaLoraConfig, {"init_r": 4, "target_r": 2}, {"init_r": 4, "target_r": 2, "total_step": 10}
    ),
    "VeRA (convolutions)": _at_convolutions(VeRA, peft.VeraConfig, {"r": 8}, {"r": 8}),
    "IA3 (convolutions)": _at_convolutions(
        IA3, peft.IA3Config, {"feedforward_modules": "re:none"}, {"feedforward_modules": []}
    ),
    "IA3 (inputs of convolutions)": _at_convolutions(
        IA3, peft.IA3Config, {"feedforward_modules": _down}, {"feedforward_modules": _down}
    ),
    "SparseLoRA (structured)": _sparse("structured"),
    "SparseLoRA (magnitude)": _sparse("magnitude"),
    "SparseLoRA (l1)": _sparse("l1"),
    **_virtual("PrefixTuning", PrefixTuning, peft.PrefixTuningConfig),
    **_virtual(
        "PrefixTuning (reparametrised)",
        PrefixTuning,
        peft.PrefixTuningConfig,
        {"reparametrise": True, "hidden_size": 5},
        {"prefix_projection": True, "encoder_hidden_size": 5},
    ),
    **_virtual("PromptTuning", PromptTuning, peft.PromptTuningConfig, skip=N),
    **_virtual("PTuning", PTuning, peft.PromptEncoderConfig, {"hidden_size": 5}, {"encoder_hidden_size": 5}, skip=N),
    "PTuning (LSTM)": Row(
        None,
        _prompts(peft.PromptEncoderConfig, encoder_hidden_size=5, encoder_reparameterization_type="LSTM"),
        skip=N,
    ),
    "BitFit": Row(_ours(BitFit), archs=_BIASES),
    "LinearProbe": Row(_ours(LinearProbe), archs=tuple(name for name in TEXT if ARCHS[name].head)),
    "BottleneckAdapter": Row(_ours(BottleneckAdapter, reduction_factor=4)),
    "FullFineTuning": Row(_ours(FullFineTuning)),
}
