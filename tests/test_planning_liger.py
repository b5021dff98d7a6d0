"""Plans of models on Liger's kernels, with a package in its place whose kernels cannot be launched."""

from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from liger_stand_in import GPU, install
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers.models.llama import modeling_llama

from lit_peft.core.kernels import HAS_TRITON
from lit_peft.core.remake import NotesInput, restore_class
from lit_peft.data import TextClassificationDataModule
from lit_peft.methods import FullFineTuning, LoRA
from lit_peft.planning import liger as planning_liger
from lit_peft.planning import plan
from lit_peft.planning.fakes import fake_mode
from lit_peft.planning.live import LiveBytes
from lit_peft.planning.on_gpu import as_on_gpu
from lit_peft.planning.run import plan_run
from lit_peft.tasks import TextClassification
from lit_peft.training import liger
from lit_peft.training.liger import use_liger

KERNELS = """
import torch

calls = []

class KernelInterface:
    def __getitem__(self, grid):
        raise RuntimeError("a kernel was launched")

kernel = KernelInterface()

class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W):
        Y = torch.empty_like(X)
        RSTD = torch.empty(X.shape[:-1], dtype=torch.float32, device=X.device)
        kernel[(1,)](Y, X, W, RSTD, num_warps=4)
        ctx.save_for_backward(X, W, RSTD)
        return Y

    @staticmethod
    def backward(ctx, dY):
        X, W, RSTD = ctx.saved_tensors
        dW = torch.empty(W.shape, dtype=torch.float32, device=W.device).to(W.dtype) if ctx.needs_input_grad[1] else None
        kernel[(1,)](dY, X, W, RSTD)
        return dY, dW

class LigerRMSNorm:
    def forward(self, x):
        return LigerRMSNormFunction.apply(x, self.weight)

class LigerSiLUMulFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        calls.append("mlp")
        c = torch.empty_like(a)
        kernel[(1,)](a, b, c)
        ctx.save_for_backward(a, b)
        return c

    @staticmethod
    def backward(ctx, dc):
        a, b = ctx.saved_tensors
        kernel[(1,)](dc, a, b)
        return a, b

class LigerSwiGLUMLP:
    def forward(self, x):
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))

def rope(q, k, cos, sin, *args):
    calls.append("rope")
    return q, k

CHUNK = 16

def fused_linear_cross_entropy_forward(_input, weight, target, reduction="mean", accum_dtype=None):
    grad_input = torch.zeros_like(_input)
    grad_weight = torch.zeros_like(weight, dtype=accum_dtype) if weight.requires_grad else None
    loss = torch.zeros(len(_input), dtype=torch.float32, device=_input.device)
    scored = (target != -100).sum().item()
    for x, grad in zip(_input.split(CHUNK), grad_input.split(CHUNK)):
        logits = x @ weight.t()
        kernel[(1,)](logits, loss, n_non_ignore=scored)
        grad[:] = logits @ weight
        if grad_weight is not None:
            grad_weight += torch.mm(logits.t(), x).float()
        del logits
    return loss.sum(), None, grad_input, None if grad_weight is None else grad_weight.to(weight.dtype), None

def fused_linear_cross_entropy_backward(grad_output, grad_input, grad_weight, grad_bias):
    if not torch.equal(grad_output, torch.tensor(1.0)):
        raise RuntimeError("the loss is the last node")
    return grad_input, grad_weight, grad_bias

class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, _input, weight, target):
        loss, _, *gradients = fused_linear_cross_entropy_forward(_input=_input, weight=weight, target=target)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        return *fused_linear_cross_entropy_backward(dloss, *ctx.saved_tensors)[:2], None

def lce_forward(self, input_ids, labels=None, **kwargs):
    calls.append("loss")
    hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
    loss = FusedLoss.apply(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())
    return type("Output", (), {"loss": loss})
"""
WIDTH, INNER, VOCABULARY, LAYERS = 64, 192, 2000, 4
BATCH, LENGTH = 2, 64
TOKENS = BATCH * LENGTH


@pytest.fixture
def stand_in(monkeypatch) -> ModuleType:
    """The stand-in, which planning finds where it looks for Triton and for Liger's losses."""
    module = install(monkeypatch, KERNELS)
    loaded = {"triton": module, "liger_kernel.ops.fused_linear_cross_entropy": module}
    monkeypatch.setattr(planning_liger, "sys", SimpleNamespace(modules=loaded))
    return module


def llama(dtype=torch.bfloat16, device="meta", **sizes):
    config = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS}
    config = transformers.LlamaConfig(**config | sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype).train()


def on_liger(**options):
    model = llama(**options)
    use_liger(model, GPU)
    return model


def texts(device="meta"):
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.int64, device=device)
    return {"input_ids": ids, "labels": ids}


def lora(**options):
    return LoRA(r=4, dropout=0.0, target_modules="all-linear", **options)


def bytes_of(step, *given) -> tuple[int, int]:
    """Bytes that live after a step on fake tensors, beside those given, and the most that lived while it ran."""
    live = LiveBytes()
    with fake_mode(), as_on_gpu():
        given = [torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for t in given]
        before = live.hold(given)
        with live:
            kept = step(*given)
        assert kept is not None
        return live.now - before, live.peak - before


def meta(*shape, dtype=torch.bfloat16, trains=False):
    return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=trains)


