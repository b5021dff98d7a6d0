"""What only a GPU shows of quantised bases: merging there, paged and 8-bit state through a resume, offloaded inputs."""

import gc

import bitsandbytes as bnb
import lightning.pytorch as pl
import pytest
import torch
import transformers as tf
from torch.utils.data import DataLoader

import lit_peft
from lit_peft import LoRA, merge, unmerge
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.fingerprint import fingerprint
from lit_peft.core.quantize import stored_as
from lit_peft.core.swap import MERGED_KEY
from lit_peft.testing.states import assert_same, perturb, snapshot
from lit_peft.training.checkpointing import checkpoint_activations

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BATCHES = 4


def llama() -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=500,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    return tf.LlamaForCausalLM(config)


def adapted(kind="nf4", dropout=0.0):
    model = llama().to(DEVICE)
    quantize = kind if kind == "int8" else {"mode": kind, "compute_dtype": "float32"}
    LoRA(r=4, dropout=dropout, target_modules="all-linear", quantize=quantize).attach(model)
    perturb(model)
    return model


def ids() -> torch.Tensor:
    return torch.arange(BATCHES * 64, device=DEVICE).view(-1, 32) % 500


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@torch.no_grad()
def test_merged_and_back(kind, into):
    model = adapted(kind).eval()
    before, expected = snapshot(model), model(ids()).logits
    merge(model, into=into)
    found = model(ids()).logits
    if into == "dequantized" and kind != "int8":  # on a GPU, int8 rounds the activations too, and dense layers do not
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())
    assert not torch.equal(found, expected)
    unmerge(model)
    assert_same(snapshot(model), before)
    assert torch.equal(model(ids()).logits, expected)


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@torch.no_grad()
def test_while_merged_the_device_holds_the_model_alone(kind, into):
    model = adapted(kind).eval()
    merge(model, into=into)
    kept = model.__dict__[MERGED_KEY]
    away = [p for additions in kept.additions.values() for p in additions.parameters()]
    gc.collect()
    before = torch.cuda.memory_allocated()
    del model.__dict__[MERGED_KEY], kept
    gc.collect()
    assert len(away) == 42 and {p.device.type for p in away} == {"cpu"}
    assert torch.cuda.memory_allocated() == before


@torch.no_grad()
def test_merged_into_the_original(tmp_path):
    lit_peft.save(adapted(), tmp_path)
    model = llama().to(DEVICE).eval()
    with pytest.warns(UserWarning, match="nf4"):
        lit_peft.load(model, tmp_path, quantize=None)
    expected = model(ids()).logits
    merge(model)
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-2 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@torch.no_grad()
def test_an_adapter_of_a_base_that_was_quantised_there_is_loaded_on_a_cpu(kind, tmp_path):
    """Codes and scales of the two may differ a little, by which the base must be known again."""
    there, here = adapted(kind).eval(), llama().eval()
    lit_peft.save(there, tmp_path)
    lit_peft.load(here, tmp_path)
    assert stored_as(here) == stored_as(there)
    before, now = fingerprint(there), fingerprint(here)
    scales = [
        (float(d.rpartition("*")[2]), float(now[name].rpartition("*")[2])) for name, d in before.items() if "*" in d
    ]
    assert len(scales) == 21
    for one, other in scales:
        assert other == pytest.approx(one, rel=0.005)  # a tenth of what is taken for the same
    expected, found = there(ids()).logits.cpu(), here(ids().cpu()).logits
    assert (found - expected).norm() < 0.05 * expected.norm()
    scaled = llama()
    for layer in scaled.model.layers:
        layer.mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(CheckpointMismatch, match=r"up_proj\.weight holds other values"):
        lit_peft.load(scaled, tmp_path)


class Module(pl.LightningModule):
    def __init__(self, optimizer: str) -> None:
        super().__init__()
        self.net, self.optimizer = llama(), optimizer

    def training_step(self, batch, index):
        return self.net(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return getattr(bnb.optim, self.optimizer)(lit_peft.param_groups(self, 1e-3))

    def train_dataloader(self):
        return DataLoader(ids().cpu().view(-1, 32), batch_size=2)


def fit(optimizer, epochs, precision, root, accelerator=None, ckpt_path=None):
    """A module after some epochs, and its trainer; factors are large enough for paged state."""
    module = Module(optimizer)
    trainer = pl.Trainer(
        accelerator=accelerator or {"cuda": "gpu"}.get(DEVICE, DEVICE),
        devices=1,
        max_epochs=epochs,
        precision=precision,
        callbacks=[LoRA(r=256, dropout=0.0, target_modules="all-linear", quantize="nf4")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    trainer.fit(module, ckpt_path=ckpt_path)
    return module, trainer


def trained(module):
    return {name: p.detach().cpu() for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimizer", ["PagedAdamW", "AdamW8bit", "PagedAdamW8bit"])
def test_a_run_resumes(optimizer, precision, tmp_path):
    whole, _ = fit(optimizer, 3, precision, tmp_path)
    _, trainer = fit(optimizer, 1, precision, tmp_path)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, trainer = fit(optimizer, 3, precision, tmp_path, ckpt_path=tmp_path / "one.ckpt")
    start, found, expected = trained(fit(optimizer, 0, precision, tmp_path)[0]), trained(resumed), trained(whole)
    for name, value in expected.items():
        assert value.isfinite().all() and not torch.equal(value, start[name])
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    if optimizer.startswith("Paged"):
        state = [t for s in trainer.optimizers[0].state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        assert any(getattr(t, "is_paged", False) for t in state) or DEVICE == "cpu"


@pytest.mark.filterwarnings("ignore")
def test_paged_state_goes_to_a_cpu_and_back(tmp_path):
    _, trainer = fit("PagedAdamW", 1, "32-true", tmp_path)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, trainer = fit("PagedAdamW", 2, "32-true", tmp_path, "cpu", tmp_path / "one.ckpt")
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    back, trainer = fit("PagedAdamW", 3, "32-true", tmp_path, ckpt_path=tmp_path / "two.ckpt")
    whole, _ = fit("PagedAdamW", 3, "32-true", tmp_path)
    assert trainer.global_step == 3 * BATCHES
    expected = trained(whole)
    for name, value in trained(back).items():  # to what a CPU's own rounding changes of AdamW's steps of 1e-3
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-3, msg=name)


def test_gradients_are_the_same_with_checkpointing_and_with_offloaded_inputs():
    found = []
    for how in (None, {"offload": False}, {"offload": True}):
        model = adapted(dropout=0.1).train()
        if how is not None:
            checkpoint_activations(model, **how)
        for _ in range(2):  # the second step finds pinned memory and streams there
            torch.manual_seed(1)
            model.zero_grad()
            model(input_ids=ids(), labels=ids()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for other in found[1:]:
        assert_same(other, found[0])
