"""The base under the adapters: its dtypes, running statistics, layers that are not called, and its fingerprint."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from models import TINY, logits, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from toys import lora, trainable

from lit_peft.core.attach import detach
from lit_peft.core.checkpoint import adapter_keys, record
from lit_peft.core.fingerprint import compare_fingerprints, fingerprint
from lit_peft.core.registry import registry
from lit_peft.methods import BitFit, LinearProbe
from lit_peft.testing.conformance import assert_same, snapshot


@pytest.mark.parametrize("adapted", ["linear1", "linear1.bias"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_fast_path_of_transformer_encoder_honours_an_adapter(padded, adapted):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    dtype = torch.float32 if adapted == "linear1" else torch.bfloat16
    model = nn.TransformerEncoder(layer, 2).eval().to(dtype)
    x = torch.randn(2, 5, 8, dtype=dtype)
    mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool() if padded else None
    keep = slice(None) if mask is None else ~mask
    with torch.no_grad():
        base = model(x, src_key_padding_mask=mask)
    if adapted == "linear1":
        lora(target_modules="linear1").attach(model)
    else:
        LinearProbe(train_also=["linear1.bias"]).attach(model)  # float32 beside a bfloat16 weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
        fast = model(x, src_key_padding_mask=mask)
    slow = model.train()(x, src_key_padding_mask=mask)
    model.eval()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(fast[keep], slow[keep], rtol=tolerance, atol=tolerance)
    assert (slow - base)[keep].abs().max() > 0.5
    detach(model)
    assert model.use_nested_tensor and not model.layers[0].linear1._forward_pre_hooks
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), base)


def test_an_attention_that_reads_biases_itself_takes_one_dtype():
    model = nn.TransformerEncoderLayer(8, 2, 16).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj\.bias cannot train in torch\.float32"):
        BitFit().attach(model)
    assert registry(model) is None
    BitFit(adapter_dtype="bfloat16").attach(model)
    model(torch.randn(2, 3, 8, dtype=torch.bfloat16)).sum().backward()


class WithNorm(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))

    def training_step(self, batch, _):
        return self(batch[0]).square().mean()

    validation_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


IMAGES = 3 + torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def statistics(module: nn.Module) -> list[Tensor]:
    return [b.clone() for b in module.norm.buffers()]


def fit(module: nn.Module, method) -> None:
    loader = DataLoader(TensorDataset(IMAGES), batch_size=4)
    trainer = pl.Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[method],
    )
    trainer.fit(module, loader, loader)


@pytest.mark.parametrize("with_trainer", [False, True])
def test_statistics_of_a_frozen_norm_stay(with_trainer):
    module = WithNorm()
    before = statistics(module)
    method = lora(target_modules="head")
    if with_trainer:
        fit(module, method)
    else:
        method.attach(module)
        module.train()
        module(IMAGES)
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(module), strict=True))
    assert not any(key.startswith("norm") for key in adapter_keys(module))
    detach(module)
    module(IMAGES)
    assert module.norm.training and module.norm.num_batches_tracked == 1


@pytest.mark.parametrize("first", ["bias", "lora"])
def test_statistics_of_a_norm_that_trains_move_and_are_kept(first):
    module = WithNorm().train()
    state = snapshot(module)
    both = [lora(name="lora", target_modules="head"), BitFit(name="bias")]
    for method in sorted(both, key=lambda method: method.name != first):
        method.attach(module)
    module(IMAGES)
    assert module.norm.training and module.norm.num_batches_tracked == 1
    expected = {"norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert adapter_keys(module) >= expected and "norm.weight" not in adapter_keys(module)
    detach(module, "bias")
    module(IMAGES)
    assert not module.norm.training
    detach(module)
    assert_same(snapshot(module), state)
    module.eval()
    lora(target_modules="head").attach(module)
    detach(module)
    assert not module.norm.training


# ------------------------------------------------------------------------------------------------- dtypes

EMBEDDINGS = {"gpt2": "wte", "llama": "embed_tokens", "t5": "shared"}  # tied in two of them


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["lora", "biases", "embeddings"])
@pytest.mark.parametrize("name", TINY)
def test_float32_trainables_on_a_bfloat16_base(name, kind, autocast):
    model = tiny(name).to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = logits(model, name)
    embeddings = EMBEDDINGS.get(name, "word_embeddings")
    more = {"lora": {}, "biases": {"bias": "all"}, "embeddings": {"train_also": [embeddings]}}[kind]
    lora(**more).attach(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(logits(model, name), expected, rtol=0.05, atol=0.02)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = logits(model, name)
    output.float().square().sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == parameter.grad.dtype == torch.float32, key
        else:
            assert parameter.dtype == torch.bfloat16 and parameter.grad is None, key
    assert model.get_parameter(next(n for n in trainable(model) if "lora_B" in n)).grad.any()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_adapter_dtype_bfloat16(base):
    name = "distilbert"
    model = tiny(name).to(base)
    lora(bias="all", train_also=["classifier", "word_embeddings"], adapter_dtype="bfloat16").attach(model)
    output = logits(model, name)
    assert output.dtype == base
    output.float().square().sum().backward()
    assert {model.get_parameter(key).dtype for key in trainable(model)} == {torch.bfloat16}
    assert all(model.get_parameter(key).grad is not None for key in trainable(model))
    detach(model)
    assert_same(snapshot(model), snapshot(tiny(name).to(base)))


def test_a_model_moved_to_another_dtype_computes_in_it():
    model = tiny("distilbert").to(torch.bfloat16)
    lora(bias="all", train_also=["word_embeddings"]).attach(model)
    model.float()
    assert logits(model, "distilbert").dtype == torch.float32


# --------------------------------------------------------------------------------------------- fingerprint


@pytest.mark.parametrize("name", TINY)
def test_a_fingerprint_does_not_depend_on_the_dtype(name):
    model = tiny(name)
    digests = fingerprint(model)
    assert set(digests) == {key for key, _ in model.named_parameters()}
    assert fingerprint(model.to(torch.bfloat16)) == digests


def test_a_fingerprint_names_the_weight_that_differs():
    saved = fingerprint(tiny("distilbert"))
    assert compare_fingerprints(saved, fingerprint(tiny("distilbert"))) is None
    other = tiny("distilbert")
    with torch.no_grad():
        other.distilbert.transformer.layer[1].ffn.lin1.weight.mul_(1.1)
    message = compare_fingerprints(saved, fingerprint(other))
    assert message == "distilbert.transformer.layer.1.ffn.lin1.weight holds other values"
    assert compare_fingerprints(saved, fingerprint(tiny("distilbert", seed=1))).endswith("more of 40 differ")
    other.classifier = nn.Linear(16, 3)
    assert compare_fingerprints(saved, fingerprint(other)).startswith(
        "distilbert.transformer.layer.1.ffn.lin1.weight holds other values, and 2 more"
    )
    other.classifier = nn.Identity()
    assert compare_fingerprints(saved, fingerprint(other)) == "the base has no classifier.weight (nor 1 more)"
    assert compare_fingerprints({"w": "2x3:ab"}, {"w": "3x2:ab"}) == "w has shape 3x2, not 2x3"


def test_a_head_that_trains_is_no_part_of_the_fingerprint():
    first, second = tiny("distilbert"), tiny("distilbert")
    second.classifier.reset_parameters()
    for model in (first, second):
        lora(train_also=["classifier"]).attach(model)
    assert record(first, adapter_keys(first))["fingerprint"] == record(second, adapter_keys(second))["fingerprint"]
    assert not any(key.startswith("classifier") for key in record(first, adapter_keys(first))["fingerprint"])
    for model in (first, second):
        detach(model)
        lora().attach(model)
    assert record(first, adapter_keys(first))["fingerprint"] != record(second, adapter_keys(second))["fingerprint"]


def test_small_tensors_are_compared_in_full():
    a = nn.Linear(8, 8)
    for i in range(8):
        b = copy.deepcopy(a)
        with torch.no_grad():
            b.bias[i] += 1
        assert compare_fingerprints(fingerprint(a), fingerprint(b)) == "bias holds other values"
