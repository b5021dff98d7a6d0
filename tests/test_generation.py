"""Prompts continued by adapted models: from a cache, batched, as without one and alone."""

import json

import pytest
import torch
import transformers as tf
from data_helpers import SPECIAL, save_tokenizer
from language_models import VOCABULARY, batch, save, trainer
from torch.utils.data import DataLoader

from lit_peft import LoRA, PrefixTuning, PromptTuning, PTuning
from lit_peft.callbacks import PredictionWriter
from lit_peft.faults import TrainingFault
from lit_peft.tasks import CausalLanguageModeling
from lit_peft.tasks.generation import continuations
from lit_peft.tasks.token_loss import summed_nll
from lit_peft.trying import TextPrinter, use_adapter

METHODS = {
    "lora": lambda: LoRA(r=2),
    "prefix": lambda: PrefixTuning(4),
    "prefix by a network": lambda: PrefixTuning(4, reparametrise=True),
    "prompt": lambda: PromptTuning(4),
    "p-tuning": lambda: PTuning(4),
}
PROMPTS = [[11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25, 26, 27, 28], [30, 31]]
END = SPECIAL.index("[SEP]")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models with a tokenizer of words beside each."""
    made = {}
    for kind in ("gpt2", "llama"):
        path = tmp_path_factory.mktemp(kind)
        made[kind] = save(path, kind)
        save_tokenizer(path, VOCABULARY - len(SPECIAL))
    return made


def task(folder, method=None, **options):
    made = CausalLanguageModeling(folder, **{"max_new_tokens": 10} | options)
    made.configure_model()
    made.model.generation_config.eos_token_id = END
    if method is not None:
        method.attach(made)
        torch.manual_seed(1)
        with torch.no_grad():
            for p in made.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
    return made.eval()


def prompts(*rows):
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + list(row) for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def predict(made, *batches, callbacks=()):
    return [row for rows in trainer(*callbacks).predict(made, DataLoader(batches, batch_size=None)) for row in rows]


def words(ids) -> str:
    return " ".join(f"w{i - len(SPECIAL)}" for i in ids if i >= len(SPECIAL))


@torch.no_grad()
def by_hand(model, row, count: int) -> list[int]:
    """The likeliest tokens one after the other, each from a forward pass over the whole text, without a cache."""
    ids = torch.tensor([row])
    for _ in range(count):
        token = model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, token], 1)
        if token.item() == END:
            break
    return ids[0, len(row) :].tolist()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_batch_from_a_cache_is_continued_as_each_text_alone_without(folders, kind, method):
    made = task(folders[kind], METHODS[method]())
    expected = [by_hand(made.model, row, 10) for row in PROMPTS]
    rows = predict(made, prompts(*PROMPTS))
    assert [row["prompt"] for row in rows] == [words(row) for row in PROMPTS]
    assert [row["generation"].strip() for row in rows] == [words(row) for row in expected]
    plain = [by_hand(task(folders[kind]).model, row, 10) for row in PROMPTS]
    assert expected != plain  # the adapter does something


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_text_that_is_read_in_two_parts_is_the_same(folders, kind, method):
    made = task(folders[kind], METHODS[method]())
    ids, cache = torch.tensor(PROMPTS[1:2]), tf.DynamicCache(config=made.model.config)
    with torch.no_grad():
        made.model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        second = made.model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(second, made.model(input_ids=ids, use_cache=False).logits[:, 4:])


def test_an_end_of_text_token_ends_a_text(folders):
    made = task(folders["llama"], LoRA(r=2))
    tokens = by_hand(made.model, PROMPTS[1], 10)
    end = next(i for i in range(1, 10) if tokens[i] not in tokens[:i])
    made.model.generation_config.eos_token_id = tokens[end]
    (row,) = predict(made, prompts(PROMPTS[1]))
    assert row["generation"].split() == words(tokens[: end + 1]).split()


def test_draws_follow_from_the_seed_alone(folders):
    options = {"temperature": 1.5, "max_new_tokens": 20}
    made, given = task(folders["llama"], **options), prompts(*PROMPTS)
    torch.manual_seed(1)
    first = predict(made, given, given)
    torch.manual_seed(2)
    assert predict(made, given, given) == first
    before = torch.random.get_rng_state()
    again = continuations(made.model, made.tokenizer, *given.values(), made.decoding, 0, 0, 0)
    assert again == first[:3] and torch.equal(torch.random.get_rng_state(), before)
    assert first[:3] != first[3:]  # two batches
    assert predict(task(folders["llama"], sampling_seed=1, **options), given, given) != first
    greedy = predict(task(folders["llama"], max_new_tokens=20), given)
    assert first[:3] != greedy
    narrow = task(folders["llama"], max_new_tokens=20, temperature=1.5, top_p=1e-6)  # the likeliest token alone is left
    assert predict(narrow, given) == greedy


def test_what_cannot_be_continued_is_told(folders):
    made = task(folders["gpt2"], max_new_tokens=60)
    with pytest.raises(
        ValueError, match=r"max_new_tokens: 60 after a prompt of 5 tokens exceed the 64 positions .* 59"
    ):
        predict(made, prompts(PROMPTS[0]))
    right = {key: value.flip(1) for key, value in prompts(*PROMPTS).items()}
    with pytest.raises(ValueError, match="padded on the left"):
        predict(task(folders["gpt2"]), right)
    for share in (0.0, 2.0):
        with pytest.raises(ValueError, match=rf"model\.top_p must be above 0 and at most 1, not {share}"):
            CausalLanguageModeling(folders["gpt2"], top_p=share)
    with pytest.raises(ValueError, match=r"model\.top_p is 0\.9, and at model\.temperature 0 nothing is drawn"):
        CausalLanguageModeling(folders["gpt2"], top_p=0.9)
    with pytest.raises(ValueError, match=r"model\.max_new_tokens"):
        CausalLanguageModeling(folders["gpt2"], max_new_tokens=0)


@pytest.mark.parametrize("method", ["prefix", "prompt", "p-tuning"])
def test_virtual_tokens_leave_less_room(folders, method):
    with pytest.raises(
        TrainingFault, match=r"exceed the 60 positions .* behind its virtual tokens: set it to 55 at most"
    ):
        predict(task(folders["gpt2"], METHODS[method](), max_new_tokens=60), prompts(PROMPTS[0]))
    made = task(folders["gpt2"], METHODS[method](), max_new_tokens=55)
    made.model.generation_config.eos_token_id = VOCABULARY - 1  # so that it goes on to the last position
    assert len(predict(made, prompts(PROMPTS[0]))) == 1


def test_generations_are_written_and_printed(folders, tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    texts = [words(row) for row in PROMPTS]
    rows = predict(
        task(folders["llama"]), prompts(*PROMPTS), callbacks=[PredictionWriter(str(path)), TextPrinter(texts)]
    )
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert printed == [row["prompt"] + row["generation"] for row in rows]
    assert all(line.startswith(f"{text} w") for line, text in zip(printed, texts, strict=True))


def test_the_folder_of_an_adapter_says_which_task_it_is_of(folders, tmp_path):
    import lit_peft

    made = task(folders["llama"], LoRA(r=2))
    lit_peft.save(made, tmp_path / "ours")
    words = use_adapter(["predict", "--adapter", str(tmp_path / "ours")], ["Once"])
    assert words[words.index("--model") + 1] == "lit_peft.tasks.CausalLanguageModeling"
    assert words[words.index("--data") + 1] == "lit_peft.data.LanguageModelingDataModule"
    assert words[words.index("--model.backbone") + 1] == folders["llama"] and "--model.label_names" not in words
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_packed_texts_all_see_the_adapter(folders, method):
    made = task(folders["llama"], METHODS[method]())
    apart = prompts(*PROMPTS[:2])
    apart["labels"] = apart["input_ids"].masked_fill(apart["attention_mask"] == 0, -100)
    apart["labels"][0, 4] = -100  # the first token of a padded row has nothing before it
    ids = torch.tensor([PROMPTS[0] + PROMPTS[1]])
    positions = torch.tensor([[*range(5), *range(9)]])
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions}
    apart["position_ids"] = (apart["attention_mask"].cumsum(1) - 1).clamp(min=0)
    losses = [summed_nll(made.rows(*made.inputs_and_targets(given, False))) for given in (packed, apart)]
    torch.testing.assert_close(*losses)


def test_packed_texts_are_refused_where_one_alone_would_see_the_prompt(folders):
    made = task(folders["llama"], PromptTuning(4))
    ids = torch.tensor([PROMPTS[1]])
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([[*range(5), *range(4)]])}
    with pytest.raises(ValueError, match="share a row"):
        made.training_step(packed, 0)


def test_a_models_own_settings_do_not_count(folders):
    task = CausalLanguageModeling(folders["gpt2"], max_new_tokens=8)
    task.configure_model()
    model, prompt = task.model.eval(), batch(5)
    expected = continuations(model, task.tokenizer, prompt["input_ids"], prompt["attention_mask"], task.decoding, 0)
    own = model.generation_config
    own.no_repeat_ngram_size, own.min_length, own.suppress_tokens = 1, 60, list(range(1, 90))
    found = continuations(model, task.tokenizer, prompt["input_ids"], prompt["attention_mask"], task.decoding, 0)
    assert found == expected and model.generation_config is own
