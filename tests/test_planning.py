"""Memory before the run: sizes by real layers, parts by arithmetic, activations by what autograd keeps."""

import copy

import bitsandbytes as bnb
import pytest
import torch
import transformers
from torch import nn

import lit_peft
from lit_peft.core.layers import layer_ops
from lit_peft.core.quantize import make_quantizer
from lit_peft.methods import BitFit, DoRA, FullFineTuning, HiRA, LoRA, QLoRA
from lit_peft.planning import plan
from lit_peft.planning.gpus import CONTEXT, gpu_bytes
from lit_peft.planning.live import allocated
from lit_peft.training.checkpointing import checkpoint_activations

SHAPES = [(64, 64), (48, 80), (33, 65), (257, 129), (512, 100)]
FOUR_BIT = [
    {"mode": mode, "double_quant": double, "block_size": block, "storage_dtype": storage}
    for mode, double, block, storage in [
        ("nf4", True, 64, "uint8"),
        ("nf4", False, 64, "uint8"),
        ("fp4", True, 128, "uint8"),
        ("nf4", True, 64, "bfloat16"),
        ("fp4", False, 32, "float32"),
        ("nf4", True, 4096, "float16"),
    ]
]
MODES = [*FOUR_BIT, {"mode": "int8"}]


def fits(options, shape):
    """bitsandbytes stores an odd number of codes in bytes alone."""
    return options.get("storage_dtype", "uint8") == "uint8" or shape[0] * shape[1] % 8 == 0


def nbytes(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("options, shape", [(o, s) for o in MODES for s in SHAPES if fits(o, s)])
def test_a_quantised_layer_takes_what_size_says_with_values_and_without(options, shape, device):
    quantizer, (out, n) = make_quantizer(options), shape
    layer = nn.Linear(n, out, device=device)
    quantizer.quantize(layer, torch.device(device))
    codes, *constants = layer_ops(layer).stored(layer)
    assert codes.device.type == device
    assert (nbytes([codes]), nbytes(constants)) == tuple(quantizer.size(out, n))


def llama(layers=2, width=128, vocabulary=1000, dtype=torch.bfloat16, **config):
    with torch.device("meta"):
        return (
            transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=vocabulary,
                    hidden_size=width,
                    intermediate_size=3 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    use_cache=False,
                    **config,
                )
            )
            .to(dtype)
            .train()
        )


def texts(batch=2, length=64, **more):
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    return {"input_ids": ids, "labels": ids, **more}


def test_the_parts_of_lora_are_the_arithmetic():
    model = llama()
    found = plan(model, LoRA(r=4, target_modules="all-linear"), texts())
    frozen = sum(allocated(2 * p.numel()) for p in model.parameters())
    buffers = sum(allocated(4 * b.numel()) for b in model.buffers())
    adapters = sum(
        allocated(16 * layer.in_features) + allocated(16 * layer.out_features)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and path != "lm_head"
    )
    assert (found.base, found.constants) == (frozen + buffers, 0)
    assert (found.adapters, found.gradients, found.optimizer) == (adapters, adapters, 2 * adapters)
    assert found.static + found.activations <= found.peak <= found.total


def test_a_method_is_planned_beside_what_is_attached_already():
    model, alone = llama(), plan(llama(), LoRA(r=4), texts())
    LoRA(r=4, name="first").attach(model)
    assert plan(model, None, texts()).gradients == alone.gradients
    assert plan(model, LoRA(r=4), texts()).gradients == 2 * alone.gradients
    with pytest.raises(ValueError, match="'first'"):
        plan(model, LoRA(r=4, name="first"), texts())


def test_activations_are_those_alone():
    """However much larger the weights are."""
    found = plan(llama(width=1024), LoRA(r=4, target_modules="all-linear"), texts(batch=1, length=8))
    assert 0 < found.activations < 0.2 * found.base


