"""The contract that everything stands on: small methods written against it, on every kind of layer.

Each method here is what a user would write. If one needs more than a few lines, the contract is wrong.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from models import inputs, logits, tiny
from packaging.version import Version
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_peft.core.active import set_active
from lit_peft.core.addition import Addition, Call, Delta
from lit_peft.core.attach import detach
from lit_peft.core.registry import registry
from lit_peft.methods.base import TargetedMethod
from lit_peft.methods.dora import DoRA
from lit_peft.methods.hira import HiRA
from lit_peft.methods.lora import LoRA
from lit_peft.testing.conformance import by_equation, perturb
from lit_peft.testing.subjects import IN, LAYERS, OUT, Holder
from lit_peft.testing.subjects import holder as plain_holder
from lit_peft.testing.subjects import layer_input as sample

# ---------------------------------------------------------------------------------------------- methods


class IA3Out(Delta):
    scales = True

    def __init__(self, out: int):
        super().__init__()
        self.l = nn.Parameter(torch.ones(out))

    def weight(self, W):
        return self.l[:, None] * W

    def bias(self, b):
        return None if b is None else self.l * b


class IA3In(Delta):
    scales = True

    def __init__(self, in_: int):
        super().__init__()
        self.l = nn.Parameter(torch.ones(in_))

    def weight(self, W):
        return W * self.l[None, :]


class IA3(TargetedMethod):
    def __init__(self, side: str = "out", **common):
        super().__init__(**common)
        self.side = side

    def build(self, site):
        return IA3Out(site.out_features) if self.side == "out" else IA3In(site.in_features)


class Projections(nn.Module):
    """A module of buffers is what additions share: it stays one when moved or copied, and is never sharded."""

    def __init__(self, r: int, out: int, in_: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("A", torch.randn(r, in_, generator=generator) / r)
        self.register_buffer("B", torch.randn(out, r, generator=generator) / r)


class VeRADelta(Delta):
    def __init__(self, shared: Projections, out: int, in_: int):
        super().__init__()
        self.shared, self.size = shared, (out, in_)
        self.d, self.b = nn.Parameter(torch.full((len(shared.A),), 0.1)), nn.Parameter(torch.zeros(out))

    def weight(self, W):
        out, in_ = self.size
        return W + self.b[:, None] * self.shared.B[:out] @ (self.d[:, None] * self.shared.A[:, :in_])


class VeRA(TargetedMethod):
    def plan(self, sites):
        self.shared = Projections(8, *(max(sizes) for sizes in zip(*(s.size for s in sites), strict=True)))

    def build(self, site):
        return VeRADelta(self.shared, *site.size)


class Adapter(Addition):
    def __init__(self, width: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, 4), nn.Linear(4, width)

    def init(self, site, generator):
        nn.init.normal_(self.down.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, layer, call, x):
        y = call(x)
        return y + self.up(F.relu(self.down(y)))


class Bottleneck(TargetedMethod):
    def build(self, site):
        return Adapter(site.out_features)


DELTAS = {
    "hira": lambda **k: HiRA(r=4, **k),
    "ia3-out": lambda **k: IA3("out", **k),
    "ia3-in": lambda **k: IA3("in", **k),
    "vera": lambda **k: VeRA(**k),
    "lora": lambda **k: LoRA(r=4, dropout=0.0, **k),
}
METHODS = DELTAS | {"bottleneck": lambda **k: Bottleneck(**k)}


# ------------------------------------------------------------------------------------------------ layers


def holder(kind: str, *methods) -> Holder:
    module = plain_holder(kind)
    for method in methods:
        method.attach(module)
    return module


# A bottleneck of linear layers reads the last dimension; a convolution's features are channels.
PAIRS = [(m, k) for m in METHODS for k in LAYERS if not (m == "bottleneck" and k in ("conv2d", "grouped_conv2d"))]


@pytest.mark.parametrize(("method", "kind"), PAIRS)
class TestEveryPair:
    def test_starts_as_the_base_and_follows_the_equation(self, method, kind):
        x = sample(kind)
        base = holder(kind)(x)
        module = holder(kind, METHODS[method](target_modules="layer"))
        torch.testing.assert_close(module(x), base, rtol=1e-5, atol=1e-5)
        perturb(module)
        changed = module(x)
        assert (changed - base).abs().max() > 1e-3
        if method in DELTAS:
            torch.testing.assert_close(changed, by_equation(module, x), rtol=1e-4, atol=1e-5)

    def test_only_the_addition_gets_gradients(self, method, kind):
        module = holder(kind, METHODS[method](target_modules="layer"))
        perturb(module)
        module(sample(kind)).square().sum().backward()
        for name, parameter in module.named_parameters():
            if ".peft." in name and parameter.requires_grad:
                assert parameter.grad is not None and parameter.grad.any(), name
            else:
                assert parameter.grad is None, name

    def test_copies_pickles_and_detaches(self, method, kind):
        x = sample(kind)
        base = holder(kind)(x)
        module = holder(kind, METHODS[method](target_modules="layer"))
        perturb(module)
        expected = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), expected)
            assert type(twin.layer) is type(module.layer)
            perturb(twin)
            assert torch.equal(module(x), expected)  # nothing is shared with the copy
        set_active(module, None)
        assert torch.equal(module(x), base)
        detach(module)
        assert torch.equal(module(x), base)
        assert registry(module) is None
        assert set(module.state_dict()) == set(holder(kind).state_dict())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("method", METHODS)
def test_compiles_without_a_break(method, kind):
    torch._dynamo.reset()
    x = sample(kind)
    module = holder(kind, METHODS[method](target_modules="layer"))
    perturb(module)
    expected = module(x)
    expected.sum().backward()
    gradients = {n: p.grad for n, p in module.named_parameters()}
    module.zero_grad()
    module.compile(fullgraph=True, backend="aot_eager")
    compiled = module(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    compiled.sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", DELTAS)
@pytest.mark.parametrize("second", DELTAS)
@pytest.mark.parametrize("kind", ["linear", "nf4"])
def test_two_methods_on_one_site_compose(first, second, kind):
    scaling = [name for name in (first, second) if name.startswith("ia3")]
    make = [
        DELTAS[first](target_modules="layer", name="one"),
        DELTAS[second](target_modules="layer", name="two"),
    ]
    if len(scaling) == 2:
        with pytest.raises(ValueError, match="both rescale"):
            holder(kind, *make)
        return
    module = holder(kind, *make)
    perturb(module)
    x = sample(kind)
    both = module(x)
    torch.testing.assert_close(both, by_equation(module, x), rtol=1e-4, atol=1e-5)
    set_active(module, ["two", "one"])
    torch.testing.assert_close(module(x), both, rtol=1e-6, atol=1e-6)
    both.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters() if p.requires_grad)


def test_embeddings_that_scale_and_ones_that_look_up_something_else():
    class Scaled(nn.Embedding):  # Gemma's and BART's
        embed_scale = 4.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    class Positions(nn.Embedding):  # BART's: the ids are not what is looked up
        def forward(self, ids):
            return super().forward(torch.arange(ids.shape[1]))

    module, x = Holder(Scaled(IN, OUT)), sample("embedding")
    base = module(x)
    LoRA(r=4, target_modules="layer").attach(module)
    torch.testing.assert_close(module(x), base)
    perturb(module)
    merged = Scaled(IN, OUT)
    merged.weight.data = Call(module.layer, module.layer.peft.chain()).matrix().t()
    torch.testing.assert_close(module(x), merged(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="Positions looks up something else"):
        LoRA(r=4, target_modules="layer").attach(Holder(Positions(IN, OUT)))


def test_a_bottleneck_wraps_a_delta():
    lora = LoRA(r=4, dropout=0.0, target_modules="layer", name="lora")
    module = holder("linear", Bottleneck(target_modules="layer", name="adapter"), lora)
    perturb(module)
    x = sample("linear")
    set_active(module, "lora")
    inner = module(x)
    set_active(module, ["lora", "adapter"])
    addition = module.layer.peft["adapter"]
    torch.testing.assert_close(module(x), inner + addition.up(F.relu(addition.down(inner))))


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_the_fused_function_has_its_flops_counted(method):
    """What Lightning's and others' throughput figures count."""
    flops = []
    for fused in (True, False):
        module = holder("linear", method(r=4, dropout=0.0, target_modules="layer"))
        module.layer.peft["default"].fused_from = 0 if fused else 1 << 62
        with FlopCounterMode(display=False) as counted:
            module(sample("linear").requires_grad_()).sum().backward()
        flops.append(counted.get_total_flops())
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_fused_function_equals_the_formula(kind, autocast, dropout):
    method = LoRA(r=4, dropout=dropout, target_modules="layer", bias="none")
    results = []
    for fused in (True, False):
        module = holder(kind, method)
        perturb(module)
        module.layer.peft["default"].fused_from = 0 if fused else 1 << 62
        x = sample(kind).requires_grad_()
        torch.manual_seed(5)  # the same dropout
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        assert ("LoRAFunction" in type(y.grad_fn).__name__) is fused
        (y.float() ** 2).sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
    for fast, plain in zip(*results, strict=True):
        scale = plain.abs().max().item()
        torch.testing.assert_close(fast, plain, rtol=0, atol=(2e-2 if autocast else 1e-5) * scale)


# ------------------------------------------------------------------------------------------------- prefix


class PrefixTensors(Addition):
    """Keys and values that every query sees first; the attention function below reads them off the module."""

    def __init__(self, n: int, width: int):
        super().__init__()
        self.key, self.value = nn.Parameter(torch.empty(n, width)), nn.Parameter(torch.empty(n, width))

    def init(self, site, generator):
        nn.init.normal_(self.key, generator=generator)
        nn.init.normal_(self.value, generator=generator)


def prefix_attention(module, query, key, value, attention_mask, **kwargs):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for prefix in module.peft.chain() if hasattr(module, "peft") else ():
        n, (batch, heads, _, width) = prefix.key.shape[0], key.shape
        k, v = (t.to(key.dtype).view(n, heads, width).transpose(0, 1) for t in (prefix.key, prefix.value))
        if attention_mask is None:  # all allowed, or causal: build it, since the prefix breaks the square
            q, k_length = query.shape[2], key.shape[2]
            attention_mask = torch.ones(q, k_length, dtype=torch.bool, device=query.device)
            if kwargs.get("is_causal", getattr(module, "is_causal", False)) and q > 1:
                attention_mask = attention_mask.tril(k_length - q)
            attention_mask = attention_mask.expand(batch, 1, q, k_length)
        fill = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask, (n, 0), value=fill)
        if (bias := kwargs.get("position_bias")) is not None:  # T5's relative positions: none for the prefix
            kwargs["position_bias"] = F.pad(bias, (n, 0))
        key = torch.cat([k.expand(batch, -1, -1, -1), key], dim=2)
        value = torch.cat([v.expand(batch, -1, -1, -1), value], dim=2)
        kwargs["is_causal"] = False
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


class Prefix(TargetedMethod):
    layers_only = False

    def plan(self, sites):
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register("contract_prefix", prefix_attention)
        AttentionMaskInterface.register("contract_prefix", sdpa_mask)

    def attach(self, module, dtype=None):
        adapter = super().attach(module, dtype)
        module.set_attn_implementation("contract_prefix")
        return adapter

    def build(self, site):
        return PrefixTensors(3, 8 if "self_attn" in site.path else 16)  # Llama here has one key-value head of 8


ATTENTION = {
    "distilbert": "*.attention",
    "bert": "*.attention.self",
    "roberta": "*.attention.self",
    "gpt2": "*.attn",
    "llama": "*.self_attn",
    "t5": "*Attention",
}


@pytest.mark.parametrize("name", ATTENTION)
def test_prefix_reaches_every_attention(name):
    if name == "t5" and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("T5 reads AttentionInterface from transformers 5.20 on, the lower bound of this package")
    model = tiny(name)
    base = logits(model, name)
    Prefix(target_modules=ATTENTION[name]).attach(model)
    with_prefix = logits(model, name)
    assert (with_prefix - base).abs().max() > 1e-4
    with_prefix.sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, parameter_name
    set_active(model, None)
    torch.testing.assert_close(logits(model, name), base)


def test_prefix_equals_hf_peft():
    """On GPT-2, which reads the key-value cache that HF PEFT prepends through (DistilBERT drops it silently)."""
    from peft import PrefixTuningConfig, get_peft_model

    name = "gpt2"
    model = tiny(name)
    theirs = get_peft_model(copy.deepcopy(model), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    theirs.eval()
    Prefix(target_modules=ATTENTION[name]).attach(model)
    table = theirs.prompt_encoder.default.embedding.weight.detach()  # [3, layers * 2 * width]
    for i, block in enumerate(model.transformer.h):
        block.attn.peft["default"].key.data = table[:, (2 * i) * 16 : (2 * i + 1) * 16]
        block.attn.peft["default"].value.data = table[:, (2 * i + 1) * 16 : (2 * i + 2) * 16]
    batch = inputs(name)
    ours = model(**batch, position_ids=torch.arange(3, 9).expand(2, -1)).logits
    torch.testing.assert_close(ours, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
