"""`lit_peft.hub`: local paths, the cache, and a hub that is or is not there."""

import errno
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

from lit_peft import hub
from lit_peft.data import TextClassificationDataModule
from lit_peft.data import __all__ as data_modules
from lit_peft.data.splits import load_splits
from lit_peft.tasks.loading import load_classifier


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """An empty folder to stand in, an empty cache, no variable that decides for us, and a hub that refuses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / ".cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".prepared"))
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    _use(monkeypatch, refused)


def _use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """What HF_ENDPOINT does where it is set before these packages are imported, through a session of today."""
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", endpoint)
    huggingface_hub.utils.close_session()


class _Hub(BaseHTTPRequestHandler):
    """Answers by the name of the repository that is asked for."""

    def do_HEAD(self) -> None:
        if "/breaks" in self.path and self.server.seen.count(self.path):  # type: ignore[attr-defined]
            self.close_connection = True
            return
        self.server.seen.append(self.path)  # type: ignore[attr-defined]
        code = next((code for word, code in _CODES.items() if word in self.path), 200)
        self.send_response(code)
        if code in (403, 404):
            self.send_header("X-Error-Code", "GatedRepo" if code == 403 else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *arguments: object) -> None: ...


_CODES = {"/gated": 403, "/absent": 404, "/busy": 503}


@pytest.fixture
def hub_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.daemon_threads, server.seen = True, []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def refused() -> Iterator[str]:
    """The address of a port that nothing listens at; it is held, so that nothing else can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """The address of a port that accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(params=["refused", "silent", "a refused proxy", "a silent proxy", "no name", "nonsense", "busy"])
def dead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, refused: str, silent: str) -> str:
    """Makes the hub unreachable in one way; the name of a repository to ask for."""
    kind = request.param
    if "proxy" in kind:
        monkeypatch.setenv("HTTP_PROXY", refused if "refused" in kind else silent)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
    endpoints = {"refused": refused, "silent": silent, "nonsense": "mirror", "busy": None}
    endpoint = endpoints.get(kind, "http://hub.invalid")
    _use(monkeypatch, endpoint or request.getfixturevalue("hub_server"))
    return "org/busy" if kind == "busy" else "org/thing"


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
    monkeypatch.setattr(hub, "_hub_answers", lambda *_: pytest.fail("asked the hub"))
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


@pytest.mark.parametrize("name", ["distilbert-base-uncased", "org/gated", "org/absent"])
def test_a_hub_that_answers_gets_the_id(monkeypatch: pytest.MonkeyPatch, hub_server: str, name: str) -> None:
    """Whatever it answers: the user's token, which the libraries know, may open what is closed."""
    _use(monkeypatch, hub_server)
    assert hub.locate(name) == hub.locate(name, what="dataset") == name


def test_a_proxy_that_answers_is_used(monkeypatch: pytest.MonkeyPatch, hub_server: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", hub_server)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    _use(monkeypatch, "http://hub.invalid")
    assert hub.locate("gpt2") == "gpt2"


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_a_dead_hub_fails_within_5_seconds_and_says_what_to_do(dead: str, what: Any) -> None:
    start = time.monotonic()
    with pytest.raises(ConnectionError) as error:
        (tokenizer_of if what == "model" else load_splits)(dead)
    assert time.monotonic() - start < 5
    key = "model.backbone" if what == "model" else "data.path"
    proxy = " through your proxy" if "HTTP_PROXY" in os.environ else ""
    why = f"{huggingface_hub.constants.ENDPOINT} cannot be reached{proxy},"
    for part in (repr(dead), why, "--config offline", f"`{key}` to a local folder"):
        assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def tokenizer_of(name: str) -> Any:
    return TextClassificationDataModule(tokenizer=name).tokenizer


def classifier_of(name: str) -> Any:
    return load_classifier(name, ["a", "b"], torch.float32)


@pytest.mark.parametrize("load, what", [(tokenizer_of, "model"), (classifier_of, "model"), (load_splits, "dataset")])
@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("org/absent", FileNotFoundError, "no local path 'org/absent', and no {} of that name"),
        ("org/gated", FileNotFoundError, "The {} 'org/gated' is gated: ask for access at"),
        ("org/breaks", ConnectionError, "cannot be reached, and the {} is not in the Hugging Face cache"),
    ],
)
def test_what_a_hub_refuses_is_told_in_a_few_lines(
    monkeypatch: pytest.MonkeyPatch, hub_server: str, load: Any, what: str, name: str, kind: Any, message: str
) -> None:
    _use(monkeypatch, hub_server)
    start = time.monotonic()
    with pytest.raises(kind, match=message.format(what)) as error:
        load(name)
    assert time.monotonic() - start < 5
    assert name in str(error.value) and len(str(error.value).splitlines()) <= 3


@pytest.mark.parametrize("load", [tokenizer_of, classifier_of])
def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, load: Any) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty") as error:
        load("empty")
    assert len(str(error.value).splitlines()) == 1


def test_a_full_disk_is_not_taken_for_the_hub() -> None:
    with pytest.raises(OSError, match="No space left") as error, hub.explained("org/thing"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.errno == errno.ENOSPC


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_variables_rule_the_hub_out(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setattr(hub, "_hub_answers", lambda *_: pytest.fail("asked the hub"))
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


def test_imports_are_cheap() -> None:
    code = (
        "import sys, lit_peft.hub, lit_peft.data; "
        "heavy = {'torch', 'transformers', 'datasets', 'lightning', 'huggingface_hub'} & set(sys.modules); "
        "assert not heavy, heavy; print(dir(lit_peft.data))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(sorted(data_modules))
