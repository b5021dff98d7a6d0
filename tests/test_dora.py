"""DoRA's fused function against its equation, in float64 and by the plain path; with Triton where there is a GPU."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lit_peft import DoRA, LoRA
from lit_peft.core.layers import layer_ops
from lit_peft.methods import dora, lora
from lit_peft.testing.conformance import perturb
from lit_peft.testing.subjects import Holder, holder, layer_input

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
# x, out, r: blocks of the kernels are 16 x 256, 16 down a program
SHAPES = [((7,), 5, 2), ((2, 5, 64), 32, 4), ((3, 40), 300, 16), ((2, 150, 33), 257, 20), ((1, 0, 8), 9, 1)]


def adapted(module, fused=True, **options):
    """`module`, with a DoRA at its layer whose tensors are not where they start."""
    DoRA(**{"r": 4, "dropout": 0.0, "target_modules": "layer"} | options).attach(module)
    perturb(module)
    module.layer.peft["default"].fused_from = 0 if fused else 1 << 62
    return module.train()


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def is_fused(y):
    return "DoRAFunction" in type(y.grad_fn).__name__


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(1e-3, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double().cpu(), theirs.double().cpu(), rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "out", "r"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_function_is_the_equation(device, dtype, shape, out, r, bias):
    torch.manual_seed(0)
    module = adapted(Holder(nn.Linear(shape[-1], out, bias=bias)).to(dtype), r=r).to(device)
    x = torch.randn(shape).to(device, dtype).requires_grad_()
    dy = torch.randn(*shape[:-1], out).to(device, dtype)
    y = module(x)
    assert is_fused(y) and y.dtype == dtype
    y.backward(dy)
    delta = module.layer.peft["default"]
    found = [y, x.grad, *(p.grad for p in delta.parameters())]
    assert [p.grad.dtype for p in delta.parameters()] == [torch.float32] * 3

    leaves = [t.detach().double().cpu().requires_grad_() for t in (x, *delta.parameters())]
    given, A, B, m = leaves
    W, b = module.layer.weight.double().cpu(), module.layer.bias.double().cpu() if bias else None
    V = W + delta.scaling * B @ A
    expected = F.linear(given, (m / torch.linalg.vector_norm(V, dim=1).detach())[:, None] * V, b)
    expected.backward(dy.double().cpu())
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5 if device == "cpu" else 5e-3  # a GPU's norms are in TF32
    assert_close(found, [expected, *(t.grad for t in leaves)], tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
def test_gradients_are_the_numerical_ones(bias, dropout, monkeypatch):
    layer, norm = nn.Linear(6, 5, bias=bias).double().requires_grad_(False), 0.5 + torch.rand(5).double()
    monkeypatch.setattr(dora, "row_norms", lambda *args: norm)  # a constant to the gradient
    x, d, A, B, m = (
        torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((2, 3, 6), (2, 3, 6), (2, 6), (5, 2), 5)
    )

    def function(x, d, A, B, m):
        fused = lora.Fused(layer, layer_ops(layer), 0.7, None)
        return dora.DoRAFunction.apply(x, d if dropout else None, A, B, fused, m)

    if not dropout:
        d = d.detach()
    assert torch.autograd.gradcheck(function, (x, d, A, B, m))


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_fused_function_equals_the_plain_path(kind, autocast, dropout):
    results = []
    for fused in (True, False):
        module, x = adapted(holder(kind), fused, dropout=dropout), layer_input(kind).requires_grad_()
        torch.manual_seed(5)  # the same dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        assert is_fused(y) is fused
        (y.float() ** 2).sum().backward()
        results.append([y, x.grad, *(p.grad for p in trained(module))])
    assert [t.dtype for t in results[0]] == [t.dtype for t in results[1]]
    assert_close(*results, tolerance=2e-2 if autocast else 1e-5)


@pytest.mark.parametrize("trains", [["lora_A"], ["lora_B"], ["lora_magnitude_vector"], ["lora_A", "lora_B"]])
@pytest.mark.parametrize("needs_dx", [False, True])
def test_what_does_not_train_has_no_gradient(trains, needs_dx):
    everything, some = adapted(holder("linear")), adapted(holder("linear"))
    x = layer_input("linear").requires_grad_()
    everything(x).square().sum().backward()
    given = x.detach().clone().requires_grad_(needs_dx)
    delta = some.layer.peft["default"]
    for name, parameter in delta.named_parameters():
        parameter.requires_grad_(name in trains)
    y = some(given)
    assert is_fused(y)
    y.square().sum().backward()
    for name, parameter in everything.layer.peft["default"].named_parameters():
        found = delta.get_parameter(name).grad
        assert torch.equal(found, parameter.grad) if name in trains else found is None
    assert torch.equal(given.grad, x.grad) if needs_dx else given.grad is None


def gradients(fused, run):
    module, x = adapted(holder("linear"), fused), layer_input("linear").requires_grad_()
    run(module, x)
    return [x.grad, *(p.grad for p in trained(module))]


def twice(module, x):
    (module(x) * module(2 * x)).sum().backward()


def again(module, x):
    y = module(x).square().sum()
    y.backward(retain_graph=True)
    y.backward()


def in_place(module, x):
    module(x).relu_().square().sum().backward()


def recomputed(module, x):
    checkpoint(module, x, use_reentrant=False).square().sum().backward()


def recomputed_reentrant(module, x):
    checkpoint(module, x, use_reentrant=True).square().sum().backward()


def strided(module, x):
    module(x.transpose(0, 1)).transpose(0, 2).square().sum().backward()


def compiled(module, x):
    torch.compile(module, backend="aot_eager", fullgraph=True)(x).square().sum().backward()


@pytest.mark.parametrize("run", [twice, again, in_place, recomputed, recomputed_reentrant, strided, compiled])
def test_used_in_other_ways(run):
    assert_close(gradients(True, run), gradients(False, run), tolerance=1e-5)


def test_a_base_in_float64_is_adapted():
    module = nn.Sequential(nn.Linear(6, 5)).double()
    before, x = module(torch.ones(2, 6).double()), torch.ones(2, 6).double()
    DoRA(r=2, dropout=0.0, target_modules="all-linear").attach(module)
    torch.testing.assert_close(module(x), before, rtol=1e-6, atol=0)


def test_a_row_of_zeros_stays_one():
    module, x = holder("linear"), layer_input("linear").requires_grad_()
    module.layer.weight.data[3] = 0
    base = module(x)
    DoRA(r=4, dropout=0.0, target_modules="layer").attach(module)
    module.layer.peft["default"].fused_from = 0
    y = module(x)
    assert is_fused(y)
    torch.testing.assert_close(y, base)
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *trained(module)))


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_a_second_derivative_through_the_node_is_refused(method, monkeypatch):
    """The casts of the factors lie inside of it: it would be wrong in bfloat16."""
    monkeypatch.setattr("lit_peft.methods.lora.LoRADelta.fused_from", 0)
    monkeypatch.setattr("lit_peft.methods.dora.DoRADelta.fused_from", 0)
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8, requires_grad=True)
    method(r=2, dropout=0.0, target_modules=["0"]).attach(net)
    (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.square().sum().backward()
