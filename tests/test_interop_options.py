"""Folders of HF PEFT's with every option of its configs: read with equal outputs both ways, or refused by name.

HF PEFT makes, changes and saves each; nothing of ours is in it.
"""

import json
import warnings
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from interop_matrix import HEARD, TOLERANCE, Subject, change, largest
from interop_rows import ARCHS, ROWS
from safetensors.torch import load_file
from torch import nn

import lit_peft
from lit_peft import BitFit, DoRA, LoRA, PrefixTuning, PromptTuning, SparseLoRA
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.registry import registry
from lit_peft.demo import ENCODER
from lit_peft.methods.registry import available
from lit_peft.tasks import TextClassification

pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(arch: str, config: peft.PeftConfig, folder: Path) -> tuple[nn.Module, torch.Tensor]:
    """HF PEFT's model with all of it moved, saved to a folder, and its logits, which hear it."""
    subject = Subject("LoRA", arch)
    model = peft.get_peft_model(subject.arch.build(), config, autocast_adapter_dtype=False).eval()
    before = subject.logits(subject.arch.build())
    change(model, False, {"VERA": 1.0, "HIRA": 1.0, "ADALORA": 0.5}.get(config.peft_type, 0.3))
    added = subject.logits(model)
    assert largest(added, before) > HEARD
    change(model, True, 0.3)
    model.save_pretrained(folder)
    return model, subject.logits(model)


def check_both_ways(arch: str, expected: torch.Tensor, folder: Path) -> None:
    subject = Subject("LoRA", arch)
    model = subject.loaded(folder)
    assert largest(subject.logits(model), expected) <= TOLERANCE
    lit_peft.save(model, folder / "again")
    assert largest(subject.logits(subject.opened(folder / "again")), expected) <= TOLERANCE


