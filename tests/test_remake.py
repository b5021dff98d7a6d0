"""Inputs of adapted layers that are made again from a norm's own input: the same bits, and less that is kept.

Most tests take all of a model for a checkpointed block, so that what nodes keep can be seen.
"""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import TINY, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lit_peft
from lit_peft.core import remake
from lit_peft.core.attach import detach
from lit_peft.core.layers import LayerOps
from lit_peft.core.remake import NotesInput, Recipe, note_inputs, remade
from lit_peft.core.swap import restore_class
from lit_peft.methods import DoRA, LoRA
from lit_peft.training.checkpointing import checkpoint_activations

WIDTH = 16


@pytest.fixture(autouse=True)
def _fused(monkeypatch):
    for name in ("lora.LoRADelta", "dora.DoRADelta"):
        monkeypatch.setattr(f"lit_peft.methods.{name}.fused_from", 1)


@pytest.fixture
def as_it_is():
    """Asks for torch's own word on what is checkpointed."""


@pytest.fixture(autouse=True)
def _checkpointed(request, monkeypatch):
    if "as_it_is" not in request.fixturenames:
        monkeypatch.setattr(remake, "is_checkpointed", lambda: True)


class Attention(nn.Module):
    """A norm whose output three layers share, and another whose output one takes, with a residual around both."""

    def __init__(self, norm=nn.LayerNorm) -> None:
        super().__init__()
        self.before, self.after = norm(WIDTH), norm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        x = x + torch.tanh(self.q(y)) * self.k(y) * torch.sigmoid(self.v(y))
        return x + self.out(self.after(x))


def stack(norm=nn.LayerNorm, blocks: int = 2) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, WIDTH), *(Attention(norm) for _ in range(blocks)))
    for layer in model.modules():
        if isinstance(layer, norm):
            nn.init.normal_(layer.weight, 1.0, 0.3)
    return model


def adapt(model: nn.Module, method: LoRA, notes: bool) -> nn.Module:
    torch.manual_seed(1)
    method.attach(model)
    for key, p in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(p, std=0.3)
    if not notes:
        for layer in model.modules():
            if isinstance(layer, NotesInput):
                restore_class(layer, NotesInput)
    return model


def lora(**arguments) -> LoRA:
    return LoRA(**{"r": 2, "dropout": 0.0, "target_modules": ["0", "q", "k", "v", "out"]} | arguments)


def x() -> Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(2))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}


def run(model: nn.Module, *, passes: int = 1) -> dict[str, Tensor]:
    """Gradients after some backward passes through one graph."""
    torch.manual_seed(4)
    loss = model(x()).float().square().sum()
    for i in range(passes):
        loss.backward(retain_graph=i < passes - 1)
    return gradients(model)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for key, grad in expected.items():
        assert torch.equal(found[key], grad), key


class Counted:
    """Calls of a kind of norm."""

    def __init__(self, monkeypatch, kind=nn.LayerNorm) -> None:
        self.calls, plain = 0, kind.forward

        @functools.wraps(plain)
        def forward(layer, x):
            self.calls += 1
            return plain(layer, x)

        monkeypatch.setattr(kind, "forward", forward)


def kept(model: nn.Module) -> int:
    """Bytes that the nodes of a forward pass keep."""
    tensors: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        model(x())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def noting(model: nn.Module) -> list[str]:
    return [path for path, layer in model.named_modules() if isinstance(layer, NotesInput)]


