"""The service: right answers in every format, one version per answer, and 4xx for nonsense."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

import semid
from catalogue_cases import drawn_tokenizer, parallel_tokenizer
from semid.catalogue.bundle import CatalogueBundle
from semid.errors import FingerprintError
from semid.serve.app import create_app
from semid.serve.batching import LARGE, BatchQueue, Refused
from semid.serve.bodies import ARROW, NPY
from semid.serve.limits import ServeOptions
from semid.serve.observe import JsonFormatter
from serve_cases import PUBLISHED, make_shop

SMALL = ServeOptions(max_rows=50, max_body_bytes=100_000, queue_rows=200, watch=0)


@pytest.fixture
def shop(tmp_path):
    return make_shop(tmp_path)


@pytest.fixture
def client(shop):
    app = create_app(shop.bundle, shop.tokenizer, items=shop.items, options=SMALL)
    with TestClient(app, base_url="http://localhost") as client:
        client.service = app.state.service
        yield client


def npy(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def arrow(table, **options):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def vectors(x, kind=None):
    return pa.array(x.tolist(), kind or pa.list_(pa.float32(), x.shape[1]))


def ok(response):
    assert response.status_code == 200, response.text
    assert response.headers["x-semid-version"] == str(response.json()["version"])
    return response.json()


def add(client, shop, start, stop, x=None):
    body = {
        "embeddings": (shop.x if x is None else x)[start:stop].tolist(),
        "item_ids": shop.names[start:stop],
    }
    return client.post("/v1/items", json=body)


# Answers ------------------------------------------------------------------------------------


def test_encode_in_every_format(client, shop):
    x = shop.x[:20]
    right = shop.tokenizer.encode(x)
    bodies = {
        "application/json": json.dumps({"embeddings": x.tolist()}).encode(),
        "application/x-www-form-urlencoded": json.dumps({"embeddings": x.tolist()}).encode(),
        NPY: npy(np.asfortranarray(x.astype(np.float64))),
        ARROW: arrow(pa.table({"embedding": vectors(x)})),
    }
    for kind, body in bodies.items():
        answer = ok(client.post("/v1/encode", content=body, headers={"content-type": kind}))
        assert answer["codes"] == right.codes.tolist(), kind
        assert np.allclose(answer["residual_norms"], right.residual_norms)
        accepted = {"content-type": kind, "accept": NPY}
        got = client.post("/v1/encode", content=body, headers=accepted)
        assert np.array_equal(np.load(io.BytesIO(got.content)), right.codes)
        got = client.post("/v1/encode", content=body, headers={**accepted, "accept": ARROW})
        with pa.ipc.open_stream(got.content) as reader:
            table = reader.read_all()
        assert table["codes"].to_pylist() == right.codes.tolist()
        assert table.schema.metadata == {b"version": b"1"}
    one = ok(client.post("/v1/encode", content=npy(x[3]), headers={"content-type": NPY}))
    assert one["codes"] == right.codes[3:4].tolist()


def test_encode_names_the_published_codes_of_known_items(client, shop):
    names = ["item-5", "new"]
    published = CatalogueBundle(shop.bundle).read()
    table = pa.table({"item_id": names, "embedding": vectors(shop.x[5:7], pa.list_(pa.float64()))})
    bodies = {
        "application/json": json.dumps({"embeddings": shop.x[5:7].tolist(), "item_ids": names}),
        ARROW: arrow(table),
    }
    for kind, body in bodies.items():
        answer = ok(client.post("/v1/encode", content=body, headers={"content-type": kind}))
        assert answer["item_ids"] == names
        assert answer["published"] == [published.lookup("item-5").tolist(), None]
        assert all(0 <= share <= 1 for share in answer["novelty"])


def test_decode_takes_ids_with_and_without_the_appended_token(client, shop):
    ids = CatalogueBundle(shop.bundle).read()
    right = shop.tokenizer.decode(ids)
    for codes in (ids.codes, ids.encoded):
        answer = ok(client.post("/v1/decode", json={"codes": codes[:9].tolist()}))
        assert np.allclose(answer["embeddings"], right[:9])


def test_items_by_id_and_prefix_and_what_follows(client, shop):
    ids = CatalogueBundle(shop.bundle).read()
    answer = ok(client.get("/v1/items", params={"id": ["item-7", "nobody"]}))
    assert answer["unknown"] == ["nobody"]
    assert answer["items"][0] == {
        "item_id": "item-7",
        "codes": ids.codes[7].tolist(),
        "residual_norm": float(ids.residual_norms[7]),
        "title": "Red <b>chair</b> number 7",
    }
    for prefix in ([], [3], ids.codes[0, :2].tolist(), ids.codes[0].tolist()):
        text = ".".join(map(str, prefix))
        rows = ids.with_prefix(prefix)
        answer = ok(client.get("/v1/items", params={"prefix": text, "limit": 1000}))
        assert answer["total"] == len(rows)
        assert {item["item_id"] for item in answer["items"]} == {ids.items[int(r)] for r in rows}
        second = ok(client.get("/v1/items", params={"prefix": text, "offset": 1, "limit": 2}))
        assert second["items"] == answer["items"][1:3]
        following = ok(client.get("/v1/next", params={"prefix": text}))
        counts = {}
        for code in ids.codes[rows, len(prefix)] if len(prefix) < ids.levels else ():
            counts[int(code)] = counts.get(int(code), 0) + 1
        assert dict(zip(following["codes"], following["items"], strict=True)) == counts
    assert ok(client.get("/v1/next?prefix=0.15.200"))["codes"] == []


def test_neighbors_are_the_nearest_quantized_vectors(client, shop):
    ids = CatalogueBundle(shop.bundle).read()
    quantized = shop.tokenizer.quantize(ids)
    distances = ((quantized - quantized[4]) ** 2).sum(1)
    text = ".".join(map(str, ids.codes[4].tolist()))
    answer = ok(client.get("/v1/neighbors", params={"codes": text, "k": 30}))["neighbors"]
    assert np.allclose([each["distance"] for each in answer], np.sort(distances)[:30], atol=1e-5)
    rows = ids.items.index_of([each["item_id"] for each in answer])
    assert np.allclose(distances[rows], np.sort(distances)[:30], atol=1e-5)


def test_the_page_holds_nothing_of_the_catalogue(client, shop):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert shop.names[0] not in page.text
    assert len(page.text) < 100_000


def test_health_and_openapi(client):
    model = ok(client.get("/v1/model"))
    assert model["tokenizer"] == "rqkmeans"
    assert model["codebook_sizes"] == [8, 16, 256]
    assert model["health"] in ("healthy", "warning", "unhealthy")
    assert ok(client.get("/readyz"))["ready"]
    assert ok(client.get("/livez"))["alive"]
    paths = client.get("/openapi.json").json()["paths"]
    assert {NPY, ARROW, "application/json"} == set(
        paths["/v1/encode"]["post"]["requestBody"]["content"]
    )
    assert "/v1/recommend" not in paths


# Nonsense -----------------------------------------------------------------------------------

GOOD = {"embeddings": [[0.0] * 6]}
J, F = "application/json", "application/x-www-form-urlencoded"


def raw(kind, body):
    return kind, body.encode() if isinstance(body, str) else body


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        ("encode", raw(J, "{"), 422, "Invalid JSON"),
        ("encode", raw(J, b"\xff\xfe"), 422, "JSON"),
        ("encode", raw(J, ""), 422, "JSON"),
        ("encode", raw(J, "[" * 50_000), 422, "recursion"),
        ("encode", raw(J, '{"embeddings": ' + "[" * 30_000), 422, "recursion"),
        ("encode", raw(J, json.dumps(GOOD | {"path": "/etc/passwd"})), 422, "path"),
        ("encode", raw(J, '{"embeddings": "items.parquet"}'), 422, "embeddings"),
        ("encode", raw(J, '{"embeddings": [["1"]]}'), 422, "embeddings.0.0"),
        ("encode", raw(J, '{"embeddings": []}'), 422, "give (items, 6)"),
        ("encode", raw(J, '{"embeddings": [[]]}'), 422, "(items, 6)|width 0"),
        ("encode", raw(J, '{"embeddings": [[1, 2], [1]]}'), 422, "different lengths"),
        ("encode", raw(J, '{"embeddings": [[1, 2]]}'), 422, "width 2, the model takes width 6"),
        ("encode", raw(J, '{"embeddings": [[NaN, 0, 0, 0, 0, 0]]}'), 422, "row 0 has NaN"),
        ("encode", raw(J, '{"embeddings": [[1e99, 0, 0, 0, 0, 0]]}'), 422, "beyond float32"),
        ("encode", raw(J, json.dumps(GOOD | {"item_ids": ["a", "b"]})), 422, "2 item_ids for 1"),
        ("encode", raw(J, json.dumps(GOOD | {"item_ids": [""]})), 422, "1 to 1024 bytes"),
        ("encode", raw(J, json.dumps(GOOD | {"item_ids": ["x" * 2000]})), 422, "1024 bytes"),
        ("encode", raw(J, '{"embeddings": [[0,0,0,0,0,0]], "item_ids": ["\\ud800"]}'), 422, ""),
        ("encode", raw(J, json.dumps({"embeddings": [[0] * 6] * 51})), 413, "51 rows"),
        ("encode", raw(J, b" " * 100_001), 413, "100,000 bytes"),
        ("encode", raw(NPY, b"\x93NUMPY"), 422, "no .npy"),
        ("encode", raw(NPY, npy(np.array([{}]))), 422, "holds object"),
        ("encode", raw(NPY, npy(np.zeros((2, 6), "U3"))), 422, "holds <U3"),
        ("encode", raw(NPY, npy(np.zeros((2, 6)))[:-1]), 422, "95 bytes of data"),
        ("encode", raw(NPY, npy(np.zeros((2, 6))).replace(b"(2, 6)", b"(2, 7)")), 422, "shape"),
        ("encode", raw(NPY, npy(np.zeros((2, 3, 1)))), 422, "shape"),
        ("encode", raw(NPY, npy(np.full((1, 6), np.inf))), 422, "row 0 has NaN, inf"),
        ("encode", raw(ARROW, b"ARROW1"), 422, "no Arrow IPC stream|compressed"),
        ("encode", raw(ARROW, arrow(pa.table({"x": [1]}))), 422, "no column 'embedding'"),
        ("encode", raw(ARROW, arrow(pa.table({"embedding": [[1, 2]]}))), 422, "no column"),
        ("decode", raw(J, '{"codes": []}'), 422, "at least one"),
        ("decode", raw(J, '{"codes": [[1]]}'), 422, "1 codes; an id of this model has 2"),
        ("decode", raw(J, '{"codes": [[1, 16]]}'), 422, "code 16 of level 2 is not in 0 to 15"),
        ("decode", raw(J, '{"codes": [[1, -1]]}'), 422, "code -1"),
        ("decode", raw(J, '{"codes": [[1, 99999999999999999999999]]}'), 422, "codes.0.1|code 9"),
        ("decode", raw(J, '{"codes": [[1, 1.5]]}'), 422, "codes.0.1"),
        ("items", raw(J, json.dumps(GOOD)), 422, "item_ids"),
        ("items", raw(J, json.dumps(GOOD | {"item_ids": None})), 422, "item_ids"),
        ("items", raw(NPY, npy(np.zeros((1, 6)))), 422, "item_ids are missing"),
        ("versions", raw(J, '{"version": 2}'), 404, "no version 2; its last is 1"),
        ("versions", raw(J, '{"version": "../1"}'), 422, "version"),
        ("versions", raw(J, '{"path": "s3://other"}'), 422, "version"),
        ("nowhere", raw(J, "{}"), 404, "Not Found"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_sentence(client, path, body, status, sentence):
    kind, data = body
    answer = client.post(f"/v1/{path}", content=data, headers={"content-type": kind})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(answer.json()) == {"error"}
    assert any(part in error for part in sentence.split("|"))
    assert "Traceback" not in error
    assert "\n" not in error
    assert len(error) < 300
    assert ok(client.post("/v1/encode", json=GOOD))["codes"]  # the service keeps answering


@pytest.mark.parametrize(
    "query",
    ["items", "items?id=a&prefix=1", "items?prefix=x", "items?prefix=1.2.3.4", "items?prefix=8",
     "items?prefix=1&limit=100000", "items?prefix=1&offset=-1", "next?prefix=-1",
     "next?prefix=1..2", "next?prefix=99999999999999999999", "neighbors",
     "neighbors?codes=1.1&k=501", "neighbors?codes=1", "search", "search?q=",
     "tree?level=1", "tree?prefix=a"],
)  # fmt: skip
def test_nonsense_in_queries_is_refused(client, query):
    answer = client.get(f"/v1/{query}")
    assert answer.status_code == 422
    assert answer.json()["error"]


def test_arrow_that_would_unpack_or_point_elsewhere_is_not_read(client, shop):
    x = shop.x[:20]
    table = pa.table({"embedding": vectors(x)})
    coded = pa.table({"item_id": pa.array(shop.names[:20]).dictionary_encode(), **dict(zip(
        ["embedding"], [vectors(x)], strict=True))})  # fmt: skip
    packed = pa.table({"embedding": pa.array([[0.0] * 6] * 50, pa.list_(pa.float32(), 6))})
    for body in (arrow(packed, compression="zstd"), arrow(packed, compression="lz4"), arrow(coded)):
        answer = client.post("/v1/encode", content=body, headers={"content-type": ARROW})
        assert answer.status_code == 422
        assert "compressed or has dictionaries" in answer.json()["error"]
    # Every byte of a stream changed, one at a time: an answer, or a sentence.
    body = arrow(
        pa.table({"item_id": shop.names[:3], "embedding": vectors(x[:3], pa.list_(pa.float32()))})
    )
    assert ok(client.post("/v1/encode", content=body, headers={"content-type": ARROW}))
    for place in range(0, len(body), 3):
        wrong = body[:place] + bytes([body[place] ^ 0xFF]) + body[place + 1 :]
        answer = client.post("/v1/encode", content=wrong, headers={"content-type": ARROW})
        assert answer.status_code in (200, 413, 422), (place, answer.text)
    answer = client.post("/v1/encode", content=arrow(table), headers={"content-type": ARROW})
    assert len(ok(answer)["codes"]) == 20


# Batching -----------------------------------------------------------------------------------


def test_concurrent_requests_share_engine_calls(client, shop):
    calls, encode = [], client.service.encode_queue.run
    gate = threading.Event()

    def watched(many):
        calls.append(sum(len(x) for x in many))
        gate.wait(5)
        return encode(many)

    client.service.encode_queue.run = watched
    right = shop.tokenizer.encode(shop.x).codes.tolist()
    with ThreadPoolExecutor(30) as pool:
        posts = [
            pool.submit(client.post, "/v1/encode", json={"embeddings": [shop.x[row].tolist()]})
            for row in range(30)
        ]
        while client.service.encode_queue.rows + sum(calls) < 30:
            time.sleep(0.005)
        gate.set()
        for row, post in enumerate(posts):
            assert ok(post.result())["codes"] == [right[row]]
    assert sum(calls) == 30
    assert len(calls) <= 3


def test_a_full_queue_refuses_and_recovers(client, shop):
    gate, encode = threading.Event(), client.service.encode_queue.run
    client.service.encode_queue.run = lambda many: gate.wait(20) and encode(many)
    body = {"embeddings": shop.x[:40].tolist()}
    # Two calls that wait take what came meanwhile, so how many requests fill the queue depends on
    # when they come: they go on until one is refused.
    with ThreadPoolExecutor(64) as pool:
        posts = [pool.submit(client.post, "/v1/encode", json=body)]
        while not any(post.done() for post in posts):
            posts.append(pool.submit(client.post, "/v1/encode", json=body))
            time.sleep(0.005)
        gate.set()
        answers = [post.result() for post in posts]
    refused = [each for each in answers if each.status_code == 429]
    assert refused
    assert all(each.headers["retry-after"] == "1" for each in refused)
    assert {each.status_code for each in answers} == {200, 429}
    assert ok(client.post("/v1/encode", json=body))


def test_large_batches_run_beside_each_other_and_small_ones_wait():
    together, sizes = threading.Barrier(2), []

    def work(many):
        sizes.append(sum(many))
        if sum(many) >= LARGE:
            together.wait(20)  # breaks unless two calls are under way
        return many

    async def run():
        queue = BatchQueue(work, name="test", max_rows=10_000, batch_rows=LARGE, workers=2)
        queue.start()
        rows = [LARGE, 1, 1, 1, LARGE]
        waiting = [asyncio.create_task(queue.submit(each, each)) for each in rows]
        assert [await each for each in waiting] == rows
        await queue.close()

    asyncio.run(run())
    assert sorted(sizes) == [3, LARGE, LARGE]


def test_a_late_answer_is_given_up_and_a_bug_is_not_shown(shop, caplog):
    def work(many):
        if many == ["bug"]:
            raise RuntimeError("secret")
        time.sleep(0.2)
        return many

    async def run():
        queue = BatchQueue(work, name="test", max_rows=10, batch_rows=1, timeout=0.05)
        queue.start()
        with pytest.raises(Refused, match="no answer within") as late:
            await queue.submit("a", 1)
        assert late.value.status == 503
        await asyncio.sleep(0.3)
        with pytest.raises(RuntimeError):
            await queue.submit("bug", 1)
        queue.timeout = 5
        # What waits when the queue closes is finished; what comes later is refused.
        waiting = [asyncio.create_task(queue.submit(each, 1)) for each in "abc"]
        await asyncio.sleep(0)
        await queue.close()
        assert [await each for each in waiting] == ["a", "b", "c"]
        with pytest.raises(Refused, match="busy"):
            await queue.submit("d", 1)

    asyncio.run(run())
    app = create_app(shop.bundle, shop.tokenizer, options=SMALL)
    with TestClient(app, base_url="http://localhost") as client:
        app.state.service.encode_queue.run = lambda many: 1 / 0
        answer = client.post("/v1/encode", json={"embeddings": shop.x[:1].tolist()})
    assert answer.status_code == 500
    assert "internal error" in answer.json()["error"]
    assert "division" not in answer.text
    assert answer.headers["x-request-id"] in answer.json()["error"]
    assert "ZeroDivisionError" in caplog.text


# Versions -----------------------------------------------------------------------------------


def grow(shop, stop):
    """Append items by another program, as `semid encode --catalogue` does."""
    bundle = CatalogueBundle(shop.bundle)
    added = semid.add_items(bundle.read(), shop.tokenizer, shop.x[:stop], ids=shop.names[:stop])
    return bundle.append(added.ids)


def test_swaps_forth_and_back(client, shop):
    assert grow(shop, 310) == 2
    assert ok(client.get("/v1/versions"))["version"] == 1
    assert ok(client.post("/v1/versions", json={"version": 2}))["items"] == 310
    since = ok(client.get("/v1/versions"))["since"]
    assert (since["items"], since["new"], len(since["levels"])) == (310, 10, 2)
    assert ok(client.get("/v1/items?id=item-305"))["items"]
    assert ok(client.post("/v1/versions", json={"version": 1}))["version"] == 1
    assert ok(client.get("/v1/items?id=item-305"))["items"] == []
    refused = add(client, shop, 310, 311)
    assert refused.status_code == 409
    assert "version 1 is kept" in refused.json()["error"]
    assert ok(client.post("/v1/versions", json={"version": 2}))
    assert ok(add(client, shop, 310, 311))["version"] == 3


def test_a_version_that_cannot_be_served_leaves_the_current_one(client, shop):
    grow(shop, 310)
    part = max((shop.bundle / "parts").iterdir())
    whole = part.read_bytes()
    part.write_bytes(whole[:-9])
    answer = client.post("/v1/versions", json={"version": 2})
    assert answer.status_code == 409
    assert "not what was written" in answer.json()["error"]
    state = ok(client.get("/v1/versions"))
    assert state["version"] == 1
    assert "version 2 cannot be served" in state["problem"]
    part.write_bytes(whole)
    assert ok(client.post("/v1/versions", json={"version": 2}))
    assert ok(client.get("/v1/versions"))["problem"] is None


def test_ids_of_another_model_are_refused(shop):
    with pytest.raises(FingerprintError, match="another codebook"):
        create_app(shop.bundle, drawn_tokenizer(sizes=(8, 16), seed=9))


def test_new_versions_are_found_by_watching(shop):
    app = create_app(shop.bundle, shop.tokenizer, options=ServeOptions(watch=0.02))
    with TestClient(app, base_url="http://localhost") as client:
        grow(shop, 305)
        until = time.monotonic() + 20
        while ok(client.get("/livez"))["version"] == 1:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert ok(client.get("/v1/items?id=item-304"))["items"]


def test_no_answer_mixes_versions_while_they_are_swapped(client, shop):
    sizes = {1: PUBLISHED}
    for version, stop in enumerate((310, 320, 330), start=2):
        grow(shop, stop)
        sizes[version] = stop
    stop_reading, wrong, seen = threading.Event(), [], set()
    rows = [305, 315, 325]
    asked = {"embeddings": shop.x[rows].tolist(), "item_ids": [f"item-{n}" for n in rows]}
    codes = shop.tokenizer.encode(shop.x[rows]).codes.tolist()

    def read():
        while not stop_reading.is_set():
            total = ok(client.get("/v1/items?prefix=&limit=1"))
            following = ok(client.get("/v1/next"))
            listed = ok(
                client.get("/v1/items", params={"id": [f"item-{n}" for n in (305, 315, 325)]})
            )
            encoded = ok(client.post("/v1/encode", json=asked))
            published = [each is not None for each in encoded["published"]]
            seen.update((total["version"], encoded["version"]))
            known = [n for n in (305, 315, 325) if n < sizes[listed["version"]]]
            if (
                total["total"] != sizes[total["version"]]
                or sum(following["items"]) != sizes[following["version"]]
                or [each["item_id"] for each in listed["items"]] != [f"item-{n}" for n in known]
                or encoded["codes"] != codes
                or published != [n < sizes[encoded["version"]] for n in (305, 315, 325)]
            ):
                wrong.append((total, following, listed, encoded))

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        generator = np.random.default_rng(0)
        for version in generator.integers(1, 5, 100).tolist():
            assert ok(client.post("/v1/versions", json={"version": version}))["version"] == version
        stop_reading.set()
        for reader in readers:
            reader.result()
    assert wrong == []
    assert len(seen) > 1


# New items ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["none", "append", "reassign"])
def test_new_items_get_what_the_catalogue_gives(tmp_path, method):
    shop = make_shop(tmp_path, method=method)
    before = CatalogueBundle(shop.bundle).read()
    right = semid.add_items(before, shop.tokenizer, shop.x[290:320], ids=shop.names[290:320])
    app = create_app(shop.bundle, shop.tokenizer, options=SMALL)
    with TestClient(app, base_url="http://localhost") as client:
        answer = ok(add(client, shop, 290, 320))
        assert answer["version"] == 2
        codes = right.ids.lookup(shop.names[290:320]).tolist()
        assert [item["codes"] for item in answer["items"]] == codes
        assert [item["added"] for item in answer["items"]] == [False] * 10 + [True] * 20
        counts = [(right.ids.codes == each).all(1).sum() > 1 for each in codes]
        assert [item["shared"] for item in answer["items"]] == counts
        scores = [item["novelty"] for item in answer["items"]][10:]
        assert np.allclose(scores, right.report.novelty)
        # The same request again, its answer lost, and with embeddings that have changed since.
        for x in (shop.x, shop.x + 1):
            again = ok(add(client, shop, 290, 320, x))
            assert again["version"] == 2
            assert [item["codes"] for item in again["items"]] == codes
            assert not any(item["added"] for item in again["items"])
    after = CatalogueBundle(shop.bundle).read()
    assert np.array_equal(after.codes[:PUBLISHED], before.codes)
    assert np.array_equal(after.codes, right.ids.codes)


def test_an_id_twice_in_a_request_is_refused(client, shop):
    body = {"embeddings": shop.x[:2].tolist(), "item_ids": ["a", "a"]}
    answer = client.post("/v1/items", json=body)
    assert answer.status_code == 422
    assert "'a' (2 times)" in answer.json()["error"]


def test_concurrent_additions_become_few_versions_and_lose_nothing(client, shop):
    with ThreadPoolExecutor(16) as pool:
        # Every item is sent by two clients.
        posts = [pool.submit(add, client, shop, 300 + n // 2, 301 + n // 2) for n in range(100)]
        answers = [ok(post.result()) for post in posts]
    bundle = CatalogueBundle(shop.bundle)
    ids = bundle.read()
    assert sorted(ids.items.strings().to_pylist()) == sorted(shop.names[:350])
    assert len(bundle.versions()) < 60
    for answer in answers:
        item = answer["items"][0]
        assert item["codes"] == ids.lookup(item["item_id"]).tolist()
    assert sum(answer["items"][0]["added"] for answer in answers) >= 50
    assert ok(client.get("/v1/items?prefix="))["total"] == 350


def test_another_writer_comes_between(client, shop):
    assert grow(shop, 305) == 2
    answer = ok(add(client, shop, 303, 308))
    assert answer["version"] == 3
    assert [item["added"] for item in answer["items"]] == [False, False, True, True, True]
    with semid.catalogue.bundle.hold_path(shop.bundle):
        busy = add(client, shop, 310, 311)
    assert busy.status_code == 503
    assert busy.headers["retry-after"] == "1"
    assert "another program" in busy.json()["error"]
    assert ok(add(client, shop, 310, 311))["version"] == 4


def test_ids_that_the_catalogue_cannot_hold_spoil_only_their_request(tmp_path):
    tokenizer, x = drawn_tokenizer(sizes=(8, 16)), np.eye(6, dtype=np.float32)
    CatalogueBundle.create(tmp_path / "b", tokenizer.encode(x, ids=[1, 2, 3, 4, 5, 6]))
    app = create_app(tmp_path / "b", tokenizer, options=SMALL)
    with TestClient(app, base_url="http://localhost") as client:
        gate, run = threading.Event(), app.state.service.add_queue.run
        app.state.service.add_queue.run = lambda many: gate.wait(5) and run(many)
        with ThreadPoolExecutor(3) as pool:
            posts = {
                name: pool.submit(
                    client.post,
                    "/v1/items",
                    json={"embeddings": x[:1].tolist(), "item_ids": [name]},
                )
                for name in (7, "8", "new-1")
            }
            gate.set()
            answers = {name: post.result() for name, post in posts.items()}
        assert ok(answers[7])
        assert ok(answers["8"])
        assert answers["new-1"].status_code == 422
        assert "int64" in answers["new-1"].json()["error"]
    ids = CatalogueBundle(tmp_path / "b").read()
    assert sorted(ids.items.to_arrow().to_pylist()) == [1, 2, 3, 4, 5, 6, 7, 8]


# Recommendations ------------------------------------------------------------------------------


def log_of(shop):
    rows = [
        (f"u{user}", f"item-{(user + step) % 300}", step) for user in range(60) for step in range(5)
    ]
    columns = zip(*rows, strict=True)
    return pa.table(dict(zip(("user_id", "item_id", "timestamp"), columns, strict=True)))


def test_recommendations_are_those_of_the_retriever(tmp_path):
    shop = make_shop(tmp_path)
    ids = CatalogueBundle(shop.bundle).read()
    retriever = semid.train_retriever(
        log_of(shop), ids=ids, model="composed", training={"epochs": 1}, options={"width": 8}
    )
    app = create_app(shop.bundle, shop.tokenizer, retriever=retriever, options=SMALL)
    histories = [["item-1", "item-2"], ["item-9", "nobody"], []]
    right = retriever.recommend(histories, k=4)
    with TestClient(app, base_url="http://localhost") as client:
        with ThreadPoolExecutor(6) as pool:  # requests of different options at once
            asked = [{"histories": histories, "k": 4}, {"histories": histories[:1], "k": 2}] * 6
            posts = [pool.submit(client.post, "/v1/recommend", json=each) for each in asked]
            answers = [ok(post.result())["recommendations"] for post in posts]
        for place, answer in enumerate(answers):
            for got, each in zip(answer, right[: 1 if place % 2 else 3], strict=True):
                count = 2 if place % 2 else 4
                assert got["items"] == each.items[:count]
                assert np.allclose(got["scores"], each.scores[:count], rtol=1e-4)
        for body, message in [
            ({"histories": []}, "histories"),
            ({"histories": "abc"}, "histories"),
            ({"histories": [["a"]], "k": 0}, "k"),
            ({"histories": [["a"]], "cold_slots": 3, "k": 2}, "cold_slots"),
            ({"histories": [["item-1"]], "within_ids": "embedding"}, "embedding"),
        ]:
            answer = client.post("/v1/recommend", json=body)
            assert answer.status_code == 422
            assert message in answer.json()["error"]
    with pytest.raises(FingerprintError, match="another model"):
        other = drawn_tokenizer(sizes=(8, 16), seed=3)
        CatalogueBundle.create(tmp_path / "c", other.encode(shop.x[:9], ids=shop.names[:9]))
        create_app(tmp_path / "c", other, retriever=retriever)


# Explorer -----------------------------------------------------------------------------------


def test_nodes_of_the_tree(client, shop):
    grow(shop, 310)
    ok(client.post("/v1/versions", json={"version": 2}))
    ids = CatalogueBundle(shop.bundle).read()
    root = ok(client.get("/v1/tree"))
    counts = np.bincount(ids.codes[:, 0], minlength=8)
    children = root["children"]
    assert children["items"] == sorted(counts[counts > 0].tolist(), reverse=True)
    for code, items, new in zip(
        children["code"], children["items"], children["metrics"]["new"], strict=True
    ):
        rows = ids.with_prefix([code])
        assert items == len(rows)
        assert new == round((rows >= 300).mean(), 4)
    assert any("chair" in words for words in children["words"])
    path = ids.codes[0].tolist()
    leaf = ok(client.get("/v1/tree", params={"prefix": ".".join(map(str, path))}))
    assert leaf["codes"] == path
    assert leaf["children"]["code"] == []
    # A path that no item has ends where items end.
    gone = ok(client.get("/v1/tree", params={"prefix": f"{path[0]}.{path[1]}.255"}))
    assert gone["codes"] == path[:2]
    near = ok(client.get("/v1/tree", params={"prefix": f"{path[0]}"}))["near"]
    book = shop.tokenizer.codebooks[0]
    distances = ((book - book[path[0]]) ** 2).sum(1)
    used = [c for c in np.argsort(distances) if counts[c] and c != path[0]]
    assert [each["code"] for each in near] == used[:5]


def test_trees_of_parallel_codebooks(tmp_path):
    tokenizer, x = parallel_tokenizer(sizes=(4, 8)), np.random.default_rng(0).normal(size=(90, 6))
    ids = tokenizer.encode(x.astype(np.float32), ids=[f"i{n}" for n in range(90)])
    CatalogueBundle.create(tmp_path / "b", ids)
    with TestClient(create_app(tmp_path / "b", tokenizer), base_url="http://localhost") as client:
        for level in (0, 1):
            node = ok(client.get(f"/v1/tree?level={level}"))
            counts = np.bincount(ids.codes[:, level])
            assert node["children"]["items"] == sorted(counts[counts > 0].tolist(), reverse=True)
            code = node["children"]["code"][0]
            inner = ok(client.get(f"/v1/tree?level={level}&prefix={code}"))
            assert inner["items"] == counts[code]
            assert inner["children"]["code"] == []
            listed = ok(client.get(f"/v1/items?level={level}&prefix={code}&limit=1000"))
            assert {e["item_id"] for e in listed["items"]} == {
                ids.items[int(row)] for row in np.flatnonzero(ids.codes[:, level] == code)
            }


def test_search_and_buckets(tmp_path):
    shop = make_shop(tmp_path, method="none")
    ids = CatalogueBundle(shop.bundle).read()
    app = create_app(shop.bundle, shop.tokenizer, items=shop.items)
    with TestClient(app, base_url="http://localhost") as client:
        red = ok(client.get("/v1/search?q=RED+number+1&limit=1000"))
        names = [f"item-{n}" for n in range(1, 300, 2) if "1" in str(n)]
        assert [each["item_id"] for each in red["items"]] == names
        assert red["total"] == len(names)
        exact = ok(client.get("/v1/search?q=item-2&limit=3"))
        assert [each["item_id"] for each in exact["items"]] == ["item-2", "item-20", "item-21"]
        assert ok(client.get("/v1/search?q=.*"))["total"] == 0
        code = int(ids.codes[0, 0])
        below = {f"item-{row}" for row in ids.with_prefix([code])}
        listed = ok(client.get(f"/v1/search?q={code}&limit=1000"))["items"]
        named = {name for name in shop.names[:300] if str(code) in name}
        assert {each["item_id"] for each in listed} == below | named
        assert ok(client.get("/v1/search?q=chai"))["codes"]
        counts = np.unique(ids.codes, axis=0, return_counts=True)[1]
        listed = ok(client.get("/v1/buckets"))["buckets"]
        assert [each["items"] for each in listed] == sorted(counts[counts > 1].tolist())[::-1]
        assert listed[0]["examples"][0]["title"].endswith(
            "number " + listed[0]["examples"][0]["id"][5:]
        )


# Who is let in, and what is seen --------------------------------------------------------------


def test_only_this_machine_by_default_and_a_token_if_asked(shop):
    app = create_app(shop.bundle, shop.tokenizer, token="s3cret", options=SMALL)
    with TestClient(app, base_url="http://127.0.0.1:8080") as client:
        for headers in ({}, {"authorization": "Bearer s3cre"}, {"authorization": "s3cret"}):
            answer = client.get("/v1/versions", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert client.get("/metrics", headers=headers).status_code == 401
        right = {"authorization": "Bearer s3cret"}
        assert ok(client.get("/v1/versions", headers=right))
        assert client.get("/readyz").status_code == 200
        for host in ("evil.example", "evil.example:8080", ""):
            assert client.get("/readyz", headers={"host": host}).status_code == 421
        for host in ("localhost:1", "[::1]:8080", "127.0.0.1"):
            assert client.get("/readyz", headers={"host": host}).status_code == 200
        crossed = {**right, "origin": "http://evil.example"}
        assert client.post("/v1/versions", json={"version": 1}, headers=crossed).status_code == 403
        same = {**right, "origin": "http://127.0.0.1:8080"}
        answer = client.post("/v1/versions", json={"version": 1}, headers=same)
        assert ok(answer)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
    beyond = create_app(shop.bundle, shop.tokenizer, host="0.0.0.0", options=SMALL)
    with TestClient(beyond, base_url="http://semid.internal") as client:
        assert client.get("/readyz").status_code == 200


def test_metrics_and_logs(client, shop, caplog):
    caplog.set_level(logging.INFO, "semid.serve")
    secret = shop.x[:5].tolist()
    ok(client.post("/v1/encode", json={"embeddings": secret, "item_ids": list("abcde")}))
    ok(add(client, shop, 300, 303))
    client.get("/v1/search?q=privatequery")
    client.get("/v1/../etc/passwd")
    families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
    values = {s.name: s.value for f in families.values() for s in f.samples if not s.labels}
    assert values["semid_encoded_rows_total"] == 5
    assert values["semid_added_items_total"] == 3
    assert (values["semid_catalogue_version"], values["semid_catalogue_items"]) == (2, 303)
    assert values["semid_catalogue_churn"] == 0
    counted = {
        (s.labels["route"], s.labels["status"]): s.value
        for s in families["semid_request_seconds"].samples
        if s.name.endswith("_count")
    }
    assert counted["/v1/encode", "200"] == 1
    assert counted["other", "404"] == 1
    assert {"semid_batch_rows", "semid_queue_rows", "semid_swaps", "semid_novel_rows"} <= set(
        families
    )
    lines = [
        json.loads(JsonFormatter().format(record))
        for record in caplog.records
        if record.name == "semid.serve"
    ]
    requests = [line for line in lines if line["event"] == "request"]
    assert [(line["route"], line["status"], line["version"]) for line in requests[:2]] == [
        ("/v1/encode", 200, 1), ("/v1/items", 200, 2),
    ]  # fmt: skip
    assert "privatequery" not in json.dumps(lines)
    assert str(secret[0][0]) not in json.dumps(lines)


def test_traces(shop):
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    app = create_app(shop.bundle, shop.tokenizer, trace_provider=provider, options=SMALL)
    with TestClient(app, base_url="http://localhost") as client:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        client.get("/v1/versions", headers={"traceparent": parent})
    span = exporter.get_finished_spans()[0]
    assert span.attributes["http.response.status_code"] == 200
    assert f"{span.context.trace_id:032x}" == parent.split("-")[1]
