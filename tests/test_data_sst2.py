"""SST2DataModule: validation on sentences that were not trained on."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import save_tokenizer
from datasets import Dataset
from jsonargparse import ArgumentParser

from lit_peft.data import SST2DataModule, TextClassificationDataModule
from lit_peft.data.sst2 import group_phrases

SHARED = Path(os.environ.get("LIT_PEFT_SHARED", Path(__file__).parents[2] / "shared")) / "data" / "sst2"


def treebank(sentences: int, seed: int = 0) -> dict[str, list[Any]]:
    """Sentences of 12 words with all their halves, quarters and single words, in random order."""
    rng = np.random.default_rng(seed)
    phrases: list[tuple[str, int]] = []
    for sentence in range(sentences):
        words = [f"w{n}" for n in rng.integers(0, 5000, 12)]
        spans = [(at, at + size) for size in (12, 6, 3, 1) for at in range(0, 12, size)]
        phrases += [(" ".join(words[start:end]) + " ", sentence % 2) for start, end in spans]
    order = rng.permutation(len(phrases))
    return {"sentence": [phrases[i][0] for i in order], "label": [phrases[i][1] for i in order]}


def overlaps(phrases: list[str], others: list[str], min_tokens: int = 4) -> int:
    """How many phrases contain one of the others or are contained in one, by brute force."""
    padded = [f" {other.strip()} " for other in others if len(other.split()) >= min_tokens]
    own = [f" {phrase.strip()} " for phrase in phrases if len(phrase.split()) >= min_tokens]
    return sum(any(phrase in other or other in phrase for other in padded) for phrase in own)


def test_groups() -> None:
    phrases = [
        "a film of great charm and little else",  # 0
        "of great charm and",  # 1: in 0
        "great charm",  # 2: short, in group 0 alone
        "film",  # 3: short, in both groups
        "another film about a boy and his dog",  # 4
        "a boy and his dog",  # 5: in 4
        "a boy and his dog",  # 6: the same again
        "of one mind",  # 7: short, in no other
        "reat charm and litt",  # 8: characters are not tokens
        "quite something else for once",  # 9: alone
    ]
    groups = group_phrases(phrases)
    assert groups[0] == groups[1] == groups[2] and groups[4] == groups[5] == groups[6]
    assert groups[3] == -1
    assert len({-1, groups[0], groups[4], groups[7], groups[8], groups[9]}) == 6


def test_a_phrase_of_two_sentences_joins_them() -> None:
    phrases = ["one two three four five", "zero one two three four", "one two three four"]
    assert len(set(group_phrases(phrases))) == 1
    assert len(set(group_phrases(phrases[:2]))) == 2


def test_validation_sentences_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = treebank(200)
    data = SST2DataModule("here", val_fraction=0.1)
    monkeypatch.setattr(data, "load", lambda: {"train": Dataset.from_dict(columns)})
    cut = data._cut
    texts, labels = np.array(columns["sentence"]), np.array(columns["label"])
    train, val = texts[cut["train"]].tolist(), texts[cut["val"]].tolist()
    assert len(train) + len(val) == len(texts) and 0.08 < len(val) / len(texts) < 0.12
    assert overlaps(val, train) == 0
    assert abs(labels[cut["val"]].mean() - 0.5) < 0.06
    rng = np.random.default_rng(0).permutation(len(texts))
    assert overlaps(texts[rng[: len(val)]].tolist(), texts[rng[len(val) :]].tolist()) > 0.5 * len(val) / 3


def test_the_cut_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def val(seed: int) -> list[int]:
        data = SST2DataModule("here", seed=seed)
        monkeypatch.setattr(data, "load", lambda: {"train": Dataset.from_dict(treebank(60))})
        return data._cut["val"].tolist()

    assert val(0) == val(0) != val(1)


def test_texts_that_cannot_be_separated(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [f"w{n}" for n in range(40)]
    phrases = [" ".join(whole[at : at + 8]) for at in range(32)] + [" ".join(whole)]
    data = SST2DataModule("here")
    split = Dataset.from_dict({"sentence": phrases, "label": [0, 1, 1] * 11})
    monkeypatch.setattr(data, "load", lambda: {"train": split})
    with pytest.raises(ValueError, match=r"contain each other too much .* set data\.val_split"):
        _ = data._cut


def test_files_of_other_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    data = SST2DataModule("here")
    split = Dataset.from_dict({"text": ["w1"], "label": [-1]})
    monkeypatch.setattr(data, "load", lambda: {"train": split})
    with pytest.raises(ValueError, match=r"No column .sentence. .*--data.text_column\); there are: text, label"):
        _ = data._cut
    data.text_column = "text"
    with pytest.raises(ValueError, match="1 of 1 examples in split 'train' of here have no label"):
        _ = data._cut


def test_files_of_the_same_columns(tmp_path: Path) -> None:
    """Validation is the test; with splits of its own, nothing is cut."""
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    folder = tmp_path / "data"
    folder.mkdir()
    for name, seed in (("train", 0), ("validation", 1), ("test", 2)):
        columns = treebank(30, seed)
        if name == "test":
            columns["label"] = [-1] * len(columns["label"])
        Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    data = SST2DataModule(str(folder), tokenizer=tokenizer)
    data.setup("fit")
    data.setup("test")
    assert data.label_names == ["negative", "positive"]
    assert data._rows("test")[0] == "validation" and len(data._rows("val")[1]) < len(data._rows("train")[1])
    own = SST2DataModule(str(folder), tokenizer=tokenizer, val_split="validation", test_split="test")
    own.setup("fit")
    assert len(own._rows("train")[1]) == 30 * 19
    with pytest.raises(ValueError, match="choose another split"):
        own.setup("test")


def test_the_command_line_knows_every_argument() -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(TextClassificationDataModule, "data")
    options = ["--data=SST2DataModule", "--data.path=here", "--data.limit_val=7", "--data.tokenizer=null"]
    data = parser.instantiate(parser.parse_args(options)).data
    assert isinstance(data, SST2DataModule)
    expected = dict(TextClassificationDataModule(path="here", limit_val=7).hparams)
    changed = {"text_column": "sentence", "test_split": "validation", "val_fraction": 0.05}
    assert dict(data.hparams) == expected | changed


@pytest.mark.skipif(not SHARED.is_dir(), reason="the published SST-2 is not in $LIT_PEFT_SHARED or ../shared")
def test_the_published_data() -> None:
    data = SST2DataModule(str(SHARED))
    texts = np.array(data._splits["train"]["sentence"][:])
    cut = data._cut
    assert (len(cut["train"]), len(cut["val"])) == (63_982, 3_367)
    assert len(data._rows("test")[1]) == 872
    groups = group_phrases(texts.tolist())
    assert len(np.unique(groups[groups >= 0])) == 6_722 and (groups >= 0).sum() == 63_277
    rng = np.random.default_rng(0)
    assert overlaps(rng.choice(texts[cut["val"]], 150, replace=False).tolist(), texts[cut["train"]].tolist()) == 0
    labels = data._codes("train")
    assert abs(labels[cut["val"]].mean() - labels[cut["train"]].mean()) < 0.02
