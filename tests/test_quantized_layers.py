"""What a quantised layer does: what it keeps for the backward pass, its dtypes, its state, its biases."""

import copy
import pickle
import weakref
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn.modules import has_avx512bf16
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from toys import dense_by_hand, lora

from lit_peft import IA3, AdaLoRA, BitFit, DoRA, HiRA, LoRA, SparseLoRA, VeRA
from lit_peft.core import quantized
from lit_peft.core.addition import Call, Delta
from lit_peft.core.dtypes import dequantises_itself
from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import make_quantizer
from lit_peft.methods.dora import DoRADelta
from lit_peft.methods.lora import LoRADelta
from lit_peft.quantizers.bnb import NF4
from lit_peft.testing.states import assert_same, by_equation, perturb, same_bits, snapshot
from lit_peft.testing.subjects import IN, LAYERS, OUT, Holder, holder, layer_input

FULL = OUT * IN

# ------------------------------------------------------------------- between the forward and the backward pass

METHODS = {
    "LoRA": LoRA(r=2, dropout=0.0),
    "LoRA with dropout": LoRA(r=2, dropout=0.1),
    "DoRA": DoRA(r=2, dropout=0.0),
    "HiRA": HiRA(r=2),
    "HiRA with dropout": HiRA(r=2, dropout=0.1),
    "IA3": IA3(),
    "IA3 at inputs": IA3(feedforward_modules="layer"),
    "VeRA": VeRA(r=2),
    "AdaLoRA": AdaLoRA(init_r=2, target_r=1),
    "SparseLoRA": SparseLoRA("structured", r=2, dropout=0.0),
}

FUSED = ["LoRA", "LoRA with dropout", "DoRA", "SparseLoRA"]


