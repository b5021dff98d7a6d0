"""The offline demo: its text follows its own rules, and its encoder is the pretrained one."""

import hashlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from lit_peft.demo import DECODER, ENCODER, pretrain, pretrain_decoder, reviews
from lit_peft.demo.text import (
    HELD_OUT,
    LEXICON,
    SIZES,
    VERDICTS,
    labelled_sentences,
    unlabelled_text,
    verdicts,
)

NEGATION = re.compile(
    r"\b(not|never|nobody|neither|no \w+|hardly|by no means|in no way|far from|anything but|without|free of)\b",
    re.IGNORECASE,
)


def words(sentence: str) -> list[str]:
    return re.findall(r"\w+", sentence.lower())


@pytest.fixture(scope="module")
def splits() -> dict[str, list[tuple[str, int]]]:
    return {split: labelled_sentences(split) for split in SIZES}


def test_importing_the_demo_is_cheap():
    code = "import sys, lit_peft.demo; print({'torch', 'datasets', 'transformers'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_text_is_the_same_everywhere(splits):
    def checksum(lines):
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    assert checksum(f"{label} {text}" for text, label in splits["train"][:100]) == "f0143a39e96794ce"
    assert checksum(f"{label} {text}" for text, label in splits["test"][:100]) == "2135cfcdfb3c431a"
    assert checksum(unlabelled_text(100)) == "1e3138ed546e4785"
    assert checksum(unlabelled_text(100, seed=1)) != checksum(unlabelled_text(100))


def test_reviews_are_a_balanced_dataset(splits):
    data = reviews()
    assert {split: len(table) for split, table in data.items()} == SIZES
    for split, table in data.items():
        assert table.features["label"].names == ["negative", "positive"]
        assert sum(table["label"]) == SIZES[split] / 2
        assert list(zip(table["sentence"], table["label"], strict=True)) == splits[split]
        assert 0.3 < np.mean(table["label"][: SIZES[split] // 4]) < 0.7  # shuffled


def test_no_sentence_is_in_two_places(splits):
    unlabelled = set(re.findall(r"[^.]+\.", " ".join(unlabelled_text(5000)).replace(". ", ".")))
    train, validation, test = ({sentence for sentence, _ in splits[split]} for split in SIZES)
    another_seed = {sentence for sentence, _ in labelled_sentences("validation", seed=7)}
    assert (len(train), len(validation), len(test)) == tuple(SIZES.values())
    assert not (train & validation or train & test or (validation | another_seed) & test)
    assert not unlabelled & (validation | test | another_seed)
    assert unlabelled & train  # the sentences were cut where they end, so the line above could have failed


def test_held_out_words_never_occur_in_train(splits):
    counts = {
        split: sum(not HELD_OUT.isdisjoint(words(sentence)) for sentence, _ in pairs) / len(pairs)
        for split, pairs in splits.items()
    }
    assert counts["train"] == 0
    assert counts["validation"] > 0.25 and counts["test"] > 0.25
    assert set(words(" ".join(unlabelled_text(5000)))) >= HELD_OUT


def test_counting_words_is_not_enough(splits):
    """A multinomial naive Bayes classifier with add-one smoothing stays far from what a reader reaches."""
    vocabulary = {word: i for i, word in enumerate(sorted({w for s, _ in splits["train"] for w in words(s)}))}

    def counts(pairs):
        table = np.zeros((len(pairs), len(vocabulary)))
        for row, (sentence, _) in zip(table, pairs, strict=True):
            np.add.at(row, [vocabulary[word] for word in words(sentence) if word in vocabulary], 1)
        return table, np.array([label for _, label in pairs])

    x, y = counts(splits["train"])
    totals = np.stack([x[y == label].sum(0) + 1 for label in (0, 1)])
    likelihood = np.log(totals / totals.sum(1, keepdims=True))
    x, y = counts(splits["test"])
    assert 0.6 < np.mean((x @ likelihood.T).argmax(1) == y) < 0.8


def read(sentence: str) -> int | None:
    """The label by the rules of negation and contrast; None where one clause holds words of both polarities."""
    for pattern in (
        r".*(?:, but|, yet|;) (.*)",
        r"(?:Although|While|Despite) .*?, (.*)",
        r"(.*), (?:although|even though) ",
        r"(.*), .* notwithstanding",
    ):
        if match := re.match(pattern, sentence):
            sentence = match[1]
            break
    sentence = re.sub("who never speaks|without electricity", "", sentence)  # about no film
    labels = set()
    for clause in re.split(r", and |: ", sentence):
        found = {label for label in (0, 1) if not LEXICON[label].isdisjoint(words(clause))}
        if len(found) == 2:
            return None
        labels |= {1 - label if NEGATION.search(clause) else label for label in found}
    assert len(labels) == 1, sentence
    return labels.pop()


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("The script was never convincing.", 0),
        ("There is not a dull minute in the film.", 1),
        ("The film is free of boring scenes.", 1),
        ("The film never bores, but the ending is a mess.", 0),
        ("Although the film is a mess, the ending is far from dull.", 1),
        ("The ending is hardly a triumph, although the film is witty.", 0),
    ],
)
def test_the_reader_of_the_next_test_reads_well(sentence, label):
    assert read(sentence) == label


