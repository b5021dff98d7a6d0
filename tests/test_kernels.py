"""Fast operations against the same in plain torch; the Triton side where there is a GPU."""

import pytest
import torch

from lit_peft.core.kernels import row_norms, scale_features

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
