"""The endpoints of the service, as one FastAPI application."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from semid.catalogue.additions import NOVEL
from semid.errors import FingerprintError, InputError, OutputBusyError, SemidError, UsageError
from semid.loading import load, load_tokenizer
from semid.serve import bodies
from semid.serve.batching import Refused
from semid.serve.bodies import ARROW, JSON, NPY, answer, parse_json, problem_of
from semid.serve.explore import buckets, explorer_page, node, search, tree_of
from semid.serve.guard import Guard
from semid.serve.limits import LOOPBACK, ServeOptions
from semid.serve.observe import Tracer
from semid.serve.service import Service
from semid.serve.versions import Catalogue, Version

MAX_LISTED = 1000


def create_app(
    bundle: str | os.PathLike[str],
    model: Any,
    *,
    items: Any = None,
    retriever: Any = None,
    token: str | None = None,
    host: str = "127.0.0.1",
    options: ServeOptions | None = None,
    trace_provider: Any = None,
) -> FastAPI:
    """Return the service over a bundle as an ASGI application.

    Args:
        bundle: folder of a `CatalogueBundle`.
        model: the tokenizer that made its ids, or its folder.
        items: table of titles, or None.
        retriever: a `Retriever` or its folder; without one nothing is recommended.
        token: bearer token that requests need; None lets everyone in.
        host: address the service listens on; on a loopback address only its names are served.
        options: limits.
        trace_provider: an OpenTelemetry ``TracerProvider``, or None.

    Raises:
        FingerprintError: the bundle or the retriever is of another model.
    """
    options = options or ServeOptions()
    tokenizer = load_tokenizer(model) if isinstance(model, str | os.PathLike) else model
    if isinstance(retriever, str | os.PathLike):
        retriever = load(retriever)
    if retriever is not None:
        if not hasattr(retriever, "recommend"):
            raise UsageError(
                "--retriever holds no next-item model; give a folder of 'semid retrieve'"
            )
        if retriever.codebook_fingerprint not in (None, tokenizer.codebook_fingerprint):
            raise FingerprintError(
                "the retriever reads codes of another model; train it with these"
            )
    service = Service(Catalogue(bundle, tokenizer, items=items), options, retriever)
    app = FastAPI(
        title="semid", lifespan=service.lifespan, docs_url=None, redoc_url=None,
        description="Semantic IDs of a published catalogue.",
    )  # fmt: skip
    app.state.service = service
    for kind in (SemidError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _explain)
    _add_items_routes(app, service)
    _add_model_routes(app, service)
    _add_read_routes(app, service)
    _add_state_routes(app, service)
    app.middleware_stack = Guard(
        _Shortcut(app.build_middleware_stack(), app, "/v1/encode"),
        token=token,
        hosts=frozenset({"127.0.0.1", "localhost", "[::1]"}) if host in LOOPBACK else None,
        metrics=service.metrics,
        tracer=Tracer(trace_provider),
    )
    return app


class _Shortcut:
    """Answers the route that is asked most; FastAPI's layers cost more than encoding a row."""

    def __init__(self, app: Any, fastapi: FastAPI, path: str) -> None:
        self.app = app
        self.route: Any = next(r for r in fastapi.routes if getattr(r, "path", None) == path)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != self.route.path or scope.get("method") not in self.route.methods:
            await self.app(scope, receive, send)
            return
        scope["route"] = self.route
        request = Request(scope, receive)
        try:
            response = await self.route.endpoint(request)
        except SemidError as error:
            response = _explain(request, error)
        await response(scope, receive, send)


def _explain(_: Request, error: Any) -> Response:
    """Answer an error with its status and one sentence."""
    status, headers = 500, {}
    sentence = str(error)
    if isinstance(error, Refused):
        status = error.status
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
    elif isinstance(error, RequestValidationError):
        status, sentence = 422, problem_of(error.errors())
    elif isinstance(error, HTTPException):
        status, sentence = error.status_code, f"{error.detail}; see /openapi.json"
    elif isinstance(error, UsageError | InputError):
        status = 422
    elif isinstance(error, OutputBusyError):
        status, headers["retry-after"] = 503, "1"
        sentence = "another program is writing to the bundle; try again in a second"
    elif isinstance(error, SemidError):
        status = 409
    return Response(json.dumps({"error": sentence}), status, headers, JSON)


def _accepts(model: type[BaseModel], *others: str) -> dict[str, Any]:
    """Return the OpenAPI description of a body."""
    content: dict[str, Any] = {JSON: {"schema": model.model_json_schema()}}
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in others}
    return {"requestBody": {"required": True, "content": content}}