def full_size(module, x) -> list[str]:
    """What a forward pass keeps that is as large as the weight and in floating point."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    for node in _nodes(y.grad_fn):  # what functions hold on to past the hooks
        held = [value for own in vars(node).values() for value in (own if isinstance(own, tuple) else (own,))]
        kept += [value for value in held if isinstance(value, Tensor)]
    dense = [t for t in kept if t.is_floating_point() and not dequantises_itself(t)]
    return [f"{list(t.shape)} {t.dtype}" for t in dense if t.numel() >= FULL]


def _nodes(node):
    """All nodes of a graph that are written in Python."""
    own = [node] if hasattr(node, "__dict__") else []
    return own + [found for child, _ in node.next_functions if child is not None for found in _nodes(child)]


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    ("name", "fused"),
    [(name, fused) for name in METHODS for fused in (False, True) if not fused or "LoRA" in name or "DoRA" in name],
)
def test_nothing_of_the_weights_size_is_kept(monkeypatch, name, fused, stacked, kind):
    for cls in (LoRADelta, DoRADelta):
        monkeypatch.setattr(cls, "fused_from", 1 if fused else FULL + 1)
    module = holder(kind)
    if stacked:
        lora(target_modules="layer", name="below").attach(module)
    method = METHODS[name]
    type(method)(**method.arguments() | {"target_modules": "layer"}).attach(module)
    perturb(module)
    module.train()
    assert full_size(module, layer_input(kind).requires_grad_()) == []


def test_the_dense_equation_would_be_found():
    module = holder("nf4")
    lora(target_modules="layer").attach(module)
    call = Call(module.layer, (), module.layer.forward)
    for keeps in (lambda x: Delta.forward(module.layer.peft["default"], module.layer, call, x), _KeepsOnItsNode.apply):
        assert full_size(keeps, layer_input("nf4").requires_grad_())


class _KeepsOnItsNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.weight = torch.zeros(OUT, IN)
        return x.clone()


def test_the_gradient_of_the_input_may_be_had_slice_by_slice(monkeypatch):
    """As it is of a large layer on a GPU: the same numbers, added to what is there or not."""
    layer = nn.Linear(6 * 64, 32)
    NF4(compute_dtype="float32").quantize(layer, torch.device("cpu"))
    ops, dy = layer_ops(layer), torch.randn(5, 32)
    whole, onto = ops.product_t(layer, dy), torch.randn(5, 6 * 64)
    monkeypatch.setattr(quantized, "SLICED_FROM", 1)
    assert quantized.slices_4bit(layer) == [slice(0, 6 * 64)]  # no kernel for slices here
    with monkeypatch.context() as on_gpu:
        on_gpu.setattr(quantized.kernels, "in_triton", lambda tensor: SimpleNamespace())
        slices = quantized.slices_4bit(layer)
    assert slices == [slice(0, 192), slice(192, 384)]
    monkeypatch.setattr(quantized, "slices_4bit", lambda layer: slices)
    torch.testing.assert_close(ops.product_t(layer, dy), whole)
    torch.testing.assert_close(ops.product_t(layer, dy, onto.clone()), whole + onto)


def test_the_dense_weight_is_gone_before_the_gradient_of_a_dropped_input(monkeypatch):
    """With dropout a node returns two gradients as large as its input; the weight lies beside one of them alone."""
    monkeypatch.setattr(LoRADelta, "fused_from", 0)
    module = holder("nf4")
    LoRA(r=4, dropout=0.3, target_modules="layer").attach(module)
    y = module(layer_input("nf4").requires_grad_())
    weights, beside = [], []
    dense, mm = quantized.dense_4bit, torch.mm

    def spy_dense(*args):
        weights.append(weakref.ref(W := dense(*args)))
        return W

    def spy_mm(a, b, **kwargs):
        if (a.shape[0], b.shape[1]) == (y.numel() // OUT, IN) and b.shape[0] == 4:
            beside.append([ref() is not None for ref in weights])
        return mm(a, b, **kwargs)

    monkeypatch.setattr(quantized, "dense_4bit", spy_dense)
    monkeypatch.setattr(torch, "mm", spy_mm)
    y.sum().backward()
    assert beside == [[False]]  # it was there, and is no longer


@pytest.mark.parametrize("make", [bnb.nn.Linear4bit, partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)])
def test_a_layer_that_is_not_quantised_yet_says_so(make, monkeypatch):
    monkeypatch.setattr(LoRADelta, "fused_from", 0)
    module = Holder(make(IN, OUT))
    LoRA(r=4, target_modules="layer").attach(module)
    with pytest.raises(RuntimeError, match=r"is not quantised yet: bitsandbytes does that as the layer is moved"):
        module(layer_input("linear"))


@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_hira_above_another_adapter_has_the_gradients_of_the_equation(kind):
    module = holder(kind)
    lora(target_modules="layer", name="below").attach(module)
    HiRA(r=2, target_modules="layer").attach(module)
    perturb(module)
    found = []
    for compute in (module, lambda x: by_equation(module, x)):
        module.zero_grad()
        x = layer_input(kind).requires_grad_()
        compute(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    assert len(found[0]) == 5
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5 * slow.abs().max().item())


QUANTISED = [kind for kind in LAYERS if kind == "nf4" or kind.startswith("int8")]


@pytest.mark.parametrize("kind", QUANTISED)
def test_no_rows_give_no_rows(kind):
    """As an expert gets them that no token was sent to."""
    module = holder(kind)
    lora(target_modules="layer").attach(module)
    y = module(torch.zeros(0, 5, IN))
    assert y.shape == (0, 5, OUT)
    y.sum().backward()
    assert not module.layer.peft["default"].lora_B.grad.any()


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_penalty_on_the_gradient_of_the_input_trains(kind):
    module, x = holder(kind), layer_input(kind).requires_grad_()
    lora(target_modules="layer").attach(module)
    perturb(module)
    found = []
    for compute in (module, lambda x: by_equation(module, x)):
        module.zero_grad()
        (dx,) = torch.autograd.grad(torch.tanh(compute(x)).sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append([p.grad for p in module.parameters() if p.requires_grad])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5 * slow.abs().max().item())


# ------------------------------------------------------------------------------------------------------ biases


def dense(layer) -> nn.Linear:
    """A dense layer of the weight that a quantised one stands for."""
    twin = nn.Linear(IN, OUT)
    with torch.no_grad():
        twin.weight.copy_(layer_ops(layer).matrix(layer))
        twin.bias.copy_(layer.bias)
    return twin


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "method", [BitFit(), LoRA(r=2, dropout=0.0, bias="all", target_modules="layer")], ids=["BitFit", "LoRA"]
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trained_biases_stay_float32_and_get_the_gradients_of_a_dense_layer(kind, method, dtype):
    """bitsandbytes casts a bias in place to the dtype of the activations: the optimizer's is then another one."""
    modules = [holder(kind), Holder(dense(holder(kind).layer))]
    gradients = []
    for module in modules:
        type(method)(**method.arguments()).attach(module)
        perturb(module)
        bias = module.layer.bias
        x = layer_input(kind).requires_grad_()
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            y = module(x)
        assert y.dtype == (dtype or torch.float32)
        y.float().square().sum().backward()
        assert module.layer.bias is bias and bias.dtype == torch.float32 and bias.requires_grad
        gradients.append({name: p.grad for name, p in module.named_parameters() if p.requires_grad} | {"x": x.grad})
    assert "layer.bias" in gradients[0]
    # Under autocast the outputs are rounded to 8 bits of mantissa, or 11, before and after the bias is added.
    rtol = {None: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, value in gradients[0].items():
        assert value.dtype == torch.float32
        scale = gradients[1][name].abs().max().item()
        torch.testing.assert_close(value, gradients[1][name], rtol=rtol, atol=rtol * scale, msg=name)


# ------------------------------------------------------------------------------------------------------ dtypes

STORAGES = ["uint8", "bfloat16", "float16", "float32"]


def nf4(**options) -> Holder:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT)
    make_quantizer({"mode": "nf4", **options}).quantize(layer, torch.device("cpu"))
    return Holder(layer)


