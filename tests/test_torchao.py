"""torchao's weights in 8 bit, made here and found: tensors that dequantise themselves inside plain linear layers."""

import copy

import pytest
import torch
import transformers as tf
from models import logits, tiny
from test_quantized_layers import full_size
from torch import nn
from toys import Module, fit, lora, net_lora, saved

torchao = pytest.importorskip("torchao")

from lit_peft import DoRA, HiRA, LoRA, merge  # noqa: E402
from lit_peft.core import layers  # noqa: E402
from lit_peft.core.checkpoint import CheckpointMismatch  # noqa: E402
from lit_peft.core.layers import layer_ops  # noqa: E402
from lit_peft.core.quantize import quantize_base, stored_as  # noqa: E402
from lit_peft.core.registry import registry  # noqa: E402
from lit_peft.methods import FullFineTuning  # noqa: E402
from lit_peft.quantizers.torchao import Int8WeightOnly  # noqa: E402
from lit_peft.saving.merged import save_merged  # noqa: E402
from lit_peft.testing.states import assert_same, by_equation, perturb, snapshot  # noqa: E402
from lit_peft.testing.subjects import IN, OUT, Holder, layer_input  # noqa: E402

METHODS = [LoRA(r=4, dropout=0.0), DoRA(r=4, dropout=0.0), HiRA(r=4)]
STORED = "torchao Int8Tensor by rows"


def test_that_it_takes_no_conv1d_is_told():
    with pytest.raises(
        ValueError, match=r"Left alone: 8 of 9, such as \S+ \(of class Conv1D, which this mode does not"
    ):
        LoRA(r=4, quantize="int8_torchao").attach(tiny("gpt2"))


def holder(dtype=torch.float32) -> Holder:
    torch.manual_seed(0)
    module = Holder(nn.Linear(IN, OUT).to(dtype))
    Int8WeightOnly().quantize(module.layer, torch.device("cpu"))
    return module


def test_it_is_read_as_a_matrix():
    torch.manual_seed(0)
    dense, module = nn.Linear(IN, OUT), holder()
    ops = layer_ops(module.layer)
    assert type(ops) is layers.LinearOps and ops.quantization(module.layer) == STORED == Int8WeightOnly().stored_as
    assert ops.codes(module.layer).dtype == torch.int8 and ops.size(module.layer) == (OUT, IN)
    stored = Int8WeightOnly().size(OUT, IN)
    assert sum(t.nbytes for t in ops.stored(module.layer)) == sum(stored)
    # Half of a step of the largest of each row.
    bound = dense.weight.abs().amax(1, keepdim=True) / 127
    assert ((ops.matrix(module.layer) - dense.weight).abs() <= bound).all()
    assert ops.quantization(dense) is None and ops.matrix(dense) is dense.weight


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_forward_and_gradients_are_those_of_the_equation_and_nothing_full_size_is_kept(method):
    module = holder()
    type(method)(**method.arguments() | {"target_modules": "layer"}).attach(module)
    perturb(module)
    found = []
    for compute in (module, lambda x: by_equation(module, x)):
        module.zero_grad()
        x = layer_input("linear").requires_grad_()
        y = compute(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5 * slow.abs().max().item())
    assert full_size(module, layer_input("linear").requires_grad_()) == []
    with torch.no_grad():
        torch.testing.assert_close(module(layer_input("linear")), found[0][0], rtol=1e-4, atol=1e-4)


def test_torchao_alone_would_keep_the_dense_weight():
    plain = nn.Linear(IN, OUT)
    plain.weight = holder().layer.weight
    assert full_size(plain, layer_input("linear").requires_grad_())


