"""Gradient checkpointing: the gradients are what they are without it, and what waits is the blocks' inputs."""

import copy
import functools
import pickle
import warnings
import weakref

import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from lightning.pytorch.callbacks import ModelCheckpoint
from models import TINY, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import lora

from lit_peft.callbacks import ReproducibleSteps
from lit_peft.core.layers import LayerOps
from lit_peft.data import TextClassificationDataModule
from lit_peft.methods import BottleneckAdapter, DoRA, HiRA, LoRA, PrefixTuning, PromptTuning
from lit_peft.tasks import TextClassification
from lit_peft.training import checkpointing
from lit_peft.training.checkpointing import Offload, checkpoint_activations


@pytest.fixture
def device_of_its_own(monkeypatch):
    """Lets offloading run on a CPU, where streams do nothing, as if its memory were another device's."""
    monkeypatch.setattr(checkpointing, "_is_on_host", lambda x: False)
    monkeypatch.setattr(checkpointing, "_pinned_like", torch.empty_like)


def gradients(model: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """Of every trainable tensor, after a step in training mode with dropout."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    TINY[name].run(model).float().square().mean().backward()
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}


def adapted(name: str, method=None) -> nn.Module:
    torch.manual_seed(0)
    model = tiny(name)
    (method or LoRA(r=2, dropout=0.3)).attach(model)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.requires_grad and "lora_B" in key:
                p.normal_(std=0.1)
    return model


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    assert any(grad.any() for grad in expected.values())
    for key, grad in expected.items():
        assert torch.equal(found[key], grad), key


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_gradients_are_the_same_bit_for_bit_with_dropout_and_frozen_embeddings(name, offload, device_of_its_own):
    model = adapted(name)
    expected = gradients(model, name)
    checkpoint_activations(model, offload)
    assert_same(gradients(model, name), expected)
    assert_same(gradients(model, name), expected)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize(
    "method",
    [
        DoRA(r=2),
        HiRA(r=2),
        BottleneckAdapter(reduction_factor=4),
        PrefixTuning(num_virtual_tokens=3),
        PromptTuning(num_virtual_tokens=3),
        LoRA(r=2, bias="all", train_also="re:.*[nN]orm.*"),
        LoRA(r=2, target_modules="all-linear", quantize="nf4"),
    ],
    ids=lambda method: type(method).__name__ + (" on nf4" if method.quantize else ""),
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_of_every_kind_of_method(name, method, offload, device_of_its_own):
    model = adapted(name, method)
    expected = gradients(model, name)
    checkpoint_activations(model, offload)
    assert_same(gradients(model, name), expected)


def test_under_autocast_and_where_adapters_come_later():
    expected, found = tiny("llama"), tiny("llama")
    checkpoint_activations(found)
    both = []
    for model in (expected, found):
        torch.manual_seed(0)
        lora(dropout=0.2).attach(model)
        with torch.autocast("cpu", torch.bfloat16):
            both.append(gradients(model, "llama"))
    assert_same(both[1], both[0])


def test_blocks_are_computed_again_in_training_alone():
    calls = []
    model = adapted("bert")
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(1))
    checkpoint_activations(model)
    gradients(model, "bert")
    assert len(calls) == 2
    model.eval()
    TINY["bert"].run(model).sum().backward()
    assert len(calls) == 3


def test_the_product_of_a_blocks_last_layer_is_made_once(monkeypatch):
    """Nothing needs it in the backward pass: the block is computed again up to what the layer keeps."""
    monkeypatch.setattr("lit_peft.methods.lora.LoRADelta.fused_from", 1)
    made = []
    add_product = LayerOps.add_product
    monkeypatch.setattr(LayerOps, "add_product", lambda *args: made.append(args[1]) or add_product(*args))
    model = adapted("llama", LoRA(r=2, dropout=0.0, target_modules="all-linear"))
    expected = gradients(model, "llama")
    blocks = model.config.num_hidden_layers
    assert len(made) == 7 * blocks
    checkpoint_activations(model)
    assert_same(gradients(model, "llama"), expected)
    again = made[7 * blocks :]
    assert len(again) == 13 * blocks
    assert (
        sum(type(layer).__name__ == "Linear" and layer.in_features == model.config.intermediate_size for layer in again)
        == blocks
    )


def test_it_may_be_called_again_and_undone():
    model = adapted("bert")
    block = model.bert.encoder.layer[1]
    for offload in (True, False, False, True):
        checkpoint_activations(model, offload)
        assert block.gradient_checkpointing and isinstance(block._gradient_checkpointing_func, Offload) is offload
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name that every release has
        model.gradient_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_offload_apart(make, device_of_its_own):
    model = adapted("bert")
    checkpoint_activations(model, offload=True)
    expected = gradients(model, "bert")
    other = make(model)
    blocks = [m.bert.encoder.layer for m in (model, other)]
    (first, second), again = ([layer._gradient_checkpointing_func for layer in b] for b in blocks)
    assert first is second and again[0] is again[1] and again[0] is not first
    assert_same(gradients(other, "bert"), expected)


def test_a_model_without_blocks_is_refused_by_name():
    for model in (nn.Linear(2, 2), tf.MobileNetV2ForImageClassification(tf.MobileNetV2Config(depth_multiplier=0.25))):
        with pytest.raises(ValueError, match=rf"^{type(model).__name__} does not support gradient checkpointing"):
            checkpoint_activations(model)


# ---------------------------------------------------------------------------------------------- what waits where


class Copies:
    """What `_Input` does, in order: `out 1` is the copy of the second block's input to the host."""

    def __init__(self, monkeypatch) -> None:
        self.log, self.inputs = [], []
        init, copied = checkpointing._Input.__init__, checkpointing._Input._copy

        def begin(waiting, x, *args):
            self.inputs.append(weakref.ref(waiting))
            init(waiting, x, *args)

        def copy_(waiting, to, x):
            number = [ref() for ref in self.inputs].index(waiting)
            self.log.append(f"{'out' if to is waiting.on_host else 'in'} {number}")
            copied(waiting, to, x)

        monkeypatch.setattr(checkpointing._Input, "__init__", begin)
        monkeypatch.setattr(checkpointing._Input, "_copy", copy_)

    def on_device(self) -> list[int]:
        return [i for i, ref in enumerate(self.inputs) if ref() is not None and ref().on_device is not None]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.gradient_checkpointing = nn.Linear(4, 4), False

    def forward(self, x, shared):
        if self.gradient_checkpointing:
            return self._gradient_checkpointing_func(self.plain, x, shared)
        return self.plain(x, shared)

    def plain(self, x, shared):
        return torch.tanh(self.linear(x)) * shared


def stack(offload: bool, blocks: int = 4) -> nn.ModuleList:
    torch.manual_seed(0)
    model = nn.ModuleList(Block() for _ in range(blocks))
    if offload:
        checkpoint_activations(model, offload=True)
    return model


def run(model: nn.ModuleList, shared: torch.Tensor, each=lambda i: None) -> torch.Tensor:
    x = torch.linspace(-1, 1, 8).view(2, 4)
    for i, block in enumerate(model):
        x = block(x, shared)
        each(i)
    return x.sum()


def test_inputs_leave_the_device_and_come_back_one_block_ahead(monkeypatch, device_of_its_own):
    copies, shared = Copies(monkeypatch), torch.rand(4, requires_grad=True)
    model, plain, held = stack(offload=True), stack(offload=False), []
    loss = run(model, shared, lambda i: held.append(copies.on_device()))
    # The first block's input needs no gradient and stays; of the others' one is on the device at a time.
    assert copies.log == ["out 0", "out 1", "out 2"] and held == [[], [0], [1], [2]]
    seen = []
    for i, block in enumerate(model):
        block.linear.weight.register_hook(lambda grad, i=i: seen.append((i, [*copies.on_device()])))
    loss.backward()
    # The last one never had to leave; while a block is computed again, the input of the one before arrives.
    assert copies.log[3:] == ["in 1", "in 0"]
    assert seen == [(3, [1]), (2, [0]), (1, []), (0, [])]
    of_shared, shared.grad = shared.grad, None
    run(plain, shared).backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()})
    assert torch.equal(of_shared, shared.grad)
    del loss
    assert not any(ref() for ref in copies.inputs)  # nothing of a step is left behind