@pytest.mark.parametrize("change", ["bfloat16", "half", "double", "to a device and a dtype"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_cast_does_not_reach_the_codes(storage, change):
    module = nf4(storage_dtype=storage, compute_dtype="float32")
    lora(target_modules="layer").attach(module)
    before, weight = snapshot(module), layer_ops(module.layer).matrix(module.layer)
    expected = module(layer_input("nf4"))
    if change == "to a device and a dtype":
        module.to("cpu", torch.bfloat16)
    else:
        getattr(module, change)()
    after = snapshot(module)
    for key, value in before.items():
        if key.startswith("layer.weight"):
            assert same_bits(after[key], value), key
    assert module.layer.bias.dtype != torch.float32
    assert torch.equal(layer_ops(module.layer).matrix(module.layer), weight)
    module.float()
    torch.testing.assert_close(module(layer_input("nf4")), expected, rtol=1e-2, atol=1e-2)  # of rounded biases


@pytest.mark.parametrize("storage", STORAGES)
def test_the_storage_changes_neither_codes_nor_outputs(storage):
    module, plain = nf4(storage_dtype=storage), nf4()
    assert module.layer.weight.dtype == getattr(torch, storage)
    assert torch.equal(layer_ops(module.layer).codes(module.layer).flatten(), plain.layer.weight.flatten())
    assert torch.equal(module(layer_input("nf4")), plain(layer_input("nf4")))


@pytest.mark.parametrize(("width", "block"), [(48, 32), (96, 64), (16, 128), (192, 128), (33, 64), (64, 4096)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_blocks_that_rows_do_not_fill_are_read_with_their_own_scales(width, block, double_quant):
    """bitsandbytes 0.50.2 reads them with others', on CPUs with AVX512."""
    torch.manual_seed(0)
    layer, x = nn.Linear(width, 24), torch.randn(3, width, requires_grad=True)
    W = layer.weight.detach().clone()
    options = {"mode": "nf4", "double_quant": double_quant, "block_size": block, "compute_dtype": "float32"}
    make_quantizer(options).quantize(layer, torch.device("cpu"))
    found = layer_ops(layer).matrix(layer)
    largest = torch.cat([part.abs().max().expand(len(part)) for part in W.flatten().split(block)]).view_as(W)
    assert ((found - W).abs() <= 0.16 * largest).all()  # half of the widest gap between values, and the scale's error
    assert torch.equal(found, dense_by_hand(layer.weight, layer.weight.quant_state))
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, found, layer.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, found.sum(0).expand_as(x))


@pytest.mark.parametrize("compute", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_outputs_have_the_dtype_of_the_inputs_whatever_it_computes_in(compute, given):
    """Also on the second call: bitsandbytes would keep the dtype of the first."""
    module = nf4(compute_dtype=compute)
    exact = dense(module.layer)(layer_input("nf4"))
    for dtype in (given, torch.float32):
        found = module(layer_input("nf4").to(dtype))
        assert found.dtype == dtype
        rough = dtype == torch.bfloat16 or compute == "bfloat16"
        close = 2e-2 if rough else 2e-3 if compute == "float16" else 1e-5
        torch.testing.assert_close(found.float(), exact, rtol=close, atol=close)


# --------------------------------------------------------------------------------------- evaluation and copies


@pytest.fixture
def packing_cpu(monkeypatch):
    """A CPU for which bitsandbytes packs weights anew in evaluation, whether or not this is one."""

    def pack(*args):
        raise AssertionError("bitsandbytes packs the codes for evaluation: training from them would have no gradients")

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", pack)


def test_bitsandbytes_would_pack_here(packing_cpu):
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4").to("cpu").eval()
    with pytest.raises(AssertionError, match="packs the codes"), torch.no_grad():
        layer(layer_input("nf4"))


@pytest.mark.parametrize("found", ["made here", "found"])
def test_an_evaluation_leaves_the_codes_as_they_are(packing_cpu, found):
    module = nf4() if found == "made here" else Holder(bnb.nn.Linear4bit(IN, OUT, quant_type="nf4").to("cpu"))
    lora(target_modules="layer").attach(module)
    perturb(module)
    before = snapshot(module)
    with torch.no_grad():
        module.eval()(layer_input("nf4"))
    module.train()(layer_input("nf4")).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)
    assert_same(snapshot(module), before)


@pytest.mark.skipif(not has_avx512bf16(), reason="the CPU has no bfloat16 instructions")
def test_codes_that_bitsandbytes_has_packed_are_unpacked():
    plain = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.bfloat16).to("cpu")
    expected = plain.weight.clone()
    with torch.no_grad():
        plain.eval()(layer_input("nf4").bfloat16())
    assert plain.weight.quant_state is not None and not torch.equal(plain.weight.flatten(), expected.flatten())
    module = Holder(plain)
    lora(target_modules="layer").attach(module)
    assert torch.equal(module.layer.weight, expected)
    module(layer_input("nf4")).sum().backward()
    assert module.layer.peft["default"].lora_B.grad.any()


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_weight_that_is_computed_is_read_once(method, monkeypatch):
    """By a weight norm: there is no parameter to read again in the backward pass."""
    for delta in (LoRADelta, DoRADelta):
        monkeypatch.setattr(delta, "fused_from", 1)
    module = Holder(nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT)))
    type(method)(**method.arguments() | {"target_modules": "layer"}).attach(module)
    perturb(module)
    module(layer_input("linear")).square().sum().backward()
    assert all(p.grad.any() for p in module.parameters() if p.requires_grad)