def test_it_follows_the_dtype_of_its_inputs():
    module, exact = holder(), holder()(layer_input("linear"))
    for given, run in ((torch.bfloat16, holder(torch.bfloat16)), (torch.bfloat16, copy.deepcopy(module).bfloat16())):
        y = run(layer_input("linear").to(given))
        assert y.dtype == given
        torch.testing.assert_close(y.float(), exact, rtol=3e-2, atol=3e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(layer_input("linear")).dtype == torch.bfloat16


def test_it_quantises_anew():
    module, W = holder(), torch.randn(OUT, IN)
    ops = layer_ops(module.layer)
    ops.store(module.layer, W, torch.ones(OUT))
    expected = nn.Linear(IN, OUT)
    expected.weight.data.copy_(W)
    Int8WeightOnly().quantize(expected, torch.device("cpu"))
    assert torch.equal(ops.matrix(module.layer), ops.matrix(expected))
    assert stored_as(module) == {"layer": STORED} and (module.layer.bias == 1).all()


def test_a_base_is_quantised_but_for_its_head():
    module, plain = tiny("distilbert"), tiny("distilbert")
    paths = quantize_base(module, Int8WeightOnly())
    assert len(paths) == 12 and not any("classifier" in path for path in paths)
    lora(train_also=["*classifier"]).attach(module)
    perturb(module)
    logits(module, "distilbert").square().sum().backward()
    assert all(p.grad.any() for p in module.parameters() if p.requires_grad)
    assert not stored_as(plain)


@pytest.mark.parametrize("comes", ["transformers", "torchao"])
def test_a_model_that_comes_so_is_recognised(tmp_path, comes):
    config = torchao.quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    plain = tiny("bert")
    plain.save_pretrained(tmp_path)
    if comes == "transformers":
        model = type(plain).from_pretrained(
            tmp_path,
            dtype=torch.float32,
            quantization_config=tf.TorchAoConfig(config, modules_to_not_convert=["classifier", "bert.pooler.dense"]),
        )
    else:
        model = tiny("bert")
        torchao.quantization.quantize_(model.bert.encoder, config)
    mine = tiny("bert")
    quantize_base(mine, Int8WeightOnly(skip_modules=["pooler"]))
    lora().attach(model)
    assert stored_as(model) == stored_as(mine) and len(stored_as(model)) == 12
    torch.testing.assert_close(logits(model.eval(), "bert"), logits(mine, "bert"))
    with pytest.raises(ValueError, match=rf"is quantised already, {STORED}, not int8 by rows"):
        lora(name="other", quantize="int8").attach(model)


def test_it_trains_saves_resumes_and_is_refused_on_another_base(tmp_path):
    def base(quantised=True):
        module = Module()
        if quantised:
            quantize_base(module, Int8WeightOnly())
        return module

    whole, again = base(), base()
    fit(whole, net_lora(), max_epochs=2)
    path = saved(tmp_path, base(), net_lora())
    fit(again, net_lora(), ckpt_path=path, max_epochs=2)
    x = torch.randn(3, 4)
    assert torch.equal(again(x), whole(x))
    content = torch.load(path, weights_only=True)
    assert len(content["state_dict"]) == 4
    with pytest.raises(CheckpointMismatch, match=r"is not quantised here, and quantised \(torchao"):
        fit(base(False), net_lora(), ckpt_path=path, max_epochs=2)


def test_what_is_folded_is_not_rounded_to_the_dtype_of_the_base():
    layer = holder(torch.bfloat16).layer
    exact = layer_ops(layer).float_matrix(layer)
    assert exact.dtype == torch.float32 and layer_ops(layer).matrix(layer).dtype == torch.bfloat16
    scale, codes = layer.weight.scale.float(), layer.weight.qdata.float()
    assert torch.equal(exact, codes * scale) and not torch.equal(exact, exact.bfloat16().float())


def test_a_weight_that_tells_of_activations_too_is_not_made_anew(tmp_path):
    """Its codes are read and dequantised as any are; a dense weight does not tell how activations are to be rounded."""
    model = tiny("bert")
    torchao.quantization.quantize_(model.bert.encoder, torchao.quantization.Int8DynamicActivationInt8WeightConfig())
    lora().attach(model)
    perturb(model)
    before, expected = snapshot(model), logits(model, "bert")
    with pytest.raises(ValueError, match=f"stored as {STORED} with act_quant_kwargs cannot be quantised anew"):
        merge(model, into="requantized")
    assert_same(snapshot(model), before)
    assert torch.equal(logits(model, "bert"), expected)
    save_merged(model, tmp_path / "out", into="dequantized")
    plain = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(plain, "bert"), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [lora(train_also=["*output.dense"]), FullFineTuning()])
def test_what_is_stored_so_cannot_be_trained(method):
    model = tiny("bert")
    quantize_base(model, Int8WeightOnly())
    with pytest.raises(ValueError, match=r"output\.dense\.weight is quantised and cannot be trained"):
        method.attach(model)
    assert registry(model) is None
