"""The service as a process: kills, slow clients, the end of a process, the command."""

from __future__ import annotations

import contextlib
import http.client
import json
import multiprocessing
import os
import signal
import socket
import time

import numpy as np
import pytest

pytest.importorskip("uvicorn")

import semid
from semid.catalogue.bundle import CatalogueBundle
from semid.serve import run
from semid.serve.app import create_app
from semid.serve.limits import ServeOptions
from serve_cases import PUBLISHED, make_shop

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["semid.serve.app", "semid.serve.run", "semid.tokenizers.rqkmeans"]
)


def serve_child(shop, port, options):
    run.HEADER_SECONDS = 0.4
    app = create_app(shop.bundle, shop.tokenizer, options=ServeOptions(**options))
    run.serve(app, port=port)


@contextlib.contextmanager
def served(shop, port=None, **options):
    """Run the service in a process; yields it with its port, and kills it at the end."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    process = PROCESSES.Process(target=serve_child, args=(shop, port, {"watch": 0, **options}))
    process.start()
    try:
        until = time.monotonic() + 120
        while True:
            assert process.is_alive()
            assert time.monotonic() < until
            with contextlib.suppress(OSError):
                if ask(port, "GET", "/readyz")[0] == 200:
                    break
            time.sleep(0.02)
        yield process, port
    finally:
        process.kill()
        process.join()


def ask(port, method, path, body=None, timeout=60.0):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, None if body is None else json.dumps(body))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except http.client.HTTPException as error:
        raise OSError(str(error)) from None
    finally:
        connection.close()


def check_kills(shop, kills, seed):
    """Kill the service at random moments while items are added, until all are published."""
    before = CatalogueBundle(shop.bundle).read()
    last = PUBLISHED + max(30, kills)
    waiting = list(range(PUBLISHED, last))
    answers, generator, count = {}, np.random.default_rng(seed), 0
    while waiting or count < kills:
        with served(shop) as (process, port):
            life = time.monotonic() + generator.uniform(0, 0.15)
            killed = False
            while waiting or not killed:
                # Items of before are sent again, as by a client that did not hear of them.
                again = generator.integers(0, last - len(waiting), 1).tolist()
                rows = sorted({*waiting[:1], *again})
                if count < kills and not killed and time.monotonic() > life:
                    os.kill(process.pid, signal.SIGKILL)
                    killed = True
                body = {
                    "embeddings": shop.x[rows].tolist(),
                    "item_ids": [shop.names[row] for row in rows],
                }
                try:
                    status, answer = ask(port, "POST", "/v1/items", body)
                except OSError:
                    break
                assert status == 200, answer
                for item in answer["items"]:
                    assert answers.setdefault(item["item_id"], item["codes"]) == item["codes"]
                del waiting[:1]
                if not waiting and count >= kills:
                    break
            count += killed
    after = CatalogueBundle(shop.bundle).read()
    assert sorted(after.items.strings().to_pylist()) == sorted(shop.names[:last])
    assert np.array_equal(after.codes[:PUBLISHED], before.codes)
    assert len(np.unique(after.codes, axis=0)) == len(after)
    for name, codes in answers.items():
        assert after.lookup(name).tolist() == codes
    assert count == kills


def test_kills_lose_and_double_nothing(tmp_path):
    check_kills(make_shop(tmp_path), 2, seed=0)


@pytest.mark.slow
def test_a_hundred_kills_lose_and_double_nothing(tmp_path):
    check_kills(make_shop(tmp_path), 100, seed=1)


def test_slow_clients_are_cut_off_and_others_are_served(tmp_path):
    head = b"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\n"
    with contextlib.ExitStack() as stack, served(make_shop(tmp_path), timeout=0.5) as (_, port):

        def connect(sent):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30))
            connection.sendall(sent)
            return connection

        starts = [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: loc"]
        idle = [connect(starts[place % 3]) for place in range(20)]
        slow = connect(head + b"Content-Length: 90\r\n\r\n{")
        assert ask(port, "GET", "/livez")[0] == 200
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
        for each in idle:  # the server ends each of them
            while each.recv(4096):
                pass
        huge = connect(head + b"Content-Length: 99999999999\r\n\r\n{")
        assert huge.recv(4096).startswith(b"HTTP/1.1 413")
        endless = connect(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 100_000)
        assert endless.recv(4096) == b""
        assert connect(b"NONSENSE\r\n\r\n").recv(4096).startswith(b"HTTP/1.1 400")
        assert ask(port, "GET", "/livez")[0] == 200


def test_a_connection_is_kept_between_requests_and_not_for_ever(tmp_path):
    with served(make_shop(tmp_path)) as (_, port), contextlib.ExitStack() as stack:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        stack.callback(connection.close)
        for _ in range(4):
            connection.request("GET", "/livez")
            assert connection.getresponse().read()
            time.sleep(0.25)
        assert connection.sock.recv(10) == b""


def test_the_end_finishes_what_has_begun(tmp_path):
    shop = make_shop(tmp_path)
    # A lone request waits a second for others: time to ask for the end.
    with served(shop, batch_wait=1.0) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/encode", json.dumps({"embeddings": shop.x[:1].tolist()}))
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGTERM)
        response = connection.getresponse()
        assert response.status == 200
        codes = shop.tokenizer.encode(shop.x[:1]).codes
        assert json.loads(response.read())["codes"] == codes.tolist()
        connection.close()
        process.join(60)
        assert process.exitcode == 0


def test_the_command(tmp_path, capsys, monkeypatch):
    from semid.cli.app import main

    shop, calls = make_shop(tmp_path), []
    monkeypatch.setattr(
        "semid.serve.run.serve", lambda app, **options: calls.append((app, options))
    )

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main(["serve", *map(str, words)])
        return ended.value.code or 0, capsys.readouterr().err

    given = [shop.bundle, "--model", shop.model, "--items", shop.items]
    assert call(*given, "--port", 0, "--max-rows", 7) == (0, "")
    app, options = calls.pop()
    assert options == {"host": "127.0.0.1", "port": 0}
    assert app.state.service.options.max_rows == 7
    (tmp_path / "token").write_text("\n")
    for words, message in [
        ((*given, "--token-file", tmp_path / "token"), "is empty; write a token"),
        ((*given, "--token-file", tmp_path / "none"), "cannot be read"),
        ((*given, "--max-rows", 0), "max_rows=0: give"),
        ((*given, "--retriever", shop.model), "semid retrieve"),
        ((tmp_path, "--model", shop.model), "holds no manifest"),
        ((shop.bundle, "--model", shop.bundle), "config.json"),
        (("s3://b/bundle", "--model", shop.model), "give a path on this machine"),
    ]:
        code, said = call(*words)
        assert code in (1, 2)
        assert said.startswith("error: ")
        assert message in said
    other = semid.RQKMeans(levels=2, codebook_size=8, seed=0).fit(shop.x)
    other.save(tmp_path / "other")
    code, said = call(shop.bundle, "--model", tmp_path / "other")
    assert code == 1
    assert "another codebook" in said
    assert calls == []


def test_a_port_that_is_taken_is_explained(tmp_path):
    shop = make_shop(tmp_path)
    app = create_app(shop.bundle, shop.tokenizer)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(semid.errors.UsageError, match="choose another --port"):
            run.serve(app, port=port)
