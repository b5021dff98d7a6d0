"""Bottleneck adapters against hand-written ones: numpy on an MLP, torch hooks and blocks on the architectures."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import inputs, logits, tiny
from torch import nn
from torch.utils.checkpoint import checkpoint

import lit_peft
from lit_peft import BottleneckAdapter, LoRA
from lit_peft.core.active import set_active
from lit_peft.core.passing import InputReader
from lit_peft.core.registry import registry
from lit_peft.testing.conformance import perturb

ARCHITECTURES = ["distilbert", "bert", "roberta", "gpt2", "llama", "t5"]
# Path endings after which each placement stands, written out by hand.
OUTPUTS = {
    "distilbert": ["attention.out_lin"],
    "bert": ["attention.output.dense"],
    "roberta": ["attention.output.dense"],
    "gpt2": ["attn.c_proj"],
    "llama": ["self_attn.o_proj"],
    "t5": ["SelfAttention.o", "EncDecAttention.o"],
}
DOWNS = {
    "distilbert": r"ffn.lin2",
    "bert": r"[0-9].output.dense",
    "roberta": r"[0-9].output.dense",
    "gpt2": "mlp.c_proj",
    "llama": "mlp.down_proj",
    "t5": "DenseReluDense.wo",
}


def adapter(**arguments) -> BottleneckAdapter:
    return BottleneckAdapter(**{"reduction_factor": 4} | arguments)


def carrying(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> the addition with parameters there."""
    return {
        path: model.get_submodule(path).peft["default"]
        for path, tensors in registry(model).adapters["default"].sites.items()
        if tensors
    }


def by_hand(addition, z: torch.Tensor, f=F.silu) -> torch.Tensor:
    """`f(z W_down^T + b_down) W_up^T + b_up`, from the tensors alone."""
    return f(z @ addition.down_weight.T + addition.down_bias) @ addition.up_weight.T + addition.up_bias


# ------------------------------------------------------------------------------------------------ the equation


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


NUMPY = {
    "relu": lambda h: np.maximum(h, 0),
    "gelu": lambda h: h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2))),
    "silu": lambda h: h / (1 + np.exp(-h)),
    "tanh": np.tanh,
}


