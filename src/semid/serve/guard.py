"""What every request passes: host, origin and token, headers of the answer, log and metrics."""

from __future__ import annotations

import hmac
import itertools
import json
import secrets
import time
from typing import Any

from semid.serve.observe import Metrics, Tracer, logger

OPEN_PATHS = ("/", "/livez", "/readyz")
"""Answered without a token: they hold nothing of the catalogue."""

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        b"default-src 'none'; style-src 'unsafe-inline'; "
        b"script-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guard:
    """ASGI middleware around the whole service.

    Args:
        app: what it surrounds.
        token: bearer token that requests need; None lets all in.
        hosts: names that a Host header may have; None allows any.
        metrics: where requests are counted.
        tracer: where spans go.
    """

    def __init__(
        self,
        app: Any,
        *,
        token: str | None,
        hosts: frozenset[str] | None,
        metrics: Metrics,
        tracer: Tracer,
    ) -> None:
        self.app, self.token, self.hosts = app, token, hosts
        self.metrics, self.tracer = metrics, tracer
        self._prefix, self._numbers = secrets.token_hex(4), itertools.count()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request; a bug in the service is answered with 500 and logged."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {k.decode("latin1"): v.decode("latin1") for k, v in scope["headers"]}
        request_id = f"{self._prefix}{next(self._numbers):08x}"
        status, version = 0, None

        async def send_guarded(message: Any) -> None:
            nonlocal status, version
            if message["type"] == "http.response.start":
                status = message["status"]
                version = dict(message["headers"]).get(b"x-semid-version")
                message["headers"] = [
                    *message["headers"], *HEADERS, (b"x-request-id", request_id.encode()),
                ]  # fmt: skip
            await send(message)

        with self.tracer.span(f"{scope['method']} {scope['path']}", headers) as span:
            try:
                problem = self._problem(scope, headers)
                if problem is not None:
                    await _send_error(send_guarded, *problem)
                else:
                    await self.app(scope, receive, send_guarded)
            except Exception:  # noqa: BLE001 - a client never sees a traceback
                logger.exception("internal error", extra={"fields": {"request_id": request_id}})
                if not status:
                    sentence = f"internal error; the log has it under request {request_id}"
                    await _send_error(send_guarded, 500, sentence)
            if span is not None:
                span.set_attribute("http.response.status_code", status)
        # A route's own pattern: metrics per path that a client made up would never end.
        route = getattr(scope.get("route"), "path", "other")
        seconds = time.perf_counter() - started
        self.metrics.requests.labels(route, str(status)).observe(seconds)
        fields = {
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 2),
            "version": None if version is None else int(version),
            "request_id": request_id,
        }
        logger.info("request", extra={"fields": fields})

    def _problem(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and sentence for a request that is not let in."""
        host = headers.get("host", "")
        # A page elsewhere whose name was pointed at this machine has its own name as the host.
        if self.hosts is not None and _name_of(host) not in self.hosts:
            return 421, "this host name is not served; use localhost or 127.0.0.1"
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return 403, "requests from pages of other origins are not served"
        if self.token is not None and scope["path"] not in OPEN_PATHS:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
                return 401, "give the token of this service: Authorization: Bearer TOKEN"
        return None


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    return host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]


async def _send_error(send: Any, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