def test_backward_may_run_twice_and_two_graphs_may_wait(device_of_its_own):
    shared = torch.rand(4)
    model, plain = stack(offload=True), stack(offload=False)
    for m in (model, plain):
        first, second = run(m, shared), run(m, 2 * shared)
        second.backward(retain_graph=True)
        first.backward()
        second.backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, {n: p.grad for n, p in plain.named_parameters()})


def test_a_block_that_is_given_its_input_by_name_is_checkpointed_and_nothing_waits(monkeypatch, device_of_its_own):
    copies, offload = Copies(monkeypatch), Offload()
    x, shared = torch.rand(2, 4, requires_grad=True), torch.rand(2, 4)
    offload(functools.partial(torch.mul, input=x, other=shared)).sum().backward()
    assert torch.equal(x.grad, shared) and copies.log == []


def test_no_pinned_memory_left_is_one_error(monkeypatch, device_of_its_own):
    """Not a second one, from the clean-up of what could not be made."""

    def full(x):
        raise torch.OutOfMemoryError("pinned")

    monkeypatch.setattr(checkpointing, "_pinned_like", full)
    seen = []
    monkeypatch.setattr("sys.unraisablehook", seen.append)
    with pytest.raises(torch.OutOfMemoryError, match="pinned"):
        Offload()(torch.sin, torch.rand(2, requires_grad=True) * 1)
    assert seen == []


