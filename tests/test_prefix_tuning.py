"""Prefix tuning: against HF PEFT and against the base on real text, on every architecture and attention."""

import copy

import peft
import pytest
import torch
import transformers as tf
from models import TINY, inputs, logits, tiny
from test_prompt_tuning import CAUSAL, Language, check_comes_and_goes, frozen, generated, one_step, padded, words
from torch import nn
from toys import adapters

import lit_peft
from lit_peft.methods import LoRA, PrefixTuning
from lit_peft.methods.prefix_attention import attend
from lit_peft.testing.conformance import assert_same, perturb, snapshot


def prefixed(name: str, **arguments) -> nn.Module:
    model = frozen(name)
    PrefixTuning(3, **arguments).attach(model)
    return model


def hf_peft(model: nn.Module, **arguments) -> nn.Module:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, **arguments)
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def table(model: nn.Module) -> list[torch.Tensor]:
    """Keys and values of layer after layer, which HF PEFT keeps side by side."""
    own = [m.peft["default"] for m in model.modules() if hasattr(m, "peft")]
    return [t for prefix in own if hasattr(prefix, "pair") for t in prefix.pair()]


# ------------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("name", CAUSAL)
def test_equals_hf_peft(name):
    model = frozen(name)
    theirs = hf_peft(model)
    PrefixTuning(3).attach(model)
    weight = theirs.prompt_encoder.default.embedding.weight
    for own, their in zip(table(model), weight.detach().chunk(4, dim=1), strict=True):
        own.data = their.clone()
    batch = inputs(name)
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
    one_step(model, theirs, name)
    torch.testing.assert_close(torch.cat(table(model), 1), weight, rtol=1e-5, atol=1e-5)
    assert generated(model, name) == generated(theirs, name)


