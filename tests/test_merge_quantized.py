"""Adapters of a base in 4 or 8 bit folded into its weights: dequantised, or quantised again."""

import copy
import io
from importlib.util import find_spec
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as tf
from models import logits, tiny
from torch import nn
from toys import dense_by_hand

import lit_peft
from lit_peft import DoRA, HiRA, LoRA, SparseLoRA, VeRA, merge, unmerge
from lit_peft.core.layers import Linear4bitOps, layer_ops
from lit_peft.core.quantize import make_quantizer, quantize_base, stored_as
from lit_peft.core.quantized import Kept
from lit_peft.core.registry import registry
from lit_peft.core.swap import MERGED_KEY
from lit_peft.methods import IA3, AdaLoRA
from lit_peft.testing.conformance import assert_same, perturb, snapshot

NF4 = {"mode": "nf4", "compute_dtype": "float32"}
KINDS: dict[str, Any] = {
    "nf4": NF4,
    "fp4": {"mode": "fp4", "compute_dtype": "float32", "double_quant": False, "block_size": 128},
    "nf4 in bfloat16 storage": NF4 | {"storage_dtype": "bfloat16"},
    "int8": "int8",
    **({"int8_torchao": "int8_torchao"} if find_spec("torchao") else {}),
}
FEW = [kind for kind in KINDS if kind in ("nf4", "int8", "int8_torchao")]
METHODS = {
    "LoRA": LoRA(r=2, dropout=0.0),
    "DoRA": DoRA(r=2, dropout=0.0),
    "HiRA": HiRA(r=2, dropout=0.0),
    "IA3": IA3(),
    "VeRA": VeRA(r=4, dropout=0.0),
    "AdaLoRA": AdaLoRA(init_r=4, target_r=2, dropout=0.0),
    "SparseLoRA": SparseLoRA(r=4, dropout=0.0),
}


def adapted(name: str, quantize: Any = NF4, **arguments: Any) -> nn.Module:
    """A tiny model on a quantised base, with a LoRA whose tensors are not where they start."""
    model = tiny(name)
    LoRA(
        **{"r": 2, "alpha": 3, "dropout": 0.0, "target_modules": "attention", "quantize": quantize} | arguments
    ).attach(model)
    perturb(model)
    return model.eval()