def test_four_bit_leaves_activations_and_shrinks_the_base():
    plain, four, eight = (
        plan(llama(width=1024), LoRA(r=4, target_modules="all-linear", quantize=mode), texts())
        for mode in (None, "nf4", "int8")
    )
    linear = sum(
        m.weight.numel() for p, m in llama(width=1024).named_modules() if isinstance(m, nn.Linear) and p != "lm_head"
    )
    assert plain.base - four.base == pytest.approx(linear * 1.5, rel=0.01)
    assert plain.base - eight.base == pytest.approx(linear, rel=0.01)
    assert four.constants == pytest.approx(linear * (1 / 64 + 4 / 64 / 256), rel=0.2)
    assert plain.adapters == four.adapters == eight.adapters


def test_full_fine_tuning_trains_all_in_float32_under_autocast():
    model = llama(dtype=torch.float32)
    found = plan(model, FullFineTuning(), texts(), precision="bf16-mixed")
    weights = sum(allocated(4 * p.numel()) for p in model.parameters())
    assert (found.adapters, found.gradients, found.optimizer) == (weights, weights, 2 * weights)
    assert found.base < 10_000  # buffers


def test_bf16_true_trains_in_bfloat16():
    found = plan(llama(), FullFineTuning(), texts(), precision="bf16-true")
    weights = sum(allocated(2 * p.numel()) for p in llama().parameters())
    assert (found.adapters, found.gradients, found.optimizer) == (weights, weights, 2 * weights)