@pytest.mark.parametrize("name", CAUSAL)
def test_reparametrised_equals_hf_peft(name):
    model = frozen(name)
    theirs = hf_peft(model, prefix_projection=True, encoder_hidden_size=5)
    encoder = theirs.prompt_encoder.default
    width = encoder.embedding.weight.shape[1]
    PrefixTuning(3, reparametrise=True, hidden_size=5).attach(model)
    own = [m.peft["default"] for m in model.modules() if hasattr(m, "peft") and hasattr(m.peft["default"], "pair")]
    trunk = own[0].trunk
    trunk.embedding.data = encoder.embedding.weight.detach().clone()
    trunk.hidden.load_state_dict(encoder.transform[0].state_dict())
    last = encoder.transform[2]
    for i, prefix in enumerate(own):
        rows = slice(2 * width * i, 2 * width * (i + 1))
        prefix.output.load_state_dict({"weight": last.weight[rows].detach(), "bias": last.bias[rows].detach()})
    batch = inputs(name)
    torch.testing.assert_close(model(**batch).logits, theirs(**batch).logits, rtol=1e-5, atol=1e-5)
    one_step(model, theirs, name)
    torch.testing.assert_close(trunk.embedding, encoder.embedding.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(trunk.hidden.weight, encoder.transform[0].weight, rtol=1e-5, atol=1e-5)
    weights = torch.cat([prefix.output.weight for prefix in own])
    torch.testing.assert_close(weights, last.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CAUSAL)
def test_from_text_the_base_goes_on_from_that_text(name, implementation, tmp_path):
    """A decoder with the keys and values of a text computes what the base computes behind that text."""
    model = frozen(name)
    model.set_attn_implementation(implementation)
    ids = torch.tensor([[4, 9, 2]])
    text = inputs(name)["input_ids"]
    expected = model(input_ids=torch.cat([ids.expand(2, -1), text], 1)).logits[:, 3:]
    method = PrefixTuning(3, init_text="word4 word9 word2 word7", tokenizer=str(words(tmp_path)))
    method.attach(model)
    method.prepare(model, ())
    torch.testing.assert_close(model(input_ids=text).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_every_attention_starts_from_the_text_in_any_mode(name, tmp_path):
    model = frozen(name).train()
    method = PrefixTuning(3, init_text="word4", tokenizer=str(words(tmp_path)))
    method.attach(model)
    before = [t.clone() for t in table(model)]
    method.prepare(model, ())
    once = [t.clone() for t in table(model)]
    assert not any(torch.equal(a, b) for a, b in zip(before, once, strict=True))
    assert all(module.training for module in model.modules())
    method.prepare(model, ())  # dropout is off while the text is read
    assert all(torch.equal(a, b) for a, b in zip(once, table(model), strict=True))


# ------------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("arguments", [{}, {"reparametrise": True}], ids=["free", "reparametrised"])
@pytest.mark.parametrize("name", TINY)
def test_every_architecture(name, arguments, implementation):
    model = frozen(name)
    model.set_attn_implementation(implementation)
    configs = [copy.deepcopy(m.config.to_dict()) for m in model.modules() if hasattr(m, "config")]
    check_comes_and_goes(model, name, PrefixTuning(3, **arguments))
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {implementation}
    assert [m.config.to_dict() for m in model.modules() if hasattr(m, "config")] == configs


@pytest.mark.parametrize("name", TINY)
def test_the_two_attentions_agree_and_padding_does_not_matter(name):
    model = prefixed(name)
    one = logits(model, name)
    model.set_attn_implementation("eager")  # after attaching
    torch.testing.assert_close(logits(model, name), one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(**padded(name)).logits[:2], one, rtol=1e-4, atol=1e-5)


def test_flash_attention_gets_a_longer_mask_and_keeps_its_own_triangle(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = {}

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.update(kwargs, mask=attention_mask, key=key)
        return query, None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    attention = prefixed("llama").model.layers[0].self_attn
    q, k = torch.randn(2, 2, 4, 8), torch.randn(2, 1, 4, 8)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    attend("flash_attention_2", attention, q, k, k, mask, is_causal=True)
    assert seen["mask"].tolist() == [[1] * 7, [1] * 5 + [0] * 2]
    assert seen["is_causal"] is True and seen["key"].shape == (2, 1, 7, 8)
    torch.testing.assert_close(seen["key"][1, 0, :3], attention.peft["default"].key)
    attend("flash_attention_2", attention, q, k, k, None, is_causal=True)
    assert seen["mask"] is None
    with pytest.raises(ValueError, match="sliding window loses the prefix"):
        attend("flash_attention_2", attention, q, k, k, None, sliding_window=2)


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_generation_with_a_cache(name):
    model = prefixed(name)
    assert generated(model, name) == generated(model, name, use_cache=False)
    if name in CAUSAL:
        single = generated(model, name, rows=slice(1))
        assert single[0] == generated(model, name, side="left")[0]


@pytest.mark.parametrize("name", ["distilbert", "llama", "t5"])
def test_gradient_checkpointing(name):
    gradients = []
    for checkpointing in (False, True):
        model = prefixed(name, reparametrise=True).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if name == "t5":
            model.eval()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        logits(model, name).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_compiles_without_a_break():
    torch._dynamo.reset()
    model = prefixed("llama", reparametrise=True)
    expected = logits(model, "llama")
    model.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(model, "llama"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    model = tiny("llama") if autocast else tiny("llama").bfloat16()
    PrefixTuning(3).attach(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = logits(model, "llama")
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# -------------------------------------------------------------------------------------------- composition


def test_two_prefixes_are_one_of_both_and_lora_goes_on_below():
    both = frozen("gpt2")
    PrefixTuning(2, name="one").attach(both)
    PrefixTuning(1, name="two").attach(both)
    whole = prefixed("gpt2")
    for h, other in zip(both.transformer.h, whole.transformer.h, strict=True):
        for tensor in ("key", "value"):
            parts = [getattr(h.attn.peft[n], tensor) for n in ("one", "two")]
            getattr(other.attn.peft["default"], tensor).data = torch.cat(parts).detach()
    expected = logits(both, "gpt2")
    torch.testing.assert_close(logits(whole, "gpt2"), expected, rtol=1e-5, atol=1e-5)
    LoRA(r=2, dropout=0.0, name="lora").attach(both)
    torch.testing.assert_close(logits(both, "gpt2"), expected)
    perturb(both)
    assert (logits(both, "gpt2") - expected).abs().max() > 1e-3


def test_a_text_is_read_beside_another_prefix(tmp_path):
    alone, beside = frozen("bert"), frozen("bert")
    PrefixTuning(2, name="one").attach(beside)
    for model in (alone, beside):
        method = PrefixTuning(3, init_text="word4", tokenizer=str(words(tmp_path)), name="two")
        method.attach(model)
        method.prepare(model, ())
    first, other = (m.bert.encoder.layer[0].attention.self.peft["two"] for m in (alone, beside))
    torch.testing.assert_close(first.key, other.key)  # above the first layer, the text sees the other prefix
    first, other = (m.bert.encoder.layer[1].attention.self.peft["two"] for m in (alone, beside))
    assert not torch.allclose(first.key, other.key)


def test_texts_that_leave_no_room():
    model = prefixed("gpt2")  # 16 positions
    model(input_ids=torch.full((1, 13), 3))
    with pytest.raises(ValueError, match=r"3 virtual tokens and 14 of the text exceed the 16 positions of GPT2Model"):
        model(input_ids=torch.full((1, 14), 3))


def test_chosen_blocks_and_attentions():
    adapter = PrefixTuning(3, layers=[1]).attach(model := frozen("gpt2"))
    assert sorted(adapter.sites) == ["transformer", "transformer.h.1.attn"]
    adapter = PrefixTuning(3, exclude_modules="EncDecAttention.k").attach(model := frozen("t5"))
    assert not any("EncDec" in path for path in adapter.sites) and len(adapter.sites) == 4
    assert logits(model, "t5").isfinite().all()


# ----------------------------------------------------------------------------------------------- refusals


def test_models_without_the_interface_are_refused_by_name():
    config = tf.GPTJConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, rotary_dim=4)
    with pytest.raises(ValueError, match=r"^GPTJAttention computes its attention itself .* use PromptTuning or LoRA"):
        PrefixTuning(3).attach(tf.GPTJForCausalLM(config))
    with pytest.raises(ValueError, match=r"^PrefixTuning puts .* and Sequential has none .*: use LoRA"):
        PrefixTuning(3).attach(nn.Sequential(nn.Linear(2, 2)))


def test_an_attention_that_passes_the_interface_by_is_found_in_the_first_pass(monkeypatch):
    model = prefixed("llama")
    monkeypatch.setattr(
        tf.models.llama.modeling_llama.LlamaAttention,
        "forward",
        lambda self, hidden_states, **kwargs: (hidden_states, None),
    )
    with pytest.raises(ValueError, match=r"^LlamaAttention computes its attention itself"):
        logits(model, "llama")


def test_attention_of_another_kind():
    model = frozen("llama")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'flex_attention' takes no prefix"):
        PrefixTuning(3).attach(model)


def test_gpt2s_own_eager_attention():
    """GPT-2 takes it when it sees the name eager, which ours hides."""
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    config = tf.GPT2Config(**sizes, reorder_and_upcast_attn=True, attn_implementation="eager")
    with pytest.raises(ValueError, match="loses reorder_and_upcast_attn under eager attention"):
        PrefixTuning(3).attach(tf.GPT2LMHeadModel(config))
    config._attn_implementation = "sdpa"  # which passes it over, with a prefix or without
    PrefixTuning(3).attach(tf.GPT2LMHeadModel(config))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_virtual_tokens": 0}, "^num_virtual_tokens must be at least 1, not 0"),
        ({"hidden_size": 0}, "^hidden_size must be at least 1, not 0"),
        ({"reparametrise": True, "init_text": "a"}, "^init_text sets keys and values"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PrefixTuning(**arguments)


def test_counts():
    model = prefixed("llama")  # one key-value head of 8 in two layers
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 2 * 3 * 8
    model = prefixed("llama", reparametrise=True, hidden_size=5)
    trained = 3 * 8 + (8 * 5 + 5) + 2 * (5 * 16 + 16)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


# ------------------------------------------------------------------------------------------ save and load


@pytest.mark.parametrize("arguments", [{}, {"reparametrise": True, "hidden_size": 5}], ids=["free", "reparametrised"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_folder_keeps_all_and_opens_in_hf_peft(name, arguments, tmp_path):
    model = prefixed(name, **arguments)
    perturb(model)
    lit_peft.save(model, tmp_path)
    twin = frozen(name)
    adapter = lit_peft.load(twin, tmp_path)
    assert_same(adapters(twin), adapters(model))
    assert torch.equal(logits(twin, name), logits(model, name))
    assert adapter.spec["init_args"] | arguments == adapter.spec["init_args"]
    if name in CAUSAL:
        theirs = peft.PeftModel.from_pretrained(frozen(name), tmp_path).eval()
        torch.testing.assert_close(logits(theirs, name), logits(model, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_a_folder_of_hf_peft(projection, tmp_path):
    theirs = hf_peft(frozen("llama"), prefix_projection=projection)
    theirs.save_pretrained(tmp_path)
    model = frozen("llama")
    lit_peft.load(model, tmp_path)
    torch.testing.assert_close(logits(model, "llama"), logits(theirs, "llama"), rtol=1e-5, atol=1e-5)


def test_what_hf_peft_has_no_form_for(tmp_path):
    with pytest.raises(ValueError, match="not into chosen layers or an encoder-decoder"):
        lit_peft.save(prefixed("t5"), tmp_path)


@pytest.mark.parametrize("arguments", [{}, {"reparametrise": True}], ids=["free", "reparametrised"])
def test_a_fit_resumes_exactly(arguments, tmp_path):
    method = lambda: PrefixTuning(3, **arguments)  # noqa: E731
    whole, half, resumed = Language("gpt2"), Language("gpt2"), Language("gpt2")
    whole.fit(method(), max_epochs=2)
    half.fit(method(), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    resumed.fit(method(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert_same(snapshot(resumed), snapshot(whole))
    assert not torch.equal(table(half.model)[0], table(whole.model)[0])


def test_a_fit_starts_from_the_text_and_a_resumed_one_does_not(tmp_path):
    arguments = {"init_text": "word4 word5", "tokenizer": str(words(tmp_path))}
    module, expected = Language("gpt2"), prefixed("gpt2")
    PrefixTuning.prepare(method := PrefixTuning(3, **arguments), expected, ())
    run = module.fit(method, max_steps=1, lr=0.0)
    for own, other in zip(table(module.model), table(expected), strict=True):
        torch.testing.assert_close(own, other)
    perturb(module)
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = Language("gpt2")
    again.fit(PrefixTuning(3, **arguments), max_steps=2, lr=0.0, ckpt_path=tmp_path / "one.ckpt")
    assert_same(adapters(again), adapters(module))