def lora(arch: str, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": ARCHS[arch].task} | options)


def reads(arch: str, cls: Any, **options: Any) -> tuple[str, Any]:
    return arch, lambda: cls(task_type=ARCHS[arch].task, **options)


def reads_lora(arch: str, **options: Any) -> tuple[str, Any]:
    return arch, lambda: lora(arch, **options)


READ = {
    "layers": reads_lora("Llama", target_modules=["q_proj"], layers_to_transform=[1]),
    "layers by a pattern": reads_lora(
        "Llama", target_modules=["q_proj"], layers_to_transform=1, layers_pattern="layers"
    ),
    "all-linear, Llama": reads_lora("Llama", target_modules="all-linear"),
    "all-linear, GPT-2": reads_lora("GPT-2", target_modules="all-linear"),
    "all-linear, T5": reads_lora("T5", target_modules="all-linear"),
    "all-linear, BERT": reads_lora("BERT", target_modules="all-linear"),
    "all-linear, RoBERTa": reads_lora("RoBERTa", target_modules="all-linear"),
    "all-linear, classes": reads_lora("Llama (classes)", target_modules="all-linear"),
    "default targets": reads_lora("GPT-2"),
    "expression": reads_lora("Llama", target_modules=r".*layers\.0\.(self_attn|mlp)\.(q|up)_proj"),
    "excluded": reads_lora("Llama", target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"]),
    "excluded by an expression": reads_lora("Llama", target_modules=["q_proj"], exclude_modules=r".*layers\.1.*"),
    "rank-stabilised patterns": reads_lora(
        "Llama",
        target_modules=["q_proj", "v_proj"],
        use_rslora=True,
        rank_pattern={r"layers\.0.*q_proj": 2},
        alpha_pattern={"v_proj": 7},
    ),
    "rank-stabilised DoRA": reads_lora("Llama", target_modules=["q_proj"], use_dora=True, use_rslora=True),
    "DoRA with biases": reads_lora("GPT-2", target_modules=["c_attn"], use_dora=True, bias="lora_only"),
    **{
        f"start: {init}": reads_lora("Llama", target_modules=["q_proj"], init_lora_weights=init)
        for init in (True, False, "gaussian", "orthogonal")
    },
    "a head beside": reads_lora("BERT", target_modules=["query"], modules_to_save=["pooler"]),
    "a norm beside": reads_lora("Llama", target_modules=["q_proj"], modules_to_save=["norm"]),
    "untied embeddings beside": reads_lora(
        "Llama", target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    ),
    "an adapted head": reads_lora("Llama", target_modules=["q_proj", "lm_head"]),
    "adapted tied embeddings": reads_lora("GPT-2", target_modules=["lm_head", "wte"]),
    "adapters that are tied": reads_lora("GPT-2", target_modules=["lm_head", "wte"], ensure_weight_tying=True),
    "no task": ("BERT", lambda: lora("BERT", task_type=None, target_modules=["query"], modules_to_save=["classifier"])),
    "VeRA, all biases": reads("BERT", peft.VeraConfig, r=8, target_modules=["query"], bias="all"),
    "VeRA, its biases": reads("BERT", peft.VeraConfig, r=8, target_modules=["query"], bias="vera_only"),
    "VeRA, layers of other sizes": reads(
        "Llama", peft.VeraConfig, r=8, target_modules=["k_proj", "up_proj", "down_proj"], d_initial=0.3
    ),
    "AdaLoRA, all biases": reads(
        "BERT", peft.AdaLoraConfig, init_r=4, target_r=2, total_step=9, target_modules=["query"], bias="all"
    ),
    "AdaLoRA, a schedule": reads(
        "Llama", peft.AdaLoraConfig, init_r=4, target_r=2, total_step=9, tinit=2, tfinal=3, target_modules=["q_proj"]
    ),
    "IA3, BERT's targets": reads("BERT", peft.IA3Config),
    "IA3, GPT-2's targets": reads("GPT-2", peft.IA3Config),
    "IA3, T5's targets": reads("T5", peft.IA3Config),
    "IA3, expressions": reads(
        "Llama", peft.IA3Config, target_modules=r".*\.(k|down)_proj", feedforward_modules=r".*\.down_proj"
    ),
    "IA3, outputs alone": reads("Llama", peft.IA3Config, target_modules=["k_proj"], feedforward_modules=[]),
    "HiRA, ranks that peft 0.21.2 does not give": reads(
        "Llama", peft.HiraConfig, r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2}
    ),
    "a prefix from zeros": reads("Llama", peft.PrefixTuningConfig, num_virtual_tokens=3, init_weights="zero"),
}


@pytest.mark.parametrize("case", READ)
def test_options_that_are_read(case, tmp_path):
    arch, config = READ[case]
    check_both_ways(arch, theirs(arch, config(), tmp_path)[1], tmp_path)


TIED = "and the two are one parameter here: train it in HF PEFT with ensure_weight_tying"
REFUSED = {
    "PiSSA": (reads_lora("Llama", init_lora_weights="pissa"), "'pissa' has changed the base too"),
    "fast PiSSA": (reads_lora("Llama", init_lora_weights="pissa_niter_2"), "'pissa_niter_2' has changed the base too"),
    "OLoRA": (reads_lora("Llama", init_lora_weights="olora"), "'olora' has changed the base too"),
    "a bias of B": (reads_lora("BERT", target_modules=["query"], lora_bias=True), "lora_bias=True, which LoRA does"),
    "tokens": (reads_lora("Llama", trainable_token_indices=[1, 2]), r"trainable_token_indices=\[1, 2\], which LoRA"),
    "parameters": (
        reads_lora("Llama", target_parameters=["o_proj.weight"]),
        r"target_parameters=\['o_proj.weight'\], which LoRA",
    ),
    "replicated layers": (
        reads_lora("Llama", layer_replication=[[0, 2], [1, 2]]),
        r"layer_replication=\[\[0, 2\], \[1",
    ),
    "aLoRA": (reads_lora("Llama", alora_invocation_tokens=[3]), r"alora_invocation_tokens=\[3\], which LoRA"),
    "QALoRA": (reads_lora("Llama", use_qalora=True), "use_qalora=True, which LoRA"),
    "a head apart from its embedding": (
        reads_lora("GPT-2", modules_to_save=["lm_head"]),
        rf"lm_head.weight was trained apart from transformer.wte.weight, {TIED}",
    ),
    "an embedding apart from its head": (
        reads_lora("GPT-2", modules_to_save=["wte"]),
        rf"transformer.wte.weight was trained apart from lm_head.weight, {TIED}",
    ),
    "both apart": (reads_lora("GPT-2", modules_to_save=["wte", "lm_head"]), TIED),
    "T5's embedding apart": (reads_lora("T5", modules_to_save=["shared"]), TIED),
    "more ranks than the layer has": (
        ("BERT", lambda: lora("BERT", task_type=None, target_modules=["query", "classifier"])),
        "r = 4 exceeds the smaller side of classifier, 2 x 16",
    ),
    "DoRA of an embedding": (
        reads_lora("Llama", target_modules=["embed_tokens"], use_dora=True),
        "has another equation",
    ),
    "LoHa": (reads("Llama", peft.LoHaConfig, r=4, target_modules=["q_proj"]), "peft_type 'LOHA' has no method here"),
    "layer norms": (reads("Llama", peft.LNTuningConfig), "peft_type 'LN_TUNING' has no method here; known: ADALORA"),
    "IA3 of a convolution's input": (
        reads("ConvNet", peft.IA3Config, target_modules=["second"], feedforward_modules=["second"]),
        r"second.ia3_l has shape \[1, 8, 1, 1\] in the folder",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_are_refused_by_name_leave_the_module_as_it_was(case, tmp_path):
    (arch, config), message = REFUSED[case]
    build = ARCHS[arch].build
    peft.get_peft_model(build(), config(), autocast_adapter_dtype=False).eval().save_pretrained(tmp_path)
    if case.startswith(("a head apart", "an embedding", "both", "T5")):
        theirs(arch, config(), tmp_path)
    model, fresh = build(), build().state_dict()
    with pytest.raises(CheckpointMismatch, match=message):
        lit_peft.load(model, tmp_path)
    assert registry(model) is None
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------- configs of older and newer releases

METHODS = ["LoRA", "DoRA", "HiRA", "AdaLoRA", "VeRA", "IA3", "PrefixTuning as_hf_peft", "PromptTuning as_hf_peft"]
METHODS += ["PTuning as_hf_peft"]


def saved(row: str, folder: Path) -> tuple[Subject, torch.Tensor, Path]:
    """A folder of HF PEFT's, by the row of the matrix, on Llama."""
    subject = Subject(row, "Llama")
    model = subject.theirs()
    expected, heard = subject.changed(model)
    assert heard > HEARD
    model.save_pretrained(folder)
    return subject, expected, folder / "adapter_config.json"


@pytest.mark.parametrize("row", METHODS)
def test_a_config_may_lack_what_has_a_default_and_hold_what_asks_for_nothing(row, tmp_path):
    subject, expected, file = saved(row, tmp_path)
    config = json.loads(file.read_text())
    entry = ROWS[row].theirs(subject.arch)
    defaults = {f.name: f.default for f in fields(entry)}
    older = {k: v for k, v in config.items() if k in ("peft_type", "task_type") or (v and v != defaults.get(k))}
    assert len(older) < len(config) - 3
    newer = {"of_later": None, "use_later": False, "later_config": {}, "later_pattern": [], "later_scale": 0}
    for changed in (older, config | newer):
        file.write_text(json.dumps(changed))
        assert largest(subject.logits(subject.loaded(tmp_path)), expected) <= TOLERANCE
    for key, value in (("use_later", True), ("later_scale", 0.5), ("later_variant", "x"), ("later_config", {"a": 0})):
        file.write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointMismatch, match=f"adapter_config.json asks for {key}="):
            subject.loaded(tmp_path)


def test_our_defaults_of_missing_entries_are_hf_pefts():
    compared = 0
    for entry in available().values():
        cls: Any = entry.load()
        if (form := vars(cls).get("hf_peft")) is None:
            continue
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[form["peft_type"]]
        defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(config)}
        for key, value in cls.hf_options.items():
            assert key in defaults, f"{cls.__name__}: HF PEFT has no {key}"
            if value is not None and key not in ("total_step",):
                compared += 1
                assert value == (defaults[key] or value if isinstance(value, (dict, list)) else defaults[key]), key
    assert compared > 20


# ---------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("start", ["RANDOM", "SAMPLE_VOCAB", "TEXT"])
def test_prompts_however_they_started(start, tokenizer, tmp_path):
    text = {"prompt_tuning_init_text": "w1 w2", "tokenizer_name_or_path": tokenizer} if start == "TEXT" else {}
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init=start, **text)
    subject = Subject("PromptTuning", "Llama")
    model = peft.get_peft_model(subject.arch.build(), config).eval()
    expected = subject.logits(model)
    model.save_pretrained(tmp_path)
    assert largest(subject.logits(subject.loaded(tmp_path)), expected) <= TOLERANCE