def test_a_norm_keeps_its_rows_and_writes_its_gradient_in_place(stand_in):
    y, rows = 2 * TOKENS * WIDTH, 4 * TOKENS
    forward = stand_in.LigerRMSNormFunction.apply
    x, weight = meta(TOKENS, WIDTH, trains=True), meta(WIDTH)
    assert bytes_of(forward, x, weight) == (y + rows, y + rows)

    def backward(x, weight, gradient):
        return torch.autograd.grad(forward(x, weight), x, gradient)

    assert bytes_of(backward, x, weight, meta(TOKENS, WIDTH)) == (0, y + rows)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fused_loss_makes_no_addends_of_its_weights_gradient_in_half_precision(trains, dtype, stand_in):
    """As on a GPU, where the product adds to it; on a CPU Liger makes them in float32."""
    given = meta(TOKENS, WIDTH, dtype=dtype, trains=True), meta(VOCABULARY, WIDTH, dtype=dtype, trains=trains)
    now, peak = bytes_of(stand_in.FusedLoss.apply, *given, torch.empty(TOKENS, dtype=torch.int64))
    size = dtype.itemsize
    hidden, weight, chunk = (n * size for n in (TOKENS * WIDTH, VOCABULARY * WIDTH, stand_in.CHUNK * VOCABULARY))
    assert now == pytest.approx(hidden + trains * weight, abs=1024)
    addends = weight if trains and dtype == torch.float32 else 0
    assert peak - now == pytest.approx(chunk + addends, rel=0.05)


def test_losses_ask_for_no_values_and_others_still_do(stand_in):
    with fake_mode(), as_on_gpu():
        with pytest.raises(DataDependentOutputException):
            torch.empty(3).sum().item()
        stand_in.FusedLoss.apply(
            torch.empty(4, 4, requires_grad=True), torch.empty(8, 4), torch.empty(4, dtype=torch.int64)
        ).backward()
    with pytest.raises(RuntimeError, match="a kernel was launched"):
        stand_in.kernel[(1,)]


def test_a_model_is_planned_as_its_kernels_run(stand_in):
    eager, found = (plan(make(), lora(), texts()) for make in (llama, on_liger))
    assert {name: stand_in.calls.count(name) for name in ("loss", "rope")} == {"loss": 1, "rope": LAYERS}
    assert [getattr(found, part) for part in ("base", "adapters", "gradients", "optimizer")] == [
        getattr(eager, part) for part in ("base", "adapters", "gradients", "optimizer")
    ]
    logits, chunk = TOKENS * VOCABULARY, stand_in.CHUNK * VOCABULARY
    assert eager.activations > 2 * 4 * logits
    assert found.activations < eager.activations - 2 * 4 * logits + 2 * chunk
    rope = modeling_llama.apply_rotary_pos_emb
    q = torch.rand(1, 2, 3, 4)
    rope(q, q, q[0], q[0])
    assert stand_in.calls.count("rope") == LAYERS  # on a CPU again


def test_inputs_that_are_made_again_are_not_kept(stand_in, monkeypatch):
    """Of all layers but the one that the backward pass is at."""
    monkeypatch.setattr("lit_peft.methods.lora.LoRADelta.fused_from", 1)
    found = plan(on_liger(vocab_size=16), lora(), texts())
    assert stand_in.calls.count("mlp") == 2 * LAYERS
    model = on_liger(vocab_size=16)
    lora().attach(model)
    for layer in model.modules():
        restore_class(layer, NotesInput)
    monkeypatch.setattr(liger, "remakable", lambda y, *_: y)
    more = plan(model, None, texts())
    each = 2 * TOKENS * INNER
    assert (LAYERS - 1) * each <= more.activations - found.activations <= LAYERS * each


@pytest.mark.parametrize("method", [lora, lambda: lora(quantize="nf4")])
def test_a_live_model_is_planned_as_one_without_weights(method, stand_in):
    live = on_liger(device="cpu")
    method().attach(live)
    expected = plan(on_liger(), method(), texts())
    assert plan(live, None, texts("cpu")).parts() == expected.parts()


@pytest.mark.skipif(not (liger.is_installed() and HAS_TRITON), reason="needs the extra liger")
@pytest.mark.parametrize("method, precision", [(lora, "32-true"), (FullFineTuning, "bf16-true")])
def test_liger_itself_is_planned(method, precision):
    eager, found = (plan(make(), method(), texts(), precision=precision) for make in (llama, on_liger))
    assert found.activations < eager.activations - 2 * 4 * TOKENS * VOCABULARY
    assert found.parts() | {"activations": 0} == eager.parts() | {"activations": 0}


def run_plan(**options):
    task = TextClassification(kernels="liger", **options)
    data = TextClassificationDataModule(path="demo", batch_size=4, max_length=16)
    trainer = SimpleNamespace(callbacks=[lora()], precision="32-true", accumulate_grad_batches=1)
    return plan_run(trainer, task, data, None, others=False)[0][0]


def test_a_run_is_planned_with_the_kernels_that_it_asks_for(stand_in, monkeypatch):
    with pytest.raises(ValueError, match=r"^kernels: Liger has none for \w+; it knows llama"):
        run_plan()  # as its fit would
    given = []
    monkeypatch.setattr("lit_peft.tasks.base.use_liger", lambda model, device: given.append(device.type))
    assert run_plan().notes == () and given == ["cuda"]


def test_without_the_package_a_run_is_planned_without_it_and_says_so(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    (note,) = run_plan().notes
    assert note.startswith("Liger's package is not here (pip install 'lit-peft[liger]')") and "upper bounds" in note