NOTING = ["1.before", "1.after", "2.before", "2.after"]


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_gradients_are_the_same_bit_for_bit(norm, method, passes):
    arguments = {"r": 2, "dropout": 0.0, "target_modules": ["q", "k", "v", "out"], "train_also": "0.weight"}
    plain = adapt(stack(norm), method(**arguments), notes=False)
    noted = adapt(stack(norm), method(**arguments), notes=True)
    assert noting(noted) == NOTING and not noting(plain)
    assert_same(run(noted, passes=passes), run(plain, passes=passes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_casts_are_made_again_too(dtype):
    both = []
    for notes in (False, True):
        model = adapt(stack().to(dtype), lora(), notes)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x().to(dtype)).float().square().sum()
        both.append((loss, model))
    for loss, _ in both:
        loss.backward()
    assert_same(gradients(both[1][1]), gradients(both[0][1]))


def test_what_norms_return_is_no_longer_kept():
    plain, noted = (kept(adapt(stack(), lora(), notes)) for notes in (False, True))
    assert plain - noted == len(NOTING) * x()[..., :1].numel() * WIDTH * 4
    dropout = [kept(adapt(stack(), lora(dropout=0.3), notes)) for notes in (False, True)]
    assert dropout[0] == dropout[1]  # what is kept there is the dropout of it


def test_each_norm_is_run_again_once_a_pass_for_all_that_share_it(monkeypatch):
    model = adapt(stack(), lora(), notes=True)
    counted = Counted(monkeypatch)
    recipes = []
    for layer in (model[1].q, model[1].k, model[2].v):
        layer.register_forward_pre_hook(lambda layer, args: recipes.append(remade(args[0]).recipe))
    loss = model(x()).square().sum()
    assert counted.calls == 4 and recipes[0] is recipes[1] and recipes[0] is not recipes[2]
    loss.backward(retain_graph=True)
    assert counted.calls == 8
    assert not any(recipe.made is not None for recipe in recipes)
    loss.backward()
    assert counted.calls == 12


def test_what_is_made_is_let_go_of_with_the_last_that_asks(monkeypatch):
    """Not later: of a large layer that has one input to itself, it would lie beside the gradient of that."""
    model = adapt(stack(blocks=1), lora(), notes=True)
    recipes = []
    model[1].out.register_forward_pre_hook(lambda layer, args: recipes.append(args[0]._lit_peft_remade.recipe))
    loss = model(x()).square().sum()
    seen = []
    again, product_t = Recipe.again, LayerOps.product_t

    def spy_again(recipe, *args):
        seen.append(recipe)
        return again(recipe, *args)

    def spy_product_t(ops, layer, *args):
        seen.append((layer, recipes[0].made))
        return product_t(ops, layer, *args)

    monkeypatch.setattr(Recipe, "again", spy_again)
    monkeypatch.setattr(LayerOps, "product_t", spy_product_t)
    loss.backward()
    assert seen[:2] == [recipes[0], (model[1].out, None)]


def test_parts_of_a_graph_and_one_input_given_twice(monkeypatch):
    both = []
    for notes in (False, True):
        model = adapt(stack(), lora(), notes)
        names = ["1.q.peft.default.lora_A", "2.k.peft.default.lora_A", "2.q.peft.default.lora_A"]
        loss = model(x()).square().sum() + model[1].k(model[1].before(model[0](x()))).sum()
        found = [torch.autograd.grad(loss, model.get_parameter(name), retain_graph=True)[0] for name in names]
        y = model[1].before(model[0](x()))
        twice = model[1].q(y) * model[1].q(y)
        loss.backward()
        twice.sum().backward()
        both.append(dict(zip(names, found, strict=True)) | {f"all.{key}": g for key, g in gradients(model).items()})
    assert_same(both[1], both[0])


def test_a_tensor_that_was_written_to_or_that_a_hook_gave_is_kept():
    model = adapt(stack(), lora(), notes=True)
    h = model[0](x())
    y = model[1].before(h)
    assert remade(y) is not None and remade(y).sources[0] is h
    y.mul_(2)
    assert remade(y) is None
    assert remade(y + 0) is None
    assert remade(model[1].before(h).detach_()) is None
    with torch.no_grad():
        assert remade(model[1].before(h)) is None
    handle = model[1].before.register_forward_hook(lambda layer, args, y: y * 2)
    assert remade(model[1].before(h)) is None
    handle.remove()
    assert remade(model[1].before(h)) is not None


def test_norms_that_train_note_nothing():
    both = []
    for notes in (False, True):
        model = adapt(stack(), lora(train_also=["before.weight", "0.bias"]), notes)
        assert remade(model[1].before(model[0](x()))) is None
        both.append(run(model))
    assert "1.before.weight" in both[0]
    assert_same(both[1], both[0])


def test_changing_a_source_in_place_is_noticed():
    model = adapt(stack(), lora(), notes=True)
    h = model[0](x()) * 1
    loss = model[1].q(model[1].before(h)).sum()
    h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_only_in_blocks_that_are_checkpointed(reentrant, as_it_is, monkeypatch):
    plain, model = (adapt(stack(), lora(), notes) for notes in (False, True))
    expected = run(plain)
    counted = Counted(monkeypatch)
    assert kept(model) == kept(plain)
    counted.calls = 0
    assert_same(run(model), expected)
    assert counted.calls == 4

    model.zero_grad()
    h = model[0](x())
    model[2](checkpoint(model[1], h, use_reentrant=reentrant)).square().sum().backward()
    assert not remake.is_checkpointed()
    for key, grad in gradients(model).items():  # reentrant, gradients are summed in another order
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-4)
    # The checkpointed block's two norms run twice, and, where what its layers keep are notes, once more for these.
    assert counted.calls == 4 + 4 + 2 + (0 if reentrant else 2)


