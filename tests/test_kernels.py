"""Fast operations against the same in plain torch; the Triton side where there is a GPU."""

from types import SimpleNamespace

import pytest
import torch

from lit_peft.core import products
from lit_peft.core.kernels import in_triton, row_norms, scale_features
from lit_peft.core.products import matmul_in
from lit_peft.core.quantized import dense_4bit, forward_4bit
from lit_peft.methods import lora
from lit_peft.quantizers.bnb import FP4, NF4

HALVES = (torch.bfloat16, torch.float16)
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 300), (2, 5, 33), (300, 257), (1, 0, 8)])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_scale_features(device, dtype, shape, normed, biased):
    generator = torch.Generator().manual_seed(0)
    z, dy = torch.randn(2, *shape, generator=generator).to(device, dtype)
    v, bias = torch.randn(2, shape[-1], generator=generator).to(device)
    norm = 0.5 + torch.rand(shape[-1], generator=generator).to(device) if normed else None
    exact = [t.double().requires_grad_() for t in (z, v, bias)]
    found = [t.clone().requires_grad_() for t in (z, v, bias)]
    f = exact[1] / norm.double() if normed else exact[1]
    expected = f * exact[0] + ((1 - f) * exact[2] if biased else 0)
    expected.backward(dy.double())
    y = scale_features(found[0], found[1], norm, found[2] if biased else None)
    y.backward(dy)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    pairs = [(y, expected), *((a.grad, b.grad) for a, b in zip(found, exact, strict=True) if b.grad is not None)]
    assert len(pairs) == 3 + biased
    for ours, theirs in pairs:
        scale = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("out", "n", "r"), [(32, 64, 4), (100, 300, 16), (33, 257, 40), (5, 7, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_row_norms(device, dtype, out, n, r, transposed):
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(n, out, generator=generator).t() if transposed else torch.randn(out, n, generator=generator)
    A, B = torch.randn(r, n, generator=generator), torch.randn(out, r, generator=generator)
    W = W.to(device, dtype)
    expected = torch.linalg.vector_norm(W.double().cpu() + 0.5 * (B.double() @ A.double()), dim=1)
    found = row_norms(W, A.to(device), B.to(device), 0.5)
    assert found.dtype == torch.float32 and not found.requires_grad
    tolerance = 2e-2 if dtype == torch.bfloat16 or device == "cuda" else 1e-5  # a GPU multiplies in TF32
    torch.testing.assert_close(found.double().cpu(), expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_matmul_in(device, dtype, wanted):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=generator).to(device, dtype) for size in ((16, 500), (500, 40)))
    found, exact = matmul_in(wanted, a, b), a.double() @ b.double()
    widened = wanted == torch.float32 and dtype in HALVES and products._returns_sums(a)
    assert found.dtype == (wanted if widened else dtype)
    tolerance = 1e-5 if widened else torch.finfo(dtype).eps
    tolerance = max(tolerance, 1e-3 if dtype == torch.float32 and device == "cuda" else 1e-5)  # which may use TF32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance * exact.abs().max().item())


def test_products_are_had_in_float32_where_the_gpu_has_them(monkeypatch):
    """A T4 has none of bfloat16, and a sum in float16 is none in float32: torch would raise."""
    tensors = {dtype: SimpleNamespace(is_cuda=True, dtype=dtype, device=dtype) for dtype in HALVES}
    found = {}
    for capability in ((7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        products._has_bfloat16.cache_clear()
        found[capability] = [products._returns_sums(tensor) for tensor in tensors.values()]
    products._has_bfloat16.cache_clear()
    assert found == {(7, 5): [False, True], (8, 0): [True, True], (9, 0): [True, True]}
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))
    assert not products._returns_sums(tensors[torch.float16])


def test_gradients_of_float32_factors_are_asked_for_in_float32(monkeypatch):
    monkeypatch.setattr(lora.LoRADelta, "fused_from", 0)
    asked = []
    monkeypatch.setattr(lora, "matmul_in", lambda dtype, a, b: asked.append((dtype, a.dtype)) or matmul_in(dtype, a, b))
    layer = torch.nn.Sequential(torch.nn.Linear(8, 6, dtype=torch.bfloat16))
    lora.LoRA(r=2, dropout=0.0, target_modules="all-linear").attach(layer)
    layer(torch.ones(3, 8, dtype=torch.bfloat16)).sum().backward()
    assert asked == [(torch.float32, torch.bfloat16)] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [NF4, FP4])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("shape", [(64, 64), (33, 258), (5, 6), (300, 192), (2, 6)])
def test_dense_4bit_is_bitsandbytes(kind, double_quant, storage, block, shape):
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        layer = torch.nn.Linear(shape[1], shape[0], dtype=dtype)
        kind(double_quant, block_size=block, storage_dtype=storage).quantize(layer, torch.device("cuda"))
        assert in_triton(layer.weight.data) is not None
        expected = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert dense_4bit(layer).equal(expected) and expected.dtype == dtype
        if shape[1] % block == 0:
            for columns in (slice(0, block), slice(shape[1] - block, shape[1])):
                assert dense_4bit(layer, None, columns).equal(expected[:, columns])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dense_4bit_of_codes_anywhere_in_memory():
    """A kernel that was compiled for aligned codes must not read others."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(80, 48)
    NF4().quantize(layer, torch.device("cuda"))
    expected, codes = dense_4bit(layer), layer.weight.data
    for shift in (1, 2, 4, 8, 16, 0, 3):
        moved = torch.empty(codes.numel() + 16, dtype=codes.dtype, device="cuda")[shift:][: codes.numel()]
        layer.weight.data = moved.copy_(codes.flatten()).view(codes.shape)
        assert layer.weight.data.data_ptr() % 16 == shift % 16
        assert dense_4bit(layer).equal(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [3, 2000])
def test_forward_4bit_is_bitsandbytes(rows):
    from bitsandbytes import matmul_4bit

    torch.manual_seed(0)
    layer = torch.nn.Linear(256, 96)
    NF4().quantize(layer, torch.device("cuda"))
    x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = matmul_4bit(x, layer.weight, layer.weight.quant_state, bias=layer.bias.bfloat16().cuda())
        layer.bias.data = layer.bias.data.cuda()
        assert forward_4bit(layer, x).equal(expected)
