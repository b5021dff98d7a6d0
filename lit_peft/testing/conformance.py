"""`MethodConformance`: what every method must hold, on every layer type and architecture that it is for."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lit_peft.core import hf_peft
from lit_peft.core.active import set_active
from lit_peft.core.addition import Delta
from lit_peft.core.attach import detach
from lit_peft.core.layers import layer_ops
from lit_peft.core.merge import Into, merge, unmerge
from lit_peft.core.quantize import make_quantizer, quantize_base, stored_as
from lit_peft.core.registry import registry
from lit_peft.methods.base import Method, TargetedMethod
from lit_peft.methods.lora import LoRA
from lit_peft.saving.folder import load, save
from lit_peft.saving.folder_record import open_folder
from lit_peft.testing.compiling import assert_compiles
from lit_peft.testing.fits import assert_resumes_exactly, assert_two_ranks_equal_one
from lit_peft.testing.states import assert_same, by_equation, perturb, same_bits, snapshot
from lit_peft.testing.subjects import LAYERS, MODELS, Model, holder, layer_input

# Why a check runs on nothing.
_NONE = {
    "model": "it is for none of the models.",
    "layer": "it adds nothing to single layers.",
    "refused": "it refuses none of the models.",
}
_NO_EQUATION = "it adds a computation and has no equation of a weight."
# Words of the sentence with which saving is refused -> why.
_NO_FOLDER = {
    "trains every parameter": "all of the model trains, so that there is no adapter.",
    "HF PEFT": "HF PEFT has no form for one of the layers or parameters.",
}


class MethodConformance:
    """The suite, which pytest runs for each subclass that names a method.

        class TestMine(MethodConformance):
            method = Mine(r=2)

    Attributes:
        method: The method, with arguments that suit models of width 16. Give it no dropout: both modes are compared.
        layers: Layer types, of `LAYERS`, whose weight it changes; for methods with `target_modules`.
        models: Models, of `MODELS`, that it is for.
        refuses: Model -> words of the sentence that says why it is not for this one.
        starts_as_base: Whether training starts from the base's outputs.
        refuses_shards: Words of the sentence that says why it does not train sharded parameters, if it does not.
    """

    method: ClassVar[Method]
    layers: ClassVar[tuple[str, ...]] = tuple(LAYERS)
    models: ClassVar[tuple[str, ...]] = tuple(MODELS)
    refuses: ClassVar[dict[str, str]] = {}
    starts_as_base: ClassVar[bool] = True
    refuses_shards: ClassVar[str] = ""

    def count(self, out_features: int, in_features: int) -> int:
        """The formula that the method's docstring gives: parameters that it adds to a layer of this size."""
        raise NotImplementedError(f"{type(self).__name__} must say how many parameters its method adds to a layer.")

    def total(self, model: Model, module: nn.Module) -> int:
        """The same for a model, of which `module` is one with the method attached; by default the sum over layers."""
        layers = [module.get_submodule(path) for path in registry(module).adapters["default"].sites]  # type: ignore[union-attr]
        return sum(self.count(*layer_ops(layer).size(layer)) for layer in layers)

    # --------------------------------------------------------------------------------------------- helpers

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Runs a test for each layer type or model that it asks for."""
        for fixture, names in self.cases().items():
            if fixture in metafunc.fixturenames:
                metafunc.parametrize(fixture, names or [pytest.param(None, marks=pytest.mark.skip(_NONE[fixture]))])

    @classmethod
    def cases(cls) -> dict[str, tuple[str, ...]]:
        """What the tests run on, by the name of their argument."""
        at_layers = isinstance(cls.method, TargetedMethod) and cls.method.layers_only
        return {"model": cls.models, "layer": cls.layers if at_layers else (), "refused": tuple(cls.refuses)}

    def make(self, model: Model | None = None, **changes: Any) -> Method:
        """The method with other arguments, and with the targets that a model without known roles needs."""
        if model is not None and model.targets is not None and "target_modules" in self.method.parameters():
            changes.setdefault("target_modules", list(model.targets))
        return type(self.method)(**self.method.arguments() | changes)

    def base(self, model: Model, seed: int = 0) -> nn.Module:
        """What the method stands on: the model, in fewer bits where the method quantises."""
        module, quantize = model.build(seed), self.method.base_storage()
        if quantize is not None:
            quantize_base(module, make_quantizer(quantize))
        return module

    def attached(self, model: str, **changes: Any) -> tuple[Model, nn.Module]:
        """A model of that name with the method attached."""
        found = MODELS[model]
        module = found.build()
        self.make(found, **changes).attach(module)
        return found, module

    def on_layer(self, layer: str, **changes: Any) -> nn.Module:
        """A module whose one layer the method is attached to, off its starting values."""
        module = holder(layer)
        self.make(target_modules=["layer"], **changes).attach(module)
        perturb(module)
        return module

    # ---------------------------------------------------------------------------------------- on every model

    def test_starts_as_the_base(self, model: str) -> None:
        """Outputs are the base's when training starts."""
        found, module = self.attached(model)
        base, started = found.evaluate(self.base(found)), found.evaluate(module)
        assert started.shape == base.shape
        if not self.starts_as_base:
            pytest.skip("it declares that it starts elsewhere.")
        torch.testing.assert_close(started, base, rtol=1e-5, atol=1e-5)

    def test_keeps_the_keys_of_the_base(self, model: str) -> None:
        """The state dict has the base's keys under their names, in their order, and a checkpoint of the base loads."""
        found, module = self.attached(model)
        base = self.base(found, seed=1).state_dict()
        assert [key for key in module.state_dict() if ".peft." not in f".{key}"] == list(base)
        missing, unknown = module.load_state_dict(base, strict=False)
        assert not unknown and all(".peft." in f".{key}" for key in missing)
        assert all(same_bits(module.state_dict()[key], value) for key, value in base.items())

    def test_trains_what_it_says_and_nothing_else(self, model: str) -> None:
        """Each trainable tensor gets a gradient, starting values of zero perturbed, and no frozen one does."""
        found, module = self.attached(model)
        state, method = registry(module), self.make(found)
        assert state is not None
        assert {name for name, p in module.named_parameters() if p.requires_grad} == state.trainable_names()
        perturb(module)
        module.train()
        found.run(module).square().sum().backward()
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, f"{name} is frozen and got a gradient"
            elif not method.lacks_gradient(name):
                assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient"

    def test_trains_as_many_parameters_as_it_says(self, model: str) -> None:
        """The formula that the method's docstring gives equals the count of trainable parameters."""
        found, module = self.attached(model)
        assert sum(p.numel() for p in module.parameters() if p.requires_grad) == self.total(found, module)

    def test_changes_the_outputs_in_both_modes(self, model: str) -> None:
        """It has a visible effect in train and in eval mode, and a forward pass moves nothing that is frozen."""
        found, module = self.attached(model)
        base, frozen = found.evaluate(self.base(found)), snapshot(module)
        perturb(module)
        assert (found.evaluate(module.train(False)) - base).abs().max() > 1e-6
        seeded = []
        for each in (module, self.base(found)):
            torch.manual_seed(4)  # the same dropout
            seeded.append(found.evaluate(each.train()))
        assert (seeded[0] - seeded[1]).abs().max() > 1e-6
        trainable = {name for name, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
        buffers = {name for name, _ in module.named_buffers()}
        for name, value in module.state_dict().items():
            assert name in trainable | buffers or same_bits(value, frozen[name]), f"{name} is frozen and moved"

    def test_stands_beside_a_lora(self, model: str) -> None:
        """A LoRA on the model leaves it as it is: both train, both show in the outputs, either one goes alone."""
        found, module = self.attached(model)
        method, own = self.make(found), registry(module).trainable_names()  # type: ignore[union-attr]
        perturb(module)
        alone = found.evaluate(module)
        lora = LoRA(r=2, dropout=0.0, target_modules=found.targets, name="other")
        lora.attach(module)
        torch.testing.assert_close(found.evaluate(module), alone, rtol=1e-5, atol=1e-5)
        perturb(module, only=".other.")
        trainable = {name for name, p in module.named_parameters() if p.requires_grad}
        assert own < trainable and all(".peft.other." in name for name in trainable - own)
        found.run(module).square().sum().backward()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and not method.lacks_gradient(name):
                assert parameter.grad is not None and parameter.grad.any(), f"{name} got no gradient"
        assert (found.evaluate(module) - alone).abs().max() > 1e-6
        lora.detach(module)
        assert torch.equal(found.evaluate(module), alone)
        assert {name for name, p in module.named_parameters() if p.requires_grad} == own

    def test_merges_and_unmerges(self, model: str) -> None:
        """Merging gives the plain model's keys and classes and the same outputs; unmerging restores every bit.

        So does what is merged into a base of fewer bits and quantised again, which is another model meanwhile.
        """
        found, module = self.attached(model)
        perturb(module)
        adapted, before, quantised = found.evaluate(module), snapshot(module), stored_as(module)
        into: Into | None = "dequantized" if quantised else None
        if any(getattr(child, "not_mergeable", None) for child in module.modules()):
            with pytest.raises(ValueError, match="cannot be merged: ") as caught:
                merge(module, into=into)
            assert_same(snapshot(module), before)
            pytest.skip(f"merging is refused: {str(caught.value).partition(': ')[2]}")
        merge(module, into=into)
        plain = found.build()
        assert list(module.state_dict()) == list(plain.state_dict())
        assert {type(child) for child in module.modules()} == {type(child) for child in plain.modules()}
        torch.testing.assert_close(found.evaluate(module), adapted, rtol=1e-4, atol=1e-5)
        unmerge(module)
        assert_same(snapshot(module), before)
        assert torch.equal(found.evaluate(module), adapted)
        if quantised:
            merge(module, into="requantized")
            assert stored_as(module) == quantised
            unmerge(module)
            assert_same(snapshot(module), before)
            assert torch.equal(found.evaluate(module), adapted)

    def test_saves_and_loads_a_folder(self, model: str, tmp_path: Path) -> None:
        """The folder holds nothing frozen but a head, as HF PEFT's; a fresh base that loads it gives the same bits."""
        found, module = self.attached(model)
        perturb(module)
        try:
            folder = save(module, tmp_path / "adapter")
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            for words, why in _NO_FOLDER.items():
                if words in str(error):
                    pytest.skip(f"saving is refused: {why}")
            raise
        config, tensors, _ = open_folder(folder)
        base, _ = hf_peft.split(module, config, tensors)
        heads = hf_peft.modules_to_save(module, {name for names in hf_peft.HEADS.values() for name in names})
        frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
        assert all(hf_peft.is_inside(name, heads) for name in frozen & base.keys())
        other = found.build()
        load(other, folder)
        assert torch.equal(found.evaluate(other), found.evaluate(module))
        assert {n for n, p in other.named_parameters() if p.requires_grad} == registry(module).trainable_names()  # type: ignore[union-attr]

    def test_detaches_and_switches_off(self, model: str) -> None:
        """Switched off or detached, the module computes what the base does; detached, it is the base."""
        found, module = self.attached(model)
        plain = self.base(found)
        base = found.evaluate(plain)
        perturb(module)
        if not registry(module).adapters["default"].base:  # type: ignore[union-attr]
            set_active(module, None)
            assert torch.equal(found.evaluate(module), base)
        detach(module)
        assert registry(module) is None
        assert torch.equal(found.evaluate(module), base) or not self.method.keep_originals
        assert {type(child) for child in module.modules()} == {type(child) for child in plain.modules()}
        if self.method.keep_originals:
            assert_same(snapshot(module), snapshot(plain))

    def test_copies_and_pickles(self, model: str) -> None:
        """`deepcopy` and `pickle` give the same outputs and share no tensor with the original."""
        found, module = self.attached(model)
        perturb(module)
        adapted = found.evaluate(module)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(found.evaluate(twin), adapted)
            perturb(twin)
            assert torch.equal(found.evaluate(module), adapted), "the copy shares a tensor with the original"

    def test_computes_in_the_dtype_of_the_base(self, model: str) -> None:
        """Outputs in float32, under bfloat16 autocast and of a bfloat16 base agree; what trains stays float32."""
        found, module = self.attached(model)
        perturb(module)
        expected = found.evaluate(module)
        scale = expected.abs().max().item()
        with torch.autocast("cpu", torch.bfloat16):
            mixed = found.evaluate(module)
        assert (mixed.float() - expected).abs().max() < 0.1 * scale
        small = self.base(found).to(torch.bfloat16)
        self.make(found).attach(small)
        perturb(small)
        assert {p.dtype for p in small.parameters() if p.requires_grad} == {torch.float32}
        changes = {k: v.to(torch.bfloat16) for k, v in found.inputs().items() if v.is_floating_point()}
        output = found.evaluate(small, **changes)
        assert output.dtype == torch.bfloat16
        assert (output.float() - expected).abs().max() < 0.2 * scale

    def test_says_why_it_is_not_for(self, refused: str) -> None:
        """A model that it is not for is refused in one sentence and left as it was."""
        found = MODELS[refused]
        module = found.build()
        before = snapshot(module)
        with pytest.raises(ValueError, match=self.refuses[refused]) as caught:
            self.make(found).attach(module)
        assert len(str(caught.value).splitlines()) == 1
        assert_same(snapshot(module), before)
        assert registry(module) is None

    # ----------------------------------------------------------------------------------- on every layer type

    def test_the_fast_path_equals_the_equation(self, layer: str) -> None:
        """The forward pass gives what the layer gives with the weight of the method's equation."""
        module, x = self.on_layer(layer), layer_input(layer)
        child: Any = module.layer
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                changed = module(x)
            assert (changed - holder(layer)(x)).abs().max() > 1e-3
            if isinstance(child.peft["default"], Delta):
                torch.testing.assert_close(changed, by_equation(module, x), rtol=1e-4, atol=1e-5)
        if not isinstance(child.peft["default"], Delta):
            pytest.skip(_NO_EQUATION)

    def test_gradients_are_those_of_the_equation(self, layer: str) -> None:
        """So do the gradients, of every trainable tensor and of the input."""
        module: Any = self.on_layer(layer)
        if not isinstance(module.layer.peft["default"], Delta):
            pytest.skip(_NO_EQUATION)
        results = []
        for compute in (module, partial(by_equation, module)):
            module.zero_grad()
            x = layer_input(layer)
            x.requires_grad_(x.is_floating_point())
            compute(x).square().sum().backward()
            results.append([p.grad for p in module.parameters() if p.requires_grad] + [x.grad] * x.requires_grad)
        for fast, slow in zip(*results, strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-4 * slow.abs().max().item())

    def test_adds_as_many_parameters_as_it_says(self, layer: str) -> None:
        """The formula for one layer equals the count of the parameters that it adds."""
        child: Any = self.on_layer(layer).layer
        found = sum(p.numel() for p in child.peft["default"].parameters() if p.requires_grad)
        assert found == self.count(*layer_ops(child).size(child))

    def test_composes_with_lora(self, layer: str) -> None:
        """A LoRA's change of the same weight adds to its own, or is scaled by it, in either order, and both train."""
        module, x = self.on_layer(layer), layer_input(layer)
        LoRA(r=2, dropout=0.0, target_modules="layer", name="other").attach(module)
        perturb(module)
        set_active(module, ["default", "other"])
        both = module(x)
        child: Any = module.layer
        own, other, ops = child.peft["default"], child.peft["other"], layer_ops(child)
        if isinstance(own, Delta):
            W, b = ops.matrix(child), own.bias(ops.bias(child))
            V = own.weight(other.weight(W)) if own.scales else own.weight(W) + other.weight(W) - W
            atol = 1e-5 * max(1.0, both.abs().max().item())  # terms of that size may cancel
            torch.testing.assert_close(both, ops.apply(child, x, V, b), rtol=1e-4, atol=atol)
        if getattr(own, "scales", False):
            with pytest.raises(ValueError, match="both rescale this weight"):
                self.make(target_modules=["layer"], name="third").attach(module)
        set_active(module, ["other", "default"])
        torch.testing.assert_close(module(x), both, rtol=1e-5, atol=1e-6)
        both.square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)
        set_active(module, "default")
        assert (module(x) - both).abs().max() > 1e-4

    def test_merges_into_the_layer(self, layer: str) -> None:
        """Merged into the layer, dequantised where it was quantised, the same outputs; unmerged, the same bits."""
        module, x = self.on_layer(layer), layer_input(layer)
        child: Any = module.layer
        if child.peft["default"].not_mergeable is not None:
            with pytest.raises(ValueError, match="layer cannot be merged: ") as caught:
                merge(module)
            pytest.skip(f"merging is refused: {str(caught.value).partition(': ')[2]}")
        adapted = module(x)
        merge(module, into="dequantized" if layer_ops(child).quantization(child) else None)
        torch.testing.assert_close(module(x), adapted, rtol=1e-4, atol=1e-5)
        unmerge(module)
        assert torch.equal(module(x), adapted)

    # ------------------------------------------------------------------------------------------ once a method

    def test_compiles_without_more_breaks(self) -> None:
        """torch.compile makes one graph of the model (`aot_eager`), whose outputs and gradients are eager's."""
        assert_compiles(*self.attached(self.models[0]), "aot_eager")

    def test_trains_and_resumes_exactly(self, tmp_path: Path) -> None:
        """A fit by Lightning's trainer saves it alone; resumed, it ends bit for bit where an uninterrupted one does."""
        found = MODELS[self.models[0]]
        assert_resumes_exactly([self.make(found), self.make(found)], found, tmp_path)

    # --------------------------------------------------------------------------------- the slow tier, `-m slow`

    @pytest.mark.slow
    def test_compiles_every_model(self, model: str) -> None:
        """torch.compile makes one graph of each model (`aot_eager`), whose outputs and gradients are eager's."""
        assert_compiles(*self.attached(model), "aot_eager")

    @pytest.mark.slow
    def test_inductor_computes_the_same(self) -> None:
        """Compiled by inductor, outputs and gradients are eager's to rtol 1e-4 and 1e-3."""
        assert_compiles(*self.attached(self.models[0]), "inductor")

    @pytest.mark.slow
    def test_ddp_equals_one_process(self) -> None:
        """Fitted under DDP, two ranks end with equal bits, those of one process at twice the batch to 1e-5."""
        found = self._distributed()
        assert_two_ranks_equal_one(self.make(found), found, sharded=False)

    @pytest.mark.slow
    def test_fsdp2_equals_one_process(self) -> None:
        """The same under FSDP2, with each block of the model sharded."""
        found = self._distributed()
        if not self.refuses_shards:
            assert_two_ranks_equal_one(self.make(found), found, sharded=True)
            return
        with pytest.raises(RuntimeError, match=self.refuses_shards):
            assert_two_ranks_equal_one(self.make(found), found, sharded=True)
        pytest.skip(f"sharding is refused: {self.refuses_shards}.")

    def _distributed(self) -> Model:
        """A model with blocks to shard where the method is for one."""
        return MODELS["distilbert" if "distilbert" in self.models else self.models[0]]