def _codes(text: str) -> list[int]:
    """Read codes such as ``17.203``; an empty text is the empty prefix."""
    parts = text.split(".") if text else []
    if not all(part.isascii() and part.isdigit() and len(part) < 11 for part in parts):
        raise Refused(422, "codes are whole numbers with dots between them, such as 17.203")
    return [int(part) for part in parts]


def _add_items_routes(app: FastAPI, service: Service) -> None:
    catalogue = service.catalogue

    @app.get("/v1/items")
    async def items(
        item_id: Annotated[list[str] | None, Query(max_length=MAX_LISTED, alias="id")] = None,
        prefix: str | None = None,
        level: Annotated[int | None, Query(ge=0)] = None,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100,
    ) -> Response:
        """Return items by id, or those whose codes start with a prefix such as 17.203.

        With a level, the prefix is one of the tree of that level, as for /v1/tree.
        """
        version = catalogue.current
        if (item_id is None) == (prefix is None):
            raise Refused(422, "give either id= (one or several times) or prefix=")

        def read() -> dict[str, Any]:
            if item_id is not None:
                rows = version.ids.items.index_of(item_id).tolist()
                unknown = [each for each, row in zip(item_id, rows, strict=True) if row < 0]
                return {
                    "items": [version.item(row) for row in rows if row >= 0],
                    "unknown": unknown,
                }
            codes = _codes(prefix or "")
            trie = version.trie if level is None else tree_of(version, level).trie
            codes = version.prefix(codes) if level is None else codes[: trie.levels]
            start, stop = trie.row_range(codes)
            rows = trie.rows[start:stop][offset : offset + limit].tolist()
            listed = [version.item(row) for row in rows]
            return {"prefix": codes, "total": stop - start, "offset": offset, "items": listed}

        return answer(None, version.number, await service.read(read))

    @app.post("/v1/items", openapi_extra=_accepts(bodies.AddRequest, ARROW, NPY))
    async def add(request: Request) -> Response:
        """Publish new items as a version of the bundle; published ones keep their codes."""
        rows = await service.rows(request)
        if rows.ids is None:
            raise Refused(422, "item_ids are missing; give one for each embedding")
        version, added = await service.add_queue.submit(rows, len(rows.x))
        service.metrics.added.inc(sum(item.added for item in added))
        listed = [
            {
                "item_id": name,
                "codes": version.ids.codes[item.row].tolist(),
                "added": item.added,
                "novelty": item.novelty,
                "shared": item.shared,
            }
            for name, item in zip(rows.ids.strings().to_pylist(), added, strict=True)
        ]
        return answer(None, version.number, {"items": listed})


def _add_model_routes(app: FastAPI, service: Service) -> None:
    catalogue = service.catalogue

    @app.post("/v1/encode", openapi_extra=_accepts(bodies.EncodeRequest, ARROW, NPY))
    async def encode(request: Request) -> Response:
        """Return the model's codes of embeddings, and the published codes of known ids."""
        rows = await service.rows(request)
        version, codes, norms, novelty = await service.encode_queue.submit(rows.x, len(rows.x))
        service.metrics.encoded.inc(len(codes))
        content: dict[str, Any] = {"codes": codes, "residual_norms": norms}
        if novelty is not None:
            service.metrics.novel.inc(int((novelty > NOVEL).sum()))
            content["novelty"] = novelty
        if rows.ids is not None:
            names = rows.ids.strings()
            places = version.ids.items.index_of(names).tolist()
            content["item_ids"] = names.to_pylist()
            content["published"] = [
                version.ids.codes[row].tolist() if row >= 0 else None for row in places
            ]
        return answer(request, version.number, content, main="codes")

    @app.post("/v1/decode", openapi_extra=_accepts(bodies.DecodeRequest))
    async def decode(request: Request) -> Response:
        """Return the embeddings that codes stand for; an appended token is left out."""
        asked = parse_json(bodies.DecodeRequest, await service.body(request)).codes
        version = catalogue.current
        if len(asked) > service.options.max_rows:
            raise Refused(
                413, f"{len(asked):,} rows; one request takes {service.options.max_rows:,}"
            )
        codes = np.array([_model_codes(version, row) for row in asked], np.int64)
        if not len(codes):
            raise Refused(422, "codes: give at least one list")
        embeddings = await service.decode_queue.submit(codes, len(codes))
        return answer(request, version.number, {"embeddings": embeddings}, main="embeddings")

    @app.get("/v1/neighbors")
    async def neighbors(codes: str, k: Annotated[int, Query(ge=1, le=500)] = 10) -> Response:
        """Return the items whose quantized vectors are nearest to that of codes."""
        version = catalogue.current
        query = np.array([_model_codes(version, _codes(codes))], np.int64)

        def read() -> list[dict[str, Any]]:
            latents = version.tokenizer.quantize(query)
            rows, scores = version.scan.search(latents, min(k, len(version.ids)))
            pairs = zip(rows[0].tolist(), scores[0].tolist(), strict=True)
            return [{**version.item(row), "distance": distance} for row, distance in pairs]

        return answer(None, version.number, {"neighbors": await service.read(read)})

    if service.retriever is None:
        return

    @app.post("/v1/recommend", openapi_extra=_accepts(bodies.RecommendRequest))
    async def recommend(request: Request) -> Response:
        """Return the next items for histories of item ids, oldest first."""
        asked = parse_json(bodies.RecommendRequest, await service.body(request))
        if len(asked.histories) > service.options.max_rows:
            raise Refused(
                413, f"too many histories; one request takes {service.options.max_rows:,}"
            )
        version = catalogue.current
        best = await service.recommend_queue.submit(asked, len(asked.histories))
        listed = [{"items": each.items, "scores": each.scores.tolist()} for each in best]
        return answer(None, version.number, {"recommendations": listed})


