"""Folders of models that were merged on a base in 4 or 8 bit: floats for any transformers, or codes."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from models import logits, tiny
from safetensors.torch import load_file
from test_merge_quantized import FEW, KINDS, NF4, adapted
from torch import nn

import lit_peft
from lit_peft import LoRA, merge, unmerge
from lit_peft.core.buffers import holds
from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import choose_layers, make_quantizer, recognise, stored_as
from lit_peft.saving.merged import read_again, save_merged
from lit_peft.testing.conformance import assert_same, perturb, snapshot

TORCHAO = [(name, kind) for name in ("distilbert", "llama") for kind in FEW if kind == "int8_torchao"]
HEADS = {"bert": ["classifier"], "distilbert": ["classifier", "pre_classifier"]}


def loaded(name: str, folder: Path, quantize: Any = NF4) -> nn.Module:
    """A tiny model that transformers loads in few bits, with a LoRA."""
    plain = tiny(name)
    plain.save_pretrained(folder)
    quantizer = make_quantizer(quantize)
    left = [path for path, why in choose_layers(plain, quantizer, HEADS.get(name, [])).items() if why is not None]
    model = type(plain).from_pretrained(folder, quantization_config=quantizer.loading_config(left)).eval()
    LoRA(r=2, dropout=0.0, target_modules="attention", train_also=HEADS.get(name, [])).attach(model)
    perturb(model)
    return model


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("origin", ["ours", "transformers"])
@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", "nf4"), ("bert", "int8"), ("t5", "nf4"), ("llama", "nf4"), *TORCHAO]
)
def test_a_dequantized_folder_is_of_plain_floats(name, kind, origin, tmp_path):
    model = adapted(name, KINDS[kind]) if origin == "ours" else loaded(name, tmp_path / "base", KINDS[kind])
    before, expected = snapshot(model), logits(model, name)
    save_merged(model, tmp_path / "out", into="dequantized")
    assert_same(snapshot(model), before)
    assert "quantization_config" not in config_of(tmp_path / "out")
    plain = type(tiny(name)).from_pretrained(tmp_path / "out").eval()
    assert type(plain.get_submodule(next(iter(stored_as(model))))) in (nn.Linear, tf.pytorch_utils.Conv1D)
    torch.testing.assert_close(logits(plain, name), expected, rtol=1e-4, atol=1e-5)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("origin", ["ours", "transformers"])
@pytest.mark.parametrize(
    ("name", "kind"), [("gpt2", "nf4"), ("bert", "int8"), ("t5", "nf4"), ("distilbert", "nf4"), *TORCHAO]
)
def test_a_requantized_folder_is_read_in_as_many_bits_code_by_code(name, kind, origin, tmp_path):
    if origin == "ours":
        model = adapted(name, KINDS[kind], train_also=HEADS.get(name, []))
    else:
        model = loaded(name, tmp_path / "base", KINDS[kind])
    before, expected = snapshot(model), logits(model, name)
    save_merged(model, tmp_path / "out", into="requantized")
    assert_same(snapshot(model), before)
    assert hasattr(model.config, "quantization_config") is (origin == "transformers")  # as it was
    written = "torchao" if kind == "int8_torchao" else "bitsandbytes"
    assert config_of(tmp_path / "out")["quantization_config"]["quant_method"] == written
    again = type(tiny(name)).from_pretrained(tmp_path / "out", device_map={"": "cpu"}).eval()
    assert stored_as(again) == stored_as(model)
    merge(model, into="requantized")
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(holds(ours[key], theirs[key]) for key in ours)
    recognise(again)
    assert torch.equal(logits(again, name), logits(model, name)) and not torch.equal(logits(again, name), expected)
    path = next(iter(stored_as(model)))
    layer_ops(model.get_submodule(path)).codes(model.get_submodule(path)).reshape(-1)[3] ^= 1
    with pytest.raises(ValueError, match=f"{path}.weight is not what it was before"):
        read_again(model, tmp_path / "out")


def test_a_layer_that_the_base_had_no_weight_for_is_written_as_a_plain_one(tmp_path):
    """transformers' own configuration would have it read as codes."""
    plain = tiny("bert")
    tf.BertForMaskedLM(plain.config).save_pretrained(tmp_path / "base")  # it has no pooler
    config = make_quantizer(NF4).loading_config([])
    model = type(plain).from_pretrained(tmp_path / "base", quantization_config=config).eval()
    LoRA(r=2, dropout=0.0, target_modules="attention", train_also=["pooler", "classifier"]).attach(model)
    perturb(model)
    own = model.config.quantization_config
    save_merged(model, tmp_path / "out", into="requantized")
    assert model.config.quantization_config is own
    again = type(plain).from_pretrained(tmp_path / "out", device_map={"": "cpu"}).eval()
    assert type(again.bert.pooler.dense) is nn.Linear
    merge(model, into="requantized")
    recognise(again)
    assert torch.equal(logits(again, "bert"), logits(model, "bert"))