@pytest.mark.parametrize("cls", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_prompts_of_an_encoder_without_a_head(cls, tmp_path):
    def body() -> nn.Module:
        return ARCHS["BERT"].build().bert

    model = peft.get_peft_model(body(), cls(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path)
    ours, batch = body(), ARCHS["BERT"].inputs()
    lit_peft.load(ours, tmp_path)
    with torch.no_grad():
        first, second, base = (m(**batch).last_hidden_state[:, -6:] for m in (model, ours, body()))
    assert largest(first, base) > HEARD and largest(first, second) <= TOLERANCE


def test_a_prompts_frozen_head_is_in_neither_folder_and_the_bases_stays(tmp_path):
    """HF PEFT trains it unasked for a sequence classifier; ours only if it is named."""
    subject = Subject("PromptTuning as_hf_peft", "BERT")
    model = subject.arch.build()
    PromptTuning(3, as_hf_peft=True).attach(model)
    change(model, False, 0.3)
    lit_peft.save(model, tmp_path)
    assert largest(subject.logits(subject.opened(tmp_path)), subject.logits(model)) <= TOLERANCE
    loaded = subject.loaded(tmp_path)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {"bert.peft.default.prompt_embeddings"}


def test_hf_pefts_prefix_of_t5_gives_layers_the_same_and_leaves_others_unread():
    """Why it is refused: with two layers, keys and values of the second are never read."""
    subject = Subject("PrefixTuning as_hf_peft", "T5")
    model = subject.theirs()
    values = model.prompt_encoder["default"].embedding.weight  # [n, keys and values of both layers]
    half = values.shape[1] // 2
    before = subject.logits(model)
    with torch.no_grad():
        values[:, half:] += 1
    assert torch.equal(subject.logits(model), before)
    with torch.no_grad():
        values[:, :half] += 1
    assert largest(subject.logits(model), before) > HEARD


# ------------------------------------------------------------------------------------- through our own task

TASK = {
    "LoRA": LoRA(r=4),
    "DoRA": DoRA(r=4),
    "SparseLoRA": SparseLoRA("structured", r=4),
    "BitFit": BitFit(),
    "PromptTuning": PromptTuning(3, as_hf_peft=True),
}


def classifier() -> nn.Module:
    torch.manual_seed(3)
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    return tf.AutoModelForSequenceClassification.from_pretrained(ENCODER, **names).eval()


@pytest.mark.parametrize("name", TASK)
def test_what_our_task_trained_opens_in_hf_peft_on_the_bare_model_and_comes_back(name, tmp_path):
    task = TextClassification(label_names=["bad", "good"])
    task.configure_model()
    TASK[name].attach(task)
    for base in (False, True):
        change(task, base, 0.3)
    task.eval()
    batch = {"input_ids": torch.tensor([[2, 7, 9, 4], [2, 5, 8, 3]]), "attention_mask": torch.ones(2, 4).long()}
    with torch.no_grad():
        expected = task.model(**batch).logits
        bare = classifier()
        assert largest(bare(**batch).logits, expected) > HEARD
        lit_peft.save(task, tmp_path)
        opened = peft.PeftModel.from_pretrained(bare, str(tmp_path)).eval()
        assert largest(opened(**batch).logits, expected) <= TOLERANCE
        opened.save_pretrained(tmp_path / "again")
        fresh = TextClassification(label_names=["bad", "good"])
        lit_peft.load(fresh, tmp_path / "again")
        assert largest(fresh.eval().model(**batch).logits, expected) <= TOLERANCE


def test_hf_pefts_auto_class_builds_base_and_adapter_from_our_folder(tmp_path):
    base = classifier()
    base.save_pretrained(tmp_path / "base")
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    LoRA(r=4, train_also=["pre_classifier", "classifier"]).attach(model)
    for part in (False, True):
        change(model, part, 0.3)
    lit_peft.save(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "adapter")).eval()
    batch = {"input_ids": torch.tensor([[2, 7, 9, 4]])}
    with torch.no_grad():
        assert largest(auto(**batch).logits, model(**batch).logits) <= TOLERANCE
        assert largest(base(**batch).logits, model(**batch).logits) > HEARD
    assert auto.config.id2label == {0: "bad", 1: "good"}


def test_a_prefix_of_ours_says_whether_hf_peft_may_open_it(tmp_path):
    types = {}
    for as_hf_peft in (False, True):
        model = ARCHS["BERT"].build()
        PrefixTuning(3, as_hf_peft=as_hf_peft).attach(model)
        folder = lit_peft.save(model, tmp_path / str(as_hf_peft))
        types[as_hf_peft] = json.loads((folder / "adapter_config.json").read_text())["peft_type"]
        assert set(load_file(folder / "adapter_model.safetensors")) >= {"prompt_embeddings"}
    assert types == {False: "LIT_PEFT_PREFIX_TUNING", True: "PREFIX_TUNING"}