def _model_codes(version: Version, codes: list[int]) -> list[int]:
    """Check a whole id, with or without an appended token, and return the model's codes."""
    sizes = version.ids.info.model_sizes
    if len(codes) not in (len(sizes), len(version.trie.sizes)):
        raise Refused(422, f"{len(codes)} codes; an id of this model has {len(sizes)}")
    return version.prefix(codes)[: len(sizes)]


def _add_read_routes(app: FastAPI, service: Service) -> None:
    catalogue = service.catalogue

    @app.get("/v1/next")
    async def next_codes(prefix: str = "") -> Response:
        """Return the codes that may follow a prefix, and the number of items of each."""
        version = catalogue.current
        codes = version.prefix(_codes(prefix))
        children = version.trie.children(codes)
        content = {"prefix": codes, "codes": children.codes, "items": children.items}
        return answer(None, version.number, content)

    @app.get("/v1/tree")
    async def explore(prefix: str = "", level: Annotated[int, Query(ge=0)] = 0) -> Response:
        """Return a node of the explorer: its figures, children, words and nearest codes."""
        version = catalogue.current
        codes = _codes(prefix)
        return answer(None, version.number, await service.read(lambda: node(version, level, codes)))

    @app.get("/v1/buckets")
    async def shared_ids() -> Response:
        """Return the fullest ids that several items share."""
        version = catalogue.current
        content = {"buckets": await service.read(lambda: buckets(version))}
        return answer(None, version.number, content)

    @app.get("/v1/search")
    async def find(
        q: Annotated[str, Query(min_length=1, max_length=200)],
        level: Annotated[int, Query(ge=0)] = 0,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
    ) -> Response:
        """Return items whose id or title has all words of a query."""
        version = catalogue.current
        content = await service.read(lambda: search(version, q, level, offset, limit))
        return answer(None, version.number, content)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(explorer_page(), media_type="text/html")


def _add_state_routes(app: FastAPI, service: Service) -> None:
    catalogue = service.catalogue

    @app.get("/v1/model")
    async def model() -> Response:
        """Return what the model is, and the health of the published codes."""
        version = catalogue.current

        def read() -> dict[str, Any]:
            info = version.ids.info
            return {
                "tokenizer": info.tokenizer,
                "dim": version.tokenizer.dim,
                "codebook_sizes": list(info.codebook_sizes),
                "hierarchical": info.hierarchical,
                "unique": info.unique,
                "codebook_fingerprint": info.codebook_fingerprint,
                "weights_fingerprint": info.weights_fingerprint,
                "health": version.verdict.level,
                "findings": [finding.what for finding in version.verdict.findings],
            }

        return answer(None, version.number, await service.read(read))

    @app.get("/v1/versions")
    async def versions() -> Response:
        """Return the versions of the bundle, and what is new in the current one."""
        version = catalogue.current
        content = {
            "versions": catalogue.bundle.versions(),
            "kept": catalogue.pinned,
            "problem": catalogue.last_error,
            "since": await service.read(version.since),
        }
        return answer(None, version.number, content)

    @app.post("/v1/versions", openapi_extra=_accepts(bodies.VersionRequest))
    async def swap(request: Request) -> Response:
        """Serve another version of the bundle; the current one stays where that fails."""
        number = parse_json(bodies.VersionRequest, await service.body(request)).version
        version = await service.swap(number)
        return answer(None, version.number, {"items": len(version.ids)})

    @app.get("/livez")
    async def live() -> Response:
        """Say that the process answers."""
        return answer(None, catalogue.current.number, {"alive": True})

    @app.get("/readyz")
    async def ready() -> Response:
        """Say whether requests are taken; not while the service ends."""
        ready = not service.closing
        return answer(
            None, catalogue.current.number, {"ready": ready}, status=200 if ready else 503
        )

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")