def test_only_what_is_a_blocks_own_waits(monkeypatch, device_of_its_own):
    copies = Copies(monkeypatch)
    offload, shared = Offload(), torch.rand(2, 4, requires_grad=True) * 1
    x = torch.rand(2, 4)
    offload(torch.mul, x, shared)  # an input that needs no gradient
    offload(lambda ids: ids * 1.0, torch.ones(2, dtype=torch.long))
    assert copies.log == []
    y = offload(torch.mul, x.requires_grad_(), shared)
    assert copies.log == ["out 0"] and copies.inputs[0]().on_host.equal(x)
    y.sum().backward()
    assert torch.equal(x.grad, shared)
    with torch.no_grad():
        offload(torch.mul, x, shared)
    assert copies.log == ["out 0"]


def test_torchs_checkpoint_shows_its_inputs_to_hooks():
    seen = []
    x = torch.rand(3, requires_grad=True) * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.data_ptr()) or t, lambda t: t):
        checkpoint(lambda a: a.exp().sin().tanh(), x, use_reentrant=False)
    assert [place for place in seen if place] == [
        x.data_ptr()
    ]  # nothing from inside; torch 2.11 shows an empty one too


def test_a_cpu_has_nowhere_to_put_them_and_says_so_once():
    model = adapted("bert")
    expected = gradients(model, "bert")
    checkpoint_activations(model, offload=True)
    with pytest.warns(UserWarning, match="offload moves nothing on a CPU"):
        assert_same(gradients(model, "bert"), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, "bert")


# --------------------------------------------------------------------------------------------------- the task


def fitted(folder, gradient_checkpointing, ckpt_path=None):
    """The task after three steps, and what it trained; `folder` then holds the checkpoint of the second."""
    pl.seed_everything(0)
    task = TextClassification(gradient_checkpointing=gradient_checkpointing)
    trainer = pl.Trainer(
        callbacks=[
            LoRA(r=2),
            ReproducibleSteps(),
            ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_on_train_epoch_end=False),
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_steps=3,
    )
    data = TextClassificationDataModule(path="demo", limit_train=48, limit_val=16, limit_test=16, batch_size=16)
    trainer.fit(task, data, ckpt_path=ckpt_path)
    return task, {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}


def test_a_fit_ends_where_it_ends_without_and_resumes(tmp_path):
    _, expected = fitted(tmp_path / "plain", False)
    task, found = fitted(tmp_path / "checkpointed", True)
    assert all(block.gradient_checkpointing for block in task.model.distilbert.transformer.layer)
    assert_same(found, expected)
    path = tmp_path / "checkpointed" / "step=2.ckpt"
    assert_same(fitted(tmp_path / "resumed", True, path)[1], expected)
    again = TextClassification.load_from_checkpoint(path, gradient_checkpointing=False)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again.modules())


def test_values_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing must be false, true or offload, not 'disk'"):
        TextClassification(gradient_checkpointing="disk")
    with pytest.raises(ValueError, match="offload copies beside the computation"):
        TextClassification(gradient_checkpointing="offload", compile=True)
