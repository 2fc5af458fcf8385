"""Models on a Hugging Face Hub: pushed and loaded over HTTP, from an endpoint made here."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import numpy as np
import pytest

import semid
from cli_cases import run
from rank_cases import QUICK, codes, data
from semid.errors import ArtefactError, MissingExtraError, UsageError
from semid.hub import is_hub_name

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
pytestmark = pytest.mark.filterwarnings("ignore")


class Hub(BaseHTTPRequestHandler):
    """The part of the Hub's interface that creating, committing and downloading use."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]
    tokens: list[str | None]
    private: dict[str, object]

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def answer(self, document: object, status: int = 200, **headers: str) -> None:
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self) -> None:
        self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlparse(self.path).path
        self.tokens.append(self.headers.get("Authorization"))
        if path == "/api/repos/create":
            given = json.loads(content)
            name = f"{given['organization']}/{given['name']}"
            if given["organization"] == "forbidden":
                self.answer({"error": "no rights"}, 403)
                return
            self.private.setdefault(name, given.get("visibility", given.get("private")))
            self.repositories.setdefault(name, {})
            self.answer({"url": f"http://{self.headers['Host']}/{name}", "name": name})
            return
        if path == "/api/validate-yaml":  # the card's metadata, before the commit
            self.answer({"errors": [], "warnings": []})
            return
        _, _, _, owner, short, action, *_ = path.split("/")
        name = f"{owner}/{short}"
        if action == "preupload":
            files = json.loads(content)["files"]
            plain = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.answer({"files": plain, "commitUrl": "-"})
        elif action == "commit":
            for line in content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            url = f"http://{self.headers['Host']}/{name}/commit/{'a' * 40}"
            self.answer({"commitUrl": url, "commitOid": "a" * 40, "success": True})
        else:
            self.answer({}, 404)

    def do_GET(self) -> None:
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            files = self.repositories.get("/".join(parts[2:4]))
            if files is None:
                self.missing()
            elif "tree" in parts:
                listed = [
                    {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for p, c in files.items()
                ]
                self.answer(listed)
            else:
                siblings = [{"rfilename": path} for path in files]
                self.answer({"id": "/".join(parts[2:4]), "sha": "a" * 40, "siblings": siblings})
            return
        files, name = self.repositories.get("/".join(parts[:2])), "/".join(parts[4:])
        if files is None or name not in files:
            self.missing()
            return
        etag = f'"{hashlib.sha1(files[name]).hexdigest()}"'
        self.answer(files[name], ETag=etag, X_Repo_Commit="a" * 40)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[type[Hub]]:
    """Serve an empty Hub on the loopback device, with an empty cache."""
    handler = type("OneHub", (Hub,), {"repositories": {}, "tokens": [], "private": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)


def test_a_tokenizer_comes_back_with_its_metrics_in_the_card(hub, x, tmp_path, capsys):
    model = semid.RQKMeans(levels=2, codebook_size=8, seed=0).fit(x)
    url = model.push_to_hub("shop/items", private=True, token="hf_mine")
    assert url.endswith("/shop/items/commit/" + "a" * 40)
    assert set(hub.repositories) == {"shop/items"}
    assert hub.private["shop/items"] in (True, "private")
    assert set(hub.tokens) == {"Bearer hf_mine"}
    files = hub.repositories["shop/items"]
    assert set(files) == {"config.json", "model.safetensors", "README.md"}
    loaded = semid.load("shop/items")
    assert loaded.weights_fingerprint == model.weights_fingerprint
    assert np.array_equal(loaded.encode(x).codes, model.encode(x).codes)
    # The card as the Hub reads it.
    text = files["README.md"].decode()
    card = huggingface_hub.ModelCard(text)
    assert card.data.library_name == "semid"
    assert {"semantic-ids", "rqkmeans"} <= set(card.data.tags)
    metrics = {each.metric_type: each.metric_value for each in card.data.eval_results}
    expected = {k: v for k, v in model.report.figures.items() if v is not None}
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-6)
    assert 'semid.load("shop/items")' in text
    # The same from the command line, without a folder of that name.
    np.save(tmp_path / "x.npy", x)
    assert run("encode", "shop/items", "x.npy", "-o", "ids.parquet", "-q") == 0
    assert np.array_equal(semid.SemanticIds.read("ids.parquet").codes, model.encode(x).codes)
    capsys.readouterr()


def test_rankers_can_be_pushed_too(hub):
    ranker = semid.train_ranker(data(), ids=codes(), training={**QUICK, "epochs": 1})
    ranker.push_to_hub("shop/clicks")
    card = huggingface_hub.ModelCard(hub.repositories["shop/clicks"]["README.md"].decode())
    metrics = {each.metric_type: each.metric_value for each in card.data.eval_results}
    assert metrics["test_auc"] == pytest.approx(ranker.report["test"]["auc"], abs=1e-6)
    assert semid.load("shop/clicks").report["test"] == ranker.report["test"]


def test_what_cannot_be_pushed_or_loaded_is_one_sentence(hub, x, tmp_path, monkeypatch):
    model = semid.RQKMeans(levels=1, codebook_size=4).fit(x)
    for name in ("items", "a/b/c", "shop/", "../items", "shop/it ems"):
        with pytest.raises(UsageError, match="give ORG/NAME"):
            model.push_to_hub(name)
    with pytest.raises(UsageError, match="'forbidden/items' cannot be written"):
        model.push_to_hub("forbidden/items")
    with pytest.raises(semid.SemidError, match="not fitted"):
        semid.RQKMeans().push_to_hub("shop/none")
    assert hub.repositories == {}
    with pytest.raises(ArtefactError, match="'shop/none' is no folder here, and cannot be read"):
        semid.load("shop/none")
    with pytest.raises(UsageError, match="revision= is for"):
        semid.load(tmp_path, revision="main")
    model.push_to_hub("shop/items")
    hub.repositories["shop/items"]["config.json"] = b"{}"
    with pytest.raises(ArtefactError, match="not a semid config"):
        semid.load("shop/items")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    for call in (lambda: model.push_to_hub("shop/items"), lambda: semid.load("shop/items")):
        with pytest.raises(MissingExtraError, match=r"semid\[hub\]"):
            call()


def test_folders_come_before_repositories(x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("models/one")
    assert not is_hub_name("one")
    assert not is_hub_name("./models/one")
    assert not is_hub_name(tmp_path / "one")
    Path("models").mkdir()
    assert not is_hub_name("models/one")  # a mistyped name of a folder here asks nobody
    with pytest.raises(ArtefactError, match="does not exist"):
        semid.load("models/one")