@pytest.mark.parametrize("method", [DoRA, HiRA, BitFit, QLoRA])
def test_every_method_is_planned_and_the_model_stays(method):
    with torch.device("meta"):
        model = transformers.DistilBertForSequenceClassification(
            transformers.DistilBertConfig(dim=64, hidden_dim=128, n_layers=2, n_heads=4, vocab_size=100)
        ).train()
    before = copy.deepcopy(dict(model.named_parameters()))
    arguments = {"r": 4} if "r" in method.parameters() else {}
    batch = {"input_ids": torch.zeros(4, 32, dtype=torch.int64), "labels": torch.zeros(4, dtype=torch.int64)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    found = plan(model, method(**arguments, train_also=["*classifier"]), batch, precision="bf16-mixed")
    assert found.activations > 0
    assert [*dict(model.named_parameters())] == [*before]
    assert all(p.is_meta and p.dtype == before[n].dtype for n, p in model.named_parameters())


def saved_bytes(model, batch):
    """What autograd keeps after a real forward pass, but for parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch)
    return sum(kept.values()), loss


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 64))

    def forward(self, x):
        return self.layers(x).sum()


def test_activations_are_at_least_what_autograd_keeps_and_little_more():
    model, x = Net(), torch.zeros(1024, 64)
    kept, _ = saved_bytes(model, {"x": x})
    found = plan(model, FullFineTuning(), {"x": x})
    widest = 1024 * 512 * 4
    assert kept <= found.activations <= kept + 3 * widest


def test_checkpointing_is_seen():
    plain = plan(llama(layers=6), LoRA(r=4), texts(batch=4, length=256))
    less = plan(
        llama(layers=6),
        LoRA(r=4),
        texts(batch=4, length=256),
        prepare=lambda m: m.gradient_checkpointing_enable({"use_reentrant": False}),
    )
    assert less.activations < 0.6 * plain.activations


def test_attention_makes_no_scores():
    """In half precision; twice the length is then about twice the memory, not four times."""
    short, long = (plan(llama(), LoRA(r=4), texts(batch=1, length=n)) for n in (1024, 2048))
    assert 1.9 < long.activations / short.activations < 2.1


def test_a_padding_mask_costs_its_bias_in_every_layer():
    mask = torch.ones(2, 512, dtype=torch.int64, device="meta")
    with_mask = plan(llama(), LoRA(r=4), texts(length=512, attention_mask=mask))
    without = plan(llama(), LoRA(r=4), texts(length=512))
    bias = 2 * 512 * 512 * 2
    assert with_mask.activations - without.activations >= 2 * bias


def test_the_state_of_each_optimizer_is_its_own():
    made = {
        "adamw": torch.optim.AdamW,
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "8bit": bnb.optim.AdamW8bit,
        "paged": bnb.optim.PagedAdamW,
    }
    found = {
        name: plan(llama(width=512), LoRA(r=256, target_modules="ffn"), texts(), optimizer=make)
        for name, make in made.items()
    }
    trained = found["adamw"].adapters
    assert found["adamw"].optimizer == 2 * trained
    assert found["sgd"].optimizer == 0
    assert found["8bit"].optimizer == pytest.approx(2 * trained / 4 * (1 + 4 / 256), rel=0.01)
    assert (found["paged"].optimizer, found["paged"].host) == (0, 2 * trained)
    assert found["paged"].peak < found["adamw"].peak


def test_a_step_that_looks_at_values_is_refused():
    def step(module, batch):
        loss = module(**batch).loss
        return loss if loss > 0 else -loss

    with pytest.raises(ValueError, match="depends on the values"):
        plan(llama(), LoRA(r=4), texts(), step=step)


def test_a_live_module_is_planned_as_it_stands():
    """Attached, its base in 4 bit, with values: what a run asks of its own module."""
    torch.manual_seed(0)
    model = Net()
    lit_peft.LoRA(r=4, target_modules="all-linear", quantize="nf4").attach(model)
    found = plan(model, None, {"x": torch.zeros(32, 64)})
    again = plan(Net(), LoRA(r=4, target_modules="all-linear", quantize="nf4"), {"x": torch.zeros(32, 64)})
    assert found.parts() == again.parts()
    assert found.constants > 0


def test_planning_leaves_nothing_fake_behind():
    """bitsandbytes keeps tables for all layers, which must not become those of a step without values."""
    bnb.functional.name2qmap.clear()
    plan(llama(), QLoRA(r=4), texts(), optimizer=bnb.optim.AdamW8bit)
    layer = nn.Linear(128, 128)
    make_quantizer("nf4").quantize(layer, torch.device("cpu"))
    assert all(type(t.data) is torch.Tensor for t in layer_ops(layer).stored(layer))
    assert layer(torch.ones(1, 128)).isfinite().all()


@pytest.mark.parametrize("cls", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_an_optimizer_that_needs_values_or_a_closure_is_refused_by_name(cls):
    with pytest.raises(ValueError, match=rf"^{cls.__name__} cannot make a step on tensors that have no values"):
        plan(llama(), LoRA(r=2), texts(), optimizer=cls)


def test_another_precision_is_refused_and_not_planned_as_float32():
    with pytest.raises(ValueError, match=r"precision must be .*, not '64-true'"):
        plan(llama(), LoRA(r=2), texts(), precision="64-true")


def test_gpus_by_name_and_size():
    assert gpu_bytes("h100") == ("H100", 80 << 30)
    assert gpu_bytes("NVIDIA A100 40GB") == ("A100-40GB", 40 << 30)
    assert gpu_bytes("A100-80GB") == ("A100", 80 << 30)
    assert gpu_bytes("NVIDIA H100 80GB HBM3") == ("H100", 80 << 30)
    assert gpu_bytes("NVIDIA A100-PCIE-40GB")[1] == 40 << 30
    assert gpu_bytes("Tesla V100-SXM2-32GB") == ("V100", 32 << 30)
    assert gpu_bytes("NVIDIA GeForce RTX 4090") == ("RTX4090", 24 << 30)
    assert gpu_bytes("24GiB") == ("24GiB", 24 << 30)
    assert gpu_bytes("512 MiB")[1] == CONTEXT
    for size in ("0GiB", "0.0 MB", "-5GiB"):
        with pytest.raises(ValueError, match=f"gpu is '{size}', expected a size above 0, such as 24GiB, or a name: T4"):
            gpu_bytes(size)
    with pytest.raises(ValueError, match=r"'H10' is not known. Did you mean 'H100'"):
        gpu_bytes("H10")


def test_inputs_that_wait_on_the_host_are_not_counted():
    model, batch = llama(layers=6), texts(batch=4, length=256)
    here, away = (
        plan(model, LoRA(r=4), batch, prepare=lambda m, offload=offload: checkpoint_activations(m, offload=offload))
        for offload in (False, True)
    )
    inputs = 5 * 4 * 256 * 128 * 2  # of all blocks but the one that is computed again
    assert here.activations - away.activations == pytest.approx(inputs, rel=0.25)