@pytest.mark.parametrize("kind", ["fp4", "nf4 in bfloat16 storage"])
def test_what_transformers_cannot_make_it_reads(kind, tmp_path):
    """Of blocks of 128 it knows nothing, but the codes are in the folder with their state; of storage it does."""
    model = adapted("llama", KINDS[kind])
    save_merged(model, tmp_path / "out", into="requantized")
    merge(model, into="requantized")
    assert torch.equal(logits(read_again(model, tmp_path / "out"), "llama"), logits(model, "llama"))
    assert set(stored_as(read_again(model, tmp_path / "out")).values()) == set(stored_as(model).values())


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_was_quantised_in_place_is_read_back_without_an_adapter(name, kind, tmp_path):
    """`save_pretrained` writes it in a way that nothing reads; see docs/quantization.md."""
    model = tiny(name).eval()
    LoRA(r=2, quantize=KINDS[kind]).attach(model)
    lit_peft.detach(model)
    save_merged(model, tmp_path / "out")
    assert not hasattr(model.config, "quantization_config")  # which other models may have as theirs
    again = read_again(model, tmp_path / "out")
    assert stored_as(again) == stored_as(model) and torch.equal(logits(again, name), logits(model, name))


def test_of_several_models_that_are_merged_each_is_written(tmp_path):
    both = nn.ModuleDict({"one": tiny("bert"), "other": tiny("llama")}).eval()
    LoRA(r=2, target_modules="all-linear", quantize=NF4).attach(both)
    perturb(both)
    with pytest.raises(ValueError, match=r"merge\(module\), then save_merged\(module\.one, FOLDER\)\."):
        save_merged(both, tmp_path / "out", into="requantized")
    merge(both, into="requantized")
    for path, name in (("one", "bert"), ("other", "llama")):
        save_merged(both[path], tmp_path / path)
        assert torch.equal(logits(read_again(both[path], tmp_path / path), name), logits(both[path], name))


@pytest.mark.parametrize("kind", FEW)
def test_a_folder_that_is_read_in_few_bits_takes_adapters(kind, tmp_path):
    """A second one, on what the first one became."""
    save_merged(adapted("bert", KINDS[kind]), tmp_path / "out", into="requantized")
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "out", device_map={"": "cpu"}).eval()
    LoRA(r=2, dropout=0.0, target_modules="attention", quantize=KINDS[kind]).attach(model)
    base = logits(model, "bert")
    perturb(model)
    logits(model, "bert").sum().backward()
    assert not torch.equal(logits(model, "bert"), base)
    for into in ("dequantized", "requantized"):
        save_merged(model, tmp_path / into, into=into)
        merge(model, into=into)
        assert torch.equal(logits(read_again(model, tmp_path / into), "bert"), logits(model, "bert"))
        unmerge(model)


def test_a_head_whose_name_another_layer_ends_with_is_left_alone_by_its_path(tmp_path):
    """transformers goes by endings: `classifier` is one of `pre_classifier`, which is quantised here."""
    model: Any = tiny("distilbert")
    for path, layer in model.named_modules():
        if type(layer) is nn.Linear and path != "classifier":
            make_quantizer(NF4).quantize(layer, torch.device("cpu"))
    LoRA(r=2, dropout=0.0).attach(model)
    perturb(model)
    save_merged(model, tmp_path / "out", into="requantized")
    merge(model, into="requantized")
    assert config_of(tmp_path / "out")["quantization_config"]["llm_int8_skip_modules"] == [r"^classifier(\.weight)?$"]
    assert torch.equal(logits(read_again(model, tmp_path / "out"), "distilbert"), logits(model, "distilbert"))


def test_layers_that_are_quantised_in_several_ways_are_told(tmp_path):
    model = tiny("bert")
    for i, kind in enumerate(("nf4", "int8")):
        layer = model.bert.encoder.layer[i].attention.self.query
        make_quantizer(KINDS[kind]).quantize(layer, torch.device("cpu"))
    LoRA(r=2, dropout=0.0, target_modules="query").attach(model)
    with pytest.raises(
        ValueError, match=r"as it is quantised, int8 by rows and nf4 in blocks of 64, double: .* into 'dequantized'"
    ):
        save_merged(model, tmp_path / "out", into="requantized")
    assert not list(tmp_path.iterdir())
    save_merged(model, tmp_path / "out", into="dequantized")


def test_what_it_was_merged_into_is_what_is_written(tmp_path):
    model = adapted("bert")
    with pytest.raises(ValueError, match="say into what its adapter is to be folded"):
        save_merged(model, tmp_path / "out")
    merge(model, into="requantized")
    with pytest.raises(ValueError, match=r"into is 'dequantized', but .* is as it was merged"):
        save_merged(model, tmp_path / "out", into="dequantized")
    save_merged(model, tmp_path / "out")
    assert "quantization_config" in config_of(tmp_path / "out")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_hf_peft_opens_the_adapter_on_the_quantised_base(kind, tmp_path):
    """The folder of an adapter is the same whatever its base is stored as."""
    model = loaded("bert", tmp_path / "base", KINDS[kind])
    lit_peft.save(model, tmp_path / "adapter")
    config = model.config.quantization_config
    base = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base", quantization_config=config)
    recognise(base)  # their kernels for evaluation on some CPUs want wider layers
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(theirs, "bert"), logits(model, "bert"), rtol=1e-4, atol=1e-5)