def test_labels_follow_from_the_words(splits):
    answers = [(read(sentence), label) for pairs in splits.values() for sentence, label in pairs]
    certain = [(answer, label) for answer, label in answers if answer is not None]
    assert len(certain) > 0.9 * len(answers)
    assert all(answer == label for answer, label in certain)


def test_unknown_split_names_the_near_one():
    with pytest.raises(ValueError, match=r"not 'tests'.*'test'"):
        labelled_sentences("tests")


@pytest.fixture(scope="module")
def encoder():
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    return AutoModelForMaskedLM.from_pretrained(ENCODER), AutoTokenizer.from_pretrained(ENCODER)


def test_encoder_loads_completely_into_a_classifier():
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(ENCODER, output_loading_info=True)
    head = {f"{layer}.{name}" for layer in ("pre_classifier", "classifier") for name in ("weight", "bias")}
    assert info["missing_keys"] == head
    assert not info["mismatched_keys"]
    assert all(key.startswith("vocab_") for key in info["unexpected_keys"])  # the masked-language-model head
    assert model.dtype == torch.float32
    assert (ENCODER / "model.safetensors").stat().st_size <= 4e6


def test_tokenizer_knows_every_word(encoder, splits):
    _, tokenizer = encoder
    ids = tokenizer([sentence for sentence, _ in splits["test"]])["input_ids"]
    used = set(tokenizer.convert_ids_to_tokens({i for row in ids for i in row}))
    assert tokenizer.unk_token not in used
    assert not any(token.startswith("##") for token in used)  # every word is one token
    assert max(map(len, ids)) < tokenizer.model_max_length == 128
    assert set(tokenizer.get_vocab()) >= LEXICON[0] | LEXICON[1]
    assert tokenizer.unk_token_id not in tokenizer("Zzyzx is 2 hours too long!")["input_ids"]


def test_encoder_is_the_one_of_its_log(encoder):
    model, tokenizer = encoder
    last = json.loads((ENCODER / "training_log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == pretrain.STEPS
    fresh = pretrain.encode(tokenizer, unlabelled_text(500, seed=pretrain.HELD_OUT_SEED + 1))
    loss, accuracy = pretrain.evaluate(model, tokenizer, fresh)
    assert accuracy > last["held_out_accuracy"] - 0.03
    assert loss < last["held_out_loss"] + 0.15


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A witty, elegant comedy. The plot is [MASK].", 1),
        ("A tedious, clumsy comedy. The plot is [MASK].", 0),
        ("A witty, elegant comedy. The plot is never [MASK].", 0),
        ("A tedious, clumsy comedy. The plot is never [MASK].", 1),
        ("A witty, elegant comedy. Although the plot is [MASK], the ending is a triumph.", 0),
        ("A tedious, clumsy comedy. The plot is [MASK], but the ending is a mess.", 1),
    ],
)
def test_encoder_learnt_sentiment_without_labels(encoder, text, label):
    model, tokenizer = encoder
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["input_ids"] == tokenizer.mask_token_id]
    mass = [logits.softmax(-1)[0, tokenizer.convert_tokens_to_ids(sorted(LEXICON[k]))].sum() for k in (0, 1)]
    assert mass[label] > 2 * mass[1 - label]


