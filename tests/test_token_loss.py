"""The loss by token: from hidden states, without the logits of a batch, as transformers computes it."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from language_models import VOCABULARY, batch, save
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import lit_peft.tasks.token_loss as token_loss
from lit_peft import LoRA
from lit_peft.core.weightless import without_weights
from lit_peft.faults import TrainingFault
from lit_peft.planning.plan import plan
from lit_peft.tasks import CausalLanguageModeling
from lit_peft.tasks.token_loss import head_is_last

ADAPTED = {"gpt2": ["c_attn", "lm_head"], "llama": ["q_proj", "lm_head"], "gemma2": ["q_proj"], "cohere": ["q_proj"]}


def task(folder, **options) -> CausalLanguageModeling:
    made = CausalLanguageModeling(str(folder), **options)
    made.configure_model()
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: save(tmp_path_factory.mktemp(kind), kind, tie_word_embeddings=kind != "llama") for kind in ADAPTED}


def adapted(folder, kind: str) -> CausalLanguageModeling:
    made = task(folder)
    names = [name for name in ADAPTED[kind] if name != "lm_head" or kind == "llama"]  # not where it is tied
    LoRA(r=2, dropout=0.0, target_modules=names).attach(made)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn_like(p))
    return made.eval()


@pytest.mark.parametrize("kind", ADAPTED)
def test_loss_and_gradients_are_those_of_transformers(folders, kind, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_NUMBERS", 5 * VOCABULARY)  # five tokens at a time
    made, given = adapted(folders[kind], kind), batch(7, 12, 2)
    loss = made.training_step(given, 0)
    assert made._passes == (kind in ("gpt2", "llama"))  # the others cap or scale their logits
    loss.backward()
    ours = {name: p.grad.clone() for name, p in made.named_parameters() if p.requires_grad}
    made.zero_grad()
    expected = made.model(**given).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(ours) >= 4
    for name, p in made.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(ours[name], p.grad, rtol=1e-5, atol=1e-6)


def test_no_logits_of_a_batch_are_kept(folders, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_NUMBERS", 4 * VOCABULARY)
    made, given = adapted(folders["llama"], "llama"), batch(16, 16)
    made.rows(*made.inputs_and_targets(given, True))  # the first batch tells whether the head comes last

    def largest(step) -> int:
        kept = [0]

        def keep(x):
            if x.is_floating_point() and VOCABULARY in x.shape and not isinstance(x, nn.Parameter):
                kept.append(x.numel())
            return x

        with saved_tensors_hooks(keep, lambda x: x):
            loss = step()
        loss.backward()
        return max(kept)

    assert largest(lambda: made.training_step(given, 0)) == 0
    assert largest(lambda: made.model(**given).loss) >= 30 * VOCABULARY  # so that the test could fail


def test_the_first_batch_draws_no_random_numbers(folders):
    first, second = task(folders["gpt2"]), task(folders["gpt2"])
    second._passes = True
    losses = []
    for made in (first, second):
        torch.manual_seed(3)
        losses.append(made.training_step(batch(9, 4), 0).item())
    assert first._passes and first.model.training and losses[0] == losses[1]


def test_packed_texts_see_and_predict_themselves_alone(folders):
    made, apart = task(folders["llama"]).eval(), batch(6, 9, seed=4)
    texts = [row[mask.bool()] for row, mask in zip(apart["input_ids"], apart["attention_mask"], strict=True)]
    ids = torch.cat([*texts, torch.zeros(3, dtype=torch.long)])[None]
    labels = ids.clone()
    labels[:, -3:] = -100
    positions = torch.cat([torch.arange(n) for n in (6, 9, 3)])[None]
    packed = {"input_ids": ids, "position_ids": positions, "labels": labels}
    rows = [made.rows(*made.inputs_and_targets(given, False)) for given in (apart, packed)]
    assert len(rows[0].targets) == len(rows[1].targets) == 13
    torch.testing.assert_close(*(token_loss.summed_nll(own) for own in rows))


def test_a_compiled_model_has_the_same_loss(folders):
    made, given = adapted(folders["llama"], "llama"), batch(8, 8)
    expected = made.training_step(given, 0)
    made.model.compile(backend="eager")
    torch.testing.assert_close(made.training_step(given, 0), expected)


def test_a_batch_without_scored_tokens_has_no_loss_and_no_gradient(folders):
    made, given = adapted(folders["gpt2"], "gpt2"), batch(5, 5)
    loss = made.training_step(given | {"labels": torch.full_like(given["labels"], -100)}, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in made.parameters() if p.requires_grad)


def test_a_plan_counts_hidden_states_and_not_logits(folders, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_NUMBERS", 4 * VOCABULARY)
    made = CausalLanguageModeling(folders["llama"])
    with without_weights():
        made.configure_model()
    sample = made.sample(8, 48)
    found = plan(made, LoRA(r=2, target_modules=["q_proj"]), sample)

    def own_loss(module, given):
        return module.model(**given).loss

    theirs = plan(made, LoRA(r=2, target_modules=["q_proj"]), sample, step=own_loss)
    assert theirs.activations - found.activations > 8 * 48 * VOCABULARY * 4


def test_a_head_is_left_alone_when_a_forward_fails(folders):
    made = task(folders["llama"])
    made._passes = made._looked_ahead = True
    with pytest.raises(ValueError, match="input_ids"):
        made.rows({"nonsense": torch.zeros(1)}, torch.zeros(1, 1))
    assert "forward" not in vars(made.model.lm_head)


def test_decoders_that_let_packed_texts_see_each_other_are_refused(tmp_path):
    task = CausalLanguageModeling(save(tmp_path, "opt"))
    task.configure_model()
    alone = batch(6)
    task.training_step(alone, 0)
    packed = {**alone, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    del packed["attention_mask"]
    with pytest.raises(TrainingFault, match=r"OPTForCausalLM does not look .* set data.pack to false"):
        task.training_step(packed, 0)


def test_a_head_whose_logits_are_cast_afterwards_is_not_left_out(folders):
    class Cast(tf.GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.float()
            return output

    model = Cast.from_pretrained(folders["gpt2"], dtype=torch.bfloat16)
    inputs = {key: value for key, value in batch(6).items() if key != "labels"}
    assert not head_is_last(model, inputs)
    assert head_is_last(model.float(), inputs)


def test_a_head_whose_logits_get_a_bias_of_zeros_afterwards_is_not_left_out(tmp_path, folders):
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=VOCABULARY, **small, **heads)).eval()
    given = batch(9, 6)
    inputs, targets = {key: given[key] for key in ("input_ids", "attention_mask")}, given["labels"]
    assert not model.final_logits_bias.any() and not head_is_last(model, inputs)
    rows = token_loss.score_rows(model, inputs, targets, passes=False)
    expected = F.cross_entropy(model(**inputs).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(token_loss.summed_nll(rows), expected)


@pytest.mark.parametrize(
    ("kind", "instead"),
    [("roformer", "MaskedLanguageModeling"), ("xlm", "Masked"), ("xlnet", "train it in a LightningModule")],
)
def test_encoders_that_do_not_say_that_they_are_are_refused_at_the_first_batch(tmp_path, kind, instead):
    small = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "roformer": tf.RoFormerConfig(**small, intermediate_size=32),
        "xlm": tf.XLMConfig(vocab_size=VOCABULARY, emb_dim=16, n_layers=1, n_heads=2),
        "xlnet": tf.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=1, n_head=2, d_inner=32),
    }[kind]
    model = tf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    made = task(tmp_path)
    with pytest.raises(TrainingFault, match=rf"reads texts to both sides .*: (use )?{instead}"):
        made.training_step(batch(6, 4), 0)