COPIES = {
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "pickled, then copied": lambda module: copy.deepcopy(pickle.loads(pickle.dumps(module))),
    "copied": copy.deepcopy,
    "averaged": lambda module: AveragedModel(module).module,
    "moved": lambda module: copy.deepcopy(module).to("cpu"),
}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("way", COPIES)
def test_the_state_survives(way, kind):
    module = holder(kind)
    lora(target_modules="layer").attach(module)
    perturb(module)
    module(layer_input(kind))  # which leaves its marks on an int8 layer
    twin = COPIES[way](module)
    assert_same(snapshot(twin), snapshot(module))
    assert torch.equal(twin(layer_input(kind)), module(layer_input(kind)))
    assert type(twin.layer) is type(module.layer)
    mine, theirs = ({t.data_ptr() for t in layer_ops(m.layer).stored(m.layer)} for m in (module, twin))
    assert mine.isdisjoint(theirs)
    twin.train()(layer_input(kind)).sum().backward()
    assert twin.layer.peft["default"].lora_B.grad.any()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_state_dict_is_read_with_its_constants(kind):
    torch.manual_seed(0)
    module = holder(kind)
    torch.manual_seed(1)
    other = nn.Linear(IN, OUT)
    make_quantizer("nf4" if kind == "nf4" else kind).quantize(other, torch.device("cpu"))
    module.layer.load_state_dict(other.state_dict())
    assert torch.equal(layer_ops(module.layer).matrix(module.layer), layer_ops(other).matrix(other))
    assert_same(snapshot(module.layer), snapshot(other))