def dequantized(layer: Any) -> torch.Tensor:
    """A layer's weight, [out, in], by its definition or by the own function of bitsandbytes or torchao."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return dense_by_hand(layer.weight.data, layer.weight.quant_state)
    if isinstance(layer, bnb.nn.Linear8bitLt):
        return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)
    return layer.weight.dequantize()


def decoder(kind: str) -> str:
    """GPT-2, whose layers are stored the other way round, or Llama for torchao, which leaves such layers alone."""
    return "llama" if kind == "int8_torchao" else "gpt2"


# ----------------------------------------------------------------------------------------------- dequantised


@pytest.mark.parametrize("kind", KINDS)
def test_dequantized_is_what_the_package_dequantises_plus_the_change_and_comes_back(kind):
    name = decoder(kind)
    model = adapted(name, KINDS[kind])
    before, expected = snapshot(model), logits(model, name)
    weights: dict[str, torch.Tensor] = {}
    for path in stored_as(model):
        layer: Any = model.get_submodule(path)
        weights[path] = dequantized(layer).float()
        if hasattr(layer, "peft"):
            delta = layer.peft["default"]
            weights[path] = weights[path] + 1.5 * delta.lora_B @ delta.lora_A
    merge(model, into="dequantized")
    plain = tiny(name)
    assert list(model.state_dict()) == list(plain.state_dict()) and not stored_as(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()] and repr(model) == repr(plain)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    for path, weight in weights.items():
        layer = model.get_submodule(path)
        torch.testing.assert_close(layer_ops(layer).matrix(layer), weight, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits(model, name), expected, rtol=1e-4, atol=1e-5)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain, name), logits(model, name))
    unmerge(model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, name), expected)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == registry(model).trainable_names()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FEW)
def test_every_equation_is_composed_with_the_dequantised_weight(kind, method):
    model = tiny("bert")
    quantize_base(model, make_quantizer(KINDS[kind]))
    copy.deepcopy(METHODS[method]).attach(model)
    perturb(model)
    expected = logits(model, "bert")
    merge(model, into="dequantized")
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert torch.equal(logits(model, "bert"), expected)


def test_dense_layers_get_the_dtype_of_what_is_not_quantised_and_are_rounded_once():
    model = tiny("llama").to(torch.bfloat16)
    LoRA(r=2, alpha=3, dropout=0.0, target_modules="query", quantize="int8").attach(model)
    perturb(model)
    layer: Any = model.model.layers[0].self_attn.q_proj
    delta = layer.peft["default"]
    exact = dequantized(layer).double() + 1.5 * delta.lora_B.double() @ delta.lora_A.double()
    merge(model, into="dequantized")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(layer.weight, exact.to(torch.bfloat16))
    alone = nn.Sequential(nn.Linear(64, 64, bias=False).to(torch.bfloat16))
    LoRA(r=2, target_modules="0", quantize="nf4").attach(alone)
    merge(alone, into="dequantized")
    assert alone[0].weight.dtype == torch.bfloat16  # what it was quantised from: there is nothing else to go by


@pytest.mark.parametrize("kind", FEW)
def test_a_bias_that_trains_in_float32_beside_bfloat16_is_kept_as_it_is(kind):
    model = tiny("bert").to(torch.bfloat16)
    quantize = NF4 | {"storage_dtype": "float32", "compute_dtype": "bfloat16"} if kind == "nf4" else kind
    LoRA(r=2, dropout=0.0, target_modules="query", bias="lora_only", quantize=quantize).attach(model)
    perturb(model)
    layer: Any = model.bert.encoder.layer[0].attention.self.query
    before, expected, bias = snapshot(model), logits(model, "bert"), layer.bias.detach().clone()
    merge(model, into="dequantized")
    assert (layer.weight.dtype, layer.bias.dtype) == (torch.bfloat16, torch.float32) and torch.equal(layer.bias, bias)
    torch.testing.assert_close(logits(model, "bert"), expected, rtol=2e-2, atol=2e-2)
    unmerge(model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, "bert"), expected)


def test_a_model_of_transformers_can_be_cast_once_it_is_dequantised(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path)
    config = make_quantizer(NF4).loading_config(["lm_head"])
    model = tf.GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=config)
    LoRA(r=2, dropout=0.0).attach(model)
    with pytest.raises(ValueError, match="cast"):
        model.to(torch.float64)
    merge(model, into="dequantized")
    assert type(model.transformer.h[0].attn.c_attn) is tf.pytorch_utils.Conv1D
    assert repr(model) == repr(tiny("gpt2"))
    assert not hasattr(model, "is_quantized") and not hasattr(model.config, "quantization_config")
    assert copy.deepcopy(model).to(torch.float64).dtype == torch.float64
    unmerge(model)
    assert model.is_quantized and model.config.quantization_config is config and model.hf_quantizer is not None


# ----------------------------------------------------------------------------------------------- requantised


@pytest.mark.parametrize("kind", KINDS)
def test_requantized_is_what_the_package_makes_of_the_sum_and_comes_back(kind):
    model = adapted("llama", KINDS[kind])
    before, expected = snapshot(model), logits(model, "llama")
    path = "model.layers.0.self_attn.q_proj"
    layer: Any = model.get_submodule(path)
    delta = layer.peft["default"]
    V = delta.weight(dequantized(layer).float())
    if kind == "int8_torchao":
        plain = nn.Linear(*reversed(V.shape))
        plain.weight.data.copy_(V.detach())
        make_quantizer(kind).quantize(plain, torch.device("cpu"))
        again = plain.weight.dequantize()
    elif kind == "int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(V.detach().half())
        again = bnb.functional.int8_vectorwise_dequant(codes, scales)
    else:
        state = layer.weight.quant_state
        options = {"blocksize": state.blocksize, "compress_statistics": state.nested, "quant_type": state.quant_type}
        codes, state = bnb.functional.quantize_4bit(V.detach(), quant_storage=layer.weight.dtype, **options)
        again = dense_by_hand(codes, state)
    stored = stored_as(model)
    merge(model, into="requantized")
    assert stored_as(model) == stored  # as many bits, at the same layers
    assert torch.equal(dequantized(layer), again)
    assert not torch.equal(again.float(), V)
    assert list(model.state_dict()) == [key for key in before if ".peft." not in key]
    assert logits(model, "llama").isfinite().all() and not torch.equal(logits(model, "llama"), expected)
    unmerge(model)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, "llama"), expected)


def test_what_is_kept_for_the_way_back_is_codes_and_constants():
    for into in ("dequantized", "requantized"):
        model = adapted("llama")
        held = sum(p.numel() for path in stored_as(model) for p in [model.get_submodule(path).weight])
        merge(model, into=into)
        kept: dict[str, Any] = {path: what for path, (_, what) in model.__dict__[MERGED_KEY].layers.items()}
        assert all(isinstance(what, Kept) and what.codes.dtype == torch.uint8 for what in kept.values())
        if into == "dequantized":
            assert sum(what.codes.numel() for what in kept.values()) == held
            assert all(what.weight.numel() == 0 for what in kept.values())
        # The layer's own constants lie on the device, a byte for 64 weights: their copy on the host is enough.
        assert not any("quant_state" in what.attributes for what in kept.values())


# ----------------------------------------------------------------------------------- merged, and back in any way


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
@pytest.mark.parametrize("kind", FEW)
def test_a_merged_model_copies_pickles_moves_and_comes_back(kind, into):
    name = decoder(kind)
    model = adapted(name, KINDS[kind])
    expected = logits(model, name)
    merge(model, into=into)
    answer, file = logits(model, name), io.BytesIO()
    torch.save(model, file)
    twins = [copy.deepcopy(model), torch.load(io.BytesIO(file.getvalue()), weights_only=False)]
    for twin in twins:
        assert torch.equal(logits(twin, name), answer)
        nn.Module.to(twin, "cpu").requires_grad_(False)
        unmerge(twin)
        assert torch.equal(logits(twin, name), expected)
    with pytest.raises(ValueError, match="is merged"):
        lit_peft.detach(model)


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
def test_a_merge_that_breaks_off_leaves_everything_as_it_was(into, monkeypatch):
    model = adapted("bert")
    before, expected = snapshot(model), logits(model, "bert")
    name = "make_dense" if into == "dequantized" else "store"
    plain, calls = getattr(Linear4bitOps, name), []

    def full(self, layer, *tensors):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        plain(self, layer, *tensors)

    monkeypatch.setattr(Linear4bitOps, name, full)
    with pytest.raises(MemoryError):
        merge(model, into=into)
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, "bert"), expected)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


def test_torchs_fast_path_never_reads_codes_for_a_weight():
    """It takes `linear1.weight` itself, in evaluation: merged, detached, and once all is back."""
    module, x = encoder(), torch.randn(2, 3, 16)
    LoRA(r=2, dropout=0.0, target_modules=["linear1"], quantize="int8").attach(module)
    perturb(module)
    with torch.no_grad():
        expected = module(x)
        merge(module, into="requantized")
        assert (module(x) - expected).abs().max() < 0.5
        unmerge(module)
        assert torch.equal(module(x), expected)
        merge(module, into="dequantized")
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        unmerge(module)
        lit_peft.detach(module)
        weights = {path: dequantized(module.get_submodule(path)) for path in stored_as(module)}
        plain = encoder()
        for path, weight in weights.items():
            plain.get_submodule(path).weight.copy_(weight)
        torch.testing.assert_close(module(x), plain(x), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------- what is refused


def test_a_quantised_base_is_not_merged_into_anything_unsaid():
    model = adapted("bert")
    before = snapshot(model)
    with pytest.raises(
        ValueError,
        match=r"quantised, nf4 in blocks of 64, double: say .* dequantized: .*training saw.*; requantized: .*rounded"
        r"; original: .*did not see",
    ):
        merge(model)
    with pytest.raises(
        ValueError, match=r"original weights are not in it.*quantize=None\), and merge that one; of a run"
    ):
        merge(model, into="original")
    with pytest.raises(ValueError, match="into is 'dequantised', expected one of dequantized, requantized, original"):
        merge(model, into="dequantised")  # type: ignore[arg-type]
    assert_same(snapshot(model), before)


def test_another_base_has_nothing_to_choose():
    model = tiny("bert")
    LoRA(r=2).attach(model)
    for into in ("dequantized", "requantized"):
        with pytest.raises(ValueError, match=f"into is '{into}', but the base is not quantised: leave it out"):
            merge(model, into=into)
    merge(model, into="original")  # which it is
    unmerge(model)
    merge(model)


def test_a_layer_without_a_bias_cannot_take_one():
    model = adapted("bert", bias="all")
    merge(model, into="dequantized")  # biases that are there
    module = nn.Sequential(nn.Linear(64, 64, bias=False))
    LoRA(r=2, target_modules="0", quantize=NF4).attach(module)
    module[0].peft["default"].bias = lambda b: torch.ones(64)
    before = snapshot(module)
    with pytest.raises(ValueError, match="0 cannot be merged: it has no bias, and its adapter adds one"):
        merge(module, into="dequantized")
    assert_same(snapshot(module), before)
