"""`lit_peft.hub.locate`: local paths, the cache, and a hub that is or is not there."""

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lit_peft import hub


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder to stand in, an empty cache, and no variable that decides for us."""
    import datasets
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".prepared"))
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr(socket, "create_connection", _unreachable)


def _unreachable(*args: object) -> None:
    raise OSError("Name or service not known")


class _Connection:
    def close(self) -> None: ...


def _cache(root: Path, folder: str) -> Path:
    snapshot = root / ".cache" / folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = root / ".cache" / folder / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    return snapshot


@pytest.mark.parametrize("name", ["models", "./models", "models/", "models/bert"])
def test_existing_path_becomes_absolute(tmp_path: Path, name: str) -> None:
    (tmp_path / "models" / "bert").mkdir(parents=True)
    assert hub.locate(name) == str(tmp_path / name.removeprefix("./"))


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.locate("~/models") == str(tmp_path / "models")


@pytest.mark.parametrize(
    "name", ["./modles", "/nowhere/at/all", "~/nothing-here", "reviews.csv", "a/b/c", "models/nope"]
)
def test_what_can_only_be_a_path_never_asks_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(hub, "_hub_is_reachable", lambda: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="No such file or folder"):
        hub.locate(name)


def test_a_missing_path_names_its_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    (tmp_path / "data" / "imdb").mkdir()
    with pytest.raises(FileNotFoundError, match=r"nearest: .*data/sst2"):
        hub.locate("data/sst3", what="dataset")
    with pytest.raises(FileNotFoundError, match="data holds imdb, sst2"):
        hub.locate("data/wikitext/train.parquet", what="dataset")


@pytest.mark.parametrize("name", ["", "two words", "namespace/", "a:b"])
def test_neither_path_nor_id(name: str) -> None:
    with pytest.raises(ValueError, match="neither an existing path nor a hub id"):
        hub.locate(name)


def test_demo_is_the_bundled_encoder() -> None:
    from transformers import AutoConfig

    folder = hub.locate("demo")
    assert AutoConfig.from_pretrained(folder).model_type == "distilbert"


def test_reachable_hub_gets_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(socket, "create_connection", lambda *a: calls.append(a) or _Connection())
    assert hub.locate("distilbert-base-uncased") == "distilbert-base-uncased"
    assert calls == [(("huggingface.co", 443), 3.0)]


@pytest.mark.parametrize("what, key", [("model", "model.backbone"), ("dataset", "data.path")])
def test_unreachable_hub_says_what_to_do(what: str, key: str) -> None:
    with pytest.raises(ConnectionError) as error:
        hub.locate("stanfordnlp/sst2", what=what)  # type: ignore[arg-type]
    for part in ("stanfordnlp/sst2", "huggingface.co cannot be reached", "--config offline", key):
        assert part in str(error.value)


def test_a_silent_network_costs_no_more_than_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(socket, "create_connection", lambda *a: release.wait(30) and _Connection())
    start = time.monotonic()
    with pytest.raises(ConnectionError):
        hub.locate("gpt2")
    release.set()
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_variables_rule_the_hub_out(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr(hub, "_hub_is_reachable", lambda: pytest.fail("asked the hub"))
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConnectionError, match=f"{variable} is set"):
        hub.locate("gpt2")


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("what", ["model", "dataset"])
def test_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, offline: bool) -> None:
    if offline:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = _cache(tmp_path, f"{what}s--org--thing")
    assert hub.locate("org/thing", what=what) == str(snapshot)  # type: ignore[arg-type]


def test_a_prepared_data_set_needs_no_network(tmp_path: Path) -> None:
    (tmp_path / ".prepared" / "Org___my_data").mkdir(parents=True)
    assert hub.locate("Org/MyData", what="dataset") == "Org/MyData"


def test_a_mirror_or_proxy_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert hub.locate("gpt2") == "gpt2"
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:1"})
    assert hub.locate("gpt2") == "gpt2"


def test_imports_are_cheap() -> None:
    code = (
        "import sys, lit_peft.hub, lit_peft.data; "
        "heavy = {'torch', 'transformers', 'datasets', 'lightning', 'huggingface_hub'} & set(sys.modules); "
        "assert not heavy, heavy; print(dir(lit_peft.data))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['SST2DataModule', 'TextClassificationDataModule']"