@pytest.mark.parametrize("activation", NUMPY)
@pytest.mark.parametrize(("placement", "scale"), [("houlsby", None), ("pfeiffer", 0.5), ("parallel", None)])
def test_an_mlp_equals_numpy(placement, scale, activation):
    module = MLP()
    targets = ["first", "second"]
    adapter(placement=placement, activation=activation, scale=scale, target_modules=targets, reduction_factor=3).attach(
        module
    )
    perturb(module)
    t = {name: p.detach().double().numpy() for name, p in module.named_parameters()}
    x = torch.randn(5, 6)
    s = scale or (4.0 if placement == "parallel" else 1.0)

    def layer(name, z):
        y = z @ t[f"{name}.weight"].T + t[f"{name}.bias"]
        own = f"{name}.peft.default"
        read = z if placement == "parallel" else y
        h = NUMPY[activation](read @ t[f"{own}.down_weight"].T + t[f"{own}.down_bias"])
        return y + s * (h @ t[f"{own}.up_weight"].T + t[f"{own}.up_bias"])

    expected = layer("second", np.tanh(layer("first", x.double().numpy())))
    np.testing.assert_allclose(module(x).detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    widths = [6 // 3, 12 // 3] if placement == "parallel" else [12 // 3, 8 // 3]
    assert [len(a.down_weight) for a in carrying(module).values()] == widths


def test_one_step_of_training_equals_numpy():
    """Gradients of a series adapter with relu, derived by hand."""
    module = nn.Sequential(nn.Linear(6, 8))
    adapter(activation="relu", scale=0.7, target_modules="0").attach(module)
    perturb(module)
    own = module[0].peft["default"]
    t = {name: p.detach().double().numpy() for name, p in own.named_parameters()}
    x = torch.randn(5, 6)
    y = module[0].weight.double() @ x.T.double() + module[0].bias.double()[:, None]
    y = y.T.detach().numpy()
    a = y @ t["down_weight"].T + t["down_bias"]
    h = np.maximum(a, 0)
    out = y + 0.7 * (h @ t["up_weight"].T + t["up_bias"])
    d = 2 * out * 0.7
    da = (d @ t["up_weight"]) * (a > 0)
    step = {"up_weight": d.T @ h, "up_bias": d.sum(0), "down_weight": da.T @ y, "down_bias": da.sum(0)}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    module(x).square().sum().backward()
    optimizer.step()
    for name, value in own.named_parameters():
        np.testing.assert_allclose(value.detach().numpy(), t[name] - 0.1 * step[name], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- on architectures


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_series_adapters_equal_hooks(name, placement):
    model, plain = tiny(name), tiny(name)
    base = evaluate(plain, name)
    adapter(placement=placement).attach(model)
    torch.testing.assert_close(evaluate(model, name), base, rtol=0, atol=0)  # starts at the base, exactly
    perturb(model)
    endings = [*(OUTPUTS[name] if placement == "houlsby" else ()), DOWNS[name].removeprefix("[0-9].")]
    where = [
        path
        for path, _ in plain.named_modules()
        if any(path.endswith("." + ending) for ending in endings)
        and (placement == "houlsby" or "attention.output" not in path)
    ]
    assert list(carrying(model)) == where
    for path, own in carrying(model).items():
        plain.get_submodule(path).register_forward_hook(lambda m, args, out, own=own: out + by_hand(own, out))
    changed = logits(model, name)
    torch.testing.assert_close(changed, logits(plain, name), rtol=1e-5, atol=1e-6)
    assert (changed - base).abs().max() > 1e-3


def network_of_bert(block: nn.Module, addition: nn.Module):
    """BERT's feed-forward network with the adapter beside it, before the residual sum."""

    def chunk(x):
        out = block.output
        y = out.dense(block.intermediate(x)) + 4 * by_hand(addition, x)
        return out.LayerNorm(out.dropout(y) + x)

    return chunk


def parallel_by_hand(name: str, plain: nn.Module, own: dict[str, nn.Module]) -> None:
    """Puts the adapters beside whole feed-forward networks, where a block has one as a module, or into its block."""
    for path, addition in own.items():
        if name in ("bert", "roberta"):
            block = plain.get_submodule(path.removesuffix(".output.dense"))
            block.feed_forward_chunk = network_of_bert(block, addition)
        else:
            network = plain.get_submodule(path.rpartition(".")[0])
            network.register_forward_hook(lambda m, args, out, own=addition: out + 4 * by_hand(own, args[0]))


@torch.no_grad()
def evaluate(model: nn.Module, name: str) -> torch.Tensor:
    """The logits; whether gradients are asked for decides which kernel attention takes."""
    return logits(model, name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parallel_adapters_equal_whole_networks(name):
    model, plain = tiny(name), tiny(name)
    base = evaluate(plain, name)
    adapter(placement="parallel").attach(model)
    torch.testing.assert_close(evaluate(model, name), base, rtol=0, atol=0)
    perturb(model)
    parallel_by_hand(name, plain, carrying(model))
    changed = logits(model, name)
    torch.testing.assert_close(changed, logits(plain, name), rtol=1e-5, atol=1e-6)
    assert (changed - base).abs().max() > 1e-3
    changed.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    blocks = 4 if name == "t5" else 2  # encoder and decoder
    readers = [m for m in model.modules() if isinstance(m, InputReader)]
    assert len(readers) == len(carrying(model)) == blocks and not any(r.passed._held for r in readers)


def test_a_transformer_encoder_has_no_network_as_a_module():
    """`nn.TransformerEncoderLayer`, whose fast path in evaluation would call neither projection."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 3, 16)
    base = model(x)
    adapter(placement="parallel").attach(model)
    torch.testing.assert_close(model(x), base, rtol=1e-5, atol=1e-5)
    perturb(model)
    with torch.no_grad():
        fast = model(x)
    model.train()
    torch.testing.assert_close(model(x), fast, rtol=1e-5, atol=1e-5)
    assert (fast - base).abs().max() > 1e-3


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_a_whole_bert_compiles_and_checkpoints(placement):
    torch._dynamo.reset()
    results = []
    for how in ("plain", "compiled", "checkpointed"):
        model = tiny("bert")
        adapter(placement=placement).attach(model)
        perturb(model)
        if how == "compiled":
            model.compile(fullgraph=True, backend="aot_eager")
        elif how == "checkpointed":
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
            model.config.use_cache = False
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        out = logits(model, "bert")
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters() if p.requires_grad)])
    for other in results[1:]:
        for mine, plain in zip(other, results[0], strict=True):
            torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)


def test_a_network_that_runs_in_chunks():
    model = tiny("bert")
    adapter(placement="parallel").attach(model)
    perturb(model)
    whole = logits(model, "bert")
    for block in model.bert.encoder.layer:
        block.chunk_size_feed_forward = 2
    torch.testing.assert_close(logits(model, "bert"), whole, rtol=1e-5, atol=1e-6)


def test_checkpointing_one_network_alone():
    model = tiny("distilbert")
    adapter(placement="parallel").attach(model)
    perturb(model)
    network = model.distilbert.transformer.layer[0].ffn
    x = torch.randn(2, 3, 16)
    gradients = []
    for run in (network, lambda z: checkpoint(network, z, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad for p in network.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_threads_do_not_read_each_others_inputs():
    """Two forward passes of one model that meet between the two projections."""
    model = tiny("distilbert").distilbert.transformer.layer[0].ffn
    adapter(placement="parallel", target_modules="lin2").attach(model)
    perturb(model)
    xs = [torch.randn(3, 16), torch.randn(3, 16)]
    expected = [model(x) for x in xs]
    meeting = threading.Barrier(2, timeout=20)
    model.lin1.register_forward_hook(lambda *_: (meeting.wait(), None)[1])
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: model(xs[i])})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(2))


def test_with_lora_below_and_several_adapters_on_one_site():
    model = tiny("bert")
    LoRA(r=2, dropout=0.0, target_modules="ffn", name="lora").attach(model)
    adapter(placement="parallel", name="one").attach(model)
    adapter(placement="pfeiffer", name="two").attach(model)
    perturb(model)
    layer = model.bert.encoder.layer[0]
    x = torch.randn(2, 3, 16)
    set_active(model, "lora")
    y = layer.output.dense(layer.intermediate(x))
    set_active(model, ["two", "one", "lora"])
    one, two = layer.output.dense.peft["one"], layer.output.dense.peft["two"]
    expected = y + by_hand(two, y) + 4 * by_hand(one, x)  # in the order given, LoRA inside
    torch.testing.assert_close(layer.output.dense(layer.intermediate(x)), expected)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_a_saved_adapter_loads_exactly(placement, tmp_path):
    model = tiny("bert")
    base = copy.deepcopy(model)
    adapter(placement=placement, activation="gelu", train_also=["classifier"]).attach(model)
    perturb(model)
    lit_peft.save(model, tmp_path / "a")
    loaded = lit_peft.load(base, tmp_path / "a")
    assert torch.equal(logits(base, "bert"), logits(model, "bert"))
    assert loaded.sites == registry(model).adapters["default"].sites


# ---------------------------------------------------------------------------------------- sites and arguments


@pytest.mark.parametrize(
    ("placement", "count"),
    [
        # 12 layers, width 768, bottleneck 48: 2 x 768 x 48 + 48 + 768 a site
        ("houlsby", 12 * 2 * 74_544),
        ("pfeiffer", 12 * 74_544),
        ("parallel", 12 * 74_544),
    ],
)
def test_counts_of_full_size(placement, count):
    import transformers as tf

    with torch.device("meta"):
        model = tf.BertForSequenceClassification(tf.BertConfig())
    BottleneckAdapter(placement).attach(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_where_they_stand_can_be_chosen():
    model = tiny("bert")
    adapter(placement="houlsby", layers=[1], exclude_modules="output").attach(model)
    assert list(carrying(model)) == ["bert.encoder.layer.1.output.dense"]
    model = tiny("llama")
    adapter(placement="parallel", target_modules=["query", "down_proj"], layers=[0]).attach(model)
    assert {path: a.down_weight.shape[1] for path, a in carrying(model).items()} == {
        "model.layers.0.self_attn.q_proj": 16,
        "model.layers.0.mlp.down_proj": 16,  # what the network reads, not the 32 of the projection
    }
    model = tiny("llama")
    adapter(placement="parallel", target_modules=["up_proj", "down_proj"], layers=[0]).attach(model)
    widths = {path.rpartition(".")[2]: a.down_weight.shape[1] for path, a in carrying(model).items()}
    assert widths == {"up_proj": 16, "down_proj": 32}  # both were named: each beside itself


def lonely() -> nn.Module:
    return nn.ModuleDict({"mlp": nn.ModuleDict({"fc2": nn.Linear(8, 8)})})


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (MLP, {}, "^target_modules: 'ffn_down' matches no layer of MLP. Roles here: none, name the layers: "),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 2, 2)),
            {"target_modules": "0"},
            "^0 is a Conv2d, whose features are channels, .* use LoRA",
        ),
        (
            lambda: nn.Sequential(nn.Embedding(4, 8)),
            {"target_modules": "0", "placement": "parallel"},
            "^placement parallel: 0 is a Embedding, whose input is no vector; use pfeiffer",
        ),
        (lonely, {"placement": "parallel"}, "^placement parallel: mlp.fc2 has no up projection .* use pfeiffer"),
        (
            MLP,
            {"target_modules": "second", "reduction_factor": 9},
            "^reduction_factor = 9 leaves no bottleneck of the 8 features of second.$",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, arguments, message):
    module = make()
    with pytest.raises(ValueError, match=message):
        adapter(**arguments).attach(module)
    assert registry(module) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"placement": "series"}, "^placement must be houlsby, pfeiffer or parallel, not 'series'"),
        ({"activation": "swish"}, "^activation must be relu, gelu, silu or tanh, not 'swish'"),
        ({"reduction_factor": 0.5}, "^reduction_factor must be at least 1, not 0.5"),
        ({"reduction_factor": math.nan}, "^reduction_factor must be at least 1, not nan"),
        ({"scale": 0.0}, "^scale must be a number above 0, not 0.0"),
        ({"scale": math.inf}, "^scale must be a number above 0, not inf"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        BottleneckAdapter(**arguments)


def test_a_down_projection_that_runs_alone_says_so():
    model = tiny("distilbert")
    adapter(placement="parallel").attach(model)
    with pytest.raises(RuntimeError, match="lin2 ran without the up projection before it"):
        model.distilbert.transformer.layer[0].ffn.lin2(torch.randn(1, 32))


def test_a_dead_bottleneck_of_relus_still_trains_on():
    """Its down projection has no gradient, which must not end the fit."""
    method = adapter(activation="relu")
    assert method.lacks_gradient("a.peft.default.down_weight") and not method.lacks_gradient("a.peft.default.up_bias")
    assert not adapter().lacks_gradient("a.peft.default.down_weight")


def test_generation_uses_the_adapter():
    model = tiny("gpt2")
    adapter(placement="parallel").attach(model)
    perturb(model)
    ids = inputs("gpt2")["input_ids"][:1]
    cached = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(cached, ids)