def test_within_hooks_of_others_nothing_is_made_again(as_it_is):
    model = adapt(stack(), lora(), notes=True)
    with torch.autograd.graph.save_on_cpu():
        assert remade(model[1].before(model[0](x()))) is None


@pytest.mark.parametrize("name", ["bert", "gpt2", "distilbert"])
def test_in_transformers_models_and_where_blocks_are_computed_again(name, as_it_is):
    found = []
    for notes, checkpoints in ((False, False), (True, False), (True, True)):
        model = adapt(tiny(name), LoRA(r=2, dropout=0.0, target_modules="all-linear"), notes)
        assert bool(noting(model)) is notes
        if checkpoints:
            checkpoint_activations(model)
        torch.manual_seed(5)
        TINY[name].run(model.train()).square().sum().backward()
        found.append(gradients(model))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


# ---------------------------------------------------------------------------------------------------- the class swap


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_pickles_note_too(make):
    model = adapt(stack(), lora(), notes=True)
    other = make(model)
    assert noting(other) == NOTING and [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert_same(run(other), run(model))


def test_it_comes_and_goes_with_the_adapters_that_use_it(monkeypatch):
    model = stack()
    classes = [type(layer) for layer in model.modules()]
    adapt(model, lora(), notes=True)
    adapt(model, lora(name="other", target_modules="q"), notes=True)
    detach(model, "default")
    assert noting(model) == NOTING
    lit_peft.merge(model)
    assert not noting(model)
    lit_peft.unmerge(model)
    assert noting(model) == NOTING
    detach(model)
    assert [type(layer) for layer in model.modules()] == classes
    monkeypatch.setattr("lit_peft.methods.lora.LoRADelta.fused_from", 1 << 22)
    assert not noting(adapt(stack(), lora(), notes=True))  # small layers keep their input as they always did


def test_a_norm_that_computes_otherwise_notes_nothing():
    class Doubled(nn.LayerNorm):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.LayerNorm):
        pass

    assert not noting(adapt(stack(Doubled), lora(), notes=True))
    model = adapt(stack(Named), lora(), notes=True)
    assert noting(model) == NOTING
    layer = model[1].before
    layer.peft = nn.ModuleDict()  # something stands around it
    assert remade(layer(model[0](x()))) is None
    del layer.peft
    layer.forward = lambda x: F.relu(x)
    note_inputs(model)
    assert noting(model) == NOTING[1:]


def test_compiled_graphs_keep_what_they_choose():
    plain, noted = (adapt(stack(), lora(), notes) for notes in (False, True))
    noted.compile(fullgraph=True, backend="aot_eager")
    expected, found = run(plain), run(noted)
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-5)