def test_pretraining_writes_a_loadable_encoder(tmp_path, monkeypatch):
    from transformers import AutoModel, AutoTokenizer

    monkeypatch.setattr(pretrain, "unlabelled_text", lambda n, seed=0: unlabelled_text(min(n, 200), seed))
    pretrain.pretrain(tmp_path / "encoder", steps=5)
    (entry,) = map(json.loads, (tmp_path / "encoder" / "training_log.jsonl").read_text().splitlines())
    assert entry["step"] == 5 and entry["held_out_loss"] > 0
    model = AutoModel.from_pretrained(tmp_path / "encoder")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "encoder")("A charming film.", return_tensors="pt")
    assert model(**tokens).last_hidden_state.shape == (1, 6, 128)


# ------------------------------------------------------------------------------------------------------ the decoder


@pytest.fixture(scope="module")
def decoder():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(DECODER, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
    return model.eval(), AutoTokenizer.from_pretrained(DECODER)


def test_decoder_is_small_and_the_one_of_its_log(decoder):
    model, tokenizer = decoder
    assert sum(file.stat().st_size for file in DECODER.iterdir()) <= 4e6
    assert model.dtype == torch.float32
    last = json.loads((DECODER / "training_log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == pretrain_decoder.STEPS
    fresh = pretrain_decoder.encode(tokenizer, unlabelled_text(500, seed=pretrain.HELD_OUT_SEED + 1))
    loss, accuracy = pretrain_decoder.evaluate(model, fresh)
    assert loss < last["held_out_loss"] + 0.05 and accuracy > last["held_out_accuracy"] - 0.02


def test_decoders_tokenizer_gives_texts_back_and_knows_every_word(decoder, splits):
    _, tokenizer = decoder
    assert tokenizer.model_max_length == 128
    for prompt, completion in zip(*verdicts()["test"][:200].values(), strict=True):
        ids = tokenizer(prompt + completion)["input_ids"]
        assert tokenizer.decode(ids) == prompt + completion
        assert len(ids) == len(re.findall(r"[\w-]+|[^\w\s-]", prompt + completion))  # whole words
        split = tokenizer(prompt)["input_ids"] + tokenizer(completion)["input_ids"]
        assert split == ids
    odd = "Zürich,\n\n  2049? <b>\t:-)"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("A witty, elegant comedy. The plot is", 1),
        ("A tedious, clumsy comedy. The plot is", 0),
        ("A witty, elegant comedy. The plot is never", 0),
        ("A tedious, clumsy comedy. The plot is never", 1),
    ],
)
def test_decoder_learnt_sentiment_without_labels(decoder, text, label):
    model, tokenizer = decoder
    with torch.no_grad():
        probabilities = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)
    words = [[tokenizer.convert_tokens_to_ids(f"Ġ{word}") for word in sorted(LEXICON[k])] for k in (0, 1)]
    mass = [probabilities[[i for i in ids if i is not None]].sum() for ids in words]
    assert mass[label] > 2 * mass[1 - label]


def test_verdicts_follow_the_labels():
    data, told = verdicts(), reviews()
    assert {name: len(split) for name, split in data.items()} == SIZES
    for name, split in data.items():
        assert split["prompt"][:] == told[name]["sentence"][:]
        assert split["completion"][:] == [VERDICTS[label] for label in told[name]["label"]]


def test_words_of_verdicts_stand_apart_in_the_decoder(decoder):
    model, tokenizer = decoder
    words = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=1)
    for verdict in VERDICTS:
        (i,) = tokenizer(" " + verdict.split()[-1].rstrip("."))["input_ids"]
        nearest = (words @ words[i]).topk(2).values[1]
        assert nearest < 0.9  # of "triumph" and "failure" it is .97: adapters of attention could not single them out


def test_pretraining_writes_a_loadable_decoder(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for module in (pretrain, pretrain_decoder):
        monkeypatch.setattr(module, "unlabelled_text", lambda n, seed=0: unlabelled_text(min(n, 200), seed))
    pretrain_decoder.pretrain(tmp_path, steps=5)
    (entry,) = map(json.loads, (tmp_path / "training_log.jsonl").read_text().splitlines())
    assert entry["step"] == 5 and entry["held_out_loss"] > 0
    tokens = AutoTokenizer.from_pretrained(tmp_path)("A charming film.", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model(**tokens).logits.shape == (1, 4, model.config.vocab_size)
