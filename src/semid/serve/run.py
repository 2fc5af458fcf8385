"""Run the service under uvicorn, or as a deployment of Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from semid.errors import UsageError, import_extra
from semid.serve.app import create_app
from semid.serve.limits import LOOPBACK
from semid.serve.observe import log_json, logger

HEADER_SECONDS = 10.0
"""Time in which a request's header must arrive; a connection without one is closed."""

MAX_HEADER_BYTES = 65_536

MAX_CONNECTIONS = 1000


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which also closes connections with too slow or too large a header."""

    _header_bytes: int | None = None  # None while no header is being read

    def connection_made(self, transport: Any) -> None:
        """Begin to look at the connection."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEADER_SECONDS, self._look, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop looking."""
        self._timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """Begin to count."""
        self._header_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """End counting: the body has a limit of its own."""
        self._header_bytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Read on, unless the header grows without an end: the parser would keep all of it."""
        super().data_received(data)
        if self._header_bytes is not None:
            self._header_bytes += len(data)
            if self._header_bytes > MAX_HEADER_BYTES:
                self.transport.close()

    def _look(self, before: Any) -> None:
        # Idle at two looks with no request between them: nothing arrived that was a whole header.
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is before:
            self.transport.close()
            return
        self._timer = self.loop.call_later(HEADER_SECONDS, self._look, self.cycle if idle else self)


class Server(uvicorn.Server):
    """uvicorn's server, for which SIGTERM and Ctrl-C are an end like any other."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End in order at a signal; uvicorn would raise it again afterwards."""
        loop = asyncio.get_running_loop()
        for signal_number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(signal_number, self.handle_exit, signal_number, None)
        yield


def serve(
    app: Any, *, host: str = "127.0.0.1", port: int = 8080, shutdown_seconds: int = 30
) -> None:
    """Serve an application of `create_app` until SIGTERM or Ctrl-C; what has begun is finished.

    Raises:
        UsageError: the address cannot be used.
    """
    log_json()
    if host not in LOOPBACK:
        logger.info("listening beyond this machine", extra={"fields": {"host": host}})
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=BoundedProtocol,
        ws="none",
        loop="auto",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=max(1, int(HEADER_SECONDS)),
        timeout_graceful_shutdown=shutdown_seconds,
    )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=config.backlog)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port or --host"
        ) from None
    with listener:
        where = {"host": host, "port": listener.getsockname()[1]}
        logger.info("serving", extra={"fields": where})
        # What start-up made stays: the collector need not walk it again and again.
        gc.collect()
        gc.freeze()
        # An engine's thread gives the interpreter back between kernels; at Python's 5 ms it would
        # wait that long for its turn whenever requests keep the event loop busy.
        sys.setswitchinterval(0.001)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(Server(config).serve([listener]))


def ray_deployment(
    *, name: str = "semid", replicas: int = 1, cpus: float = 1, **settings: Any
) -> Any:
    """Return the service as a Ray Serve application; run it with ``ray.serve.run``.

    Every replica opens the bundle and the model itself, so both must lie on a shared file system.
    Of several replicas, the bundle's lock lets one add items at a time; the others follow by
    ``options.watch``.

    Args:
        name: name of the deployment.
        replicas: number of processes.
        cpus: CPU slots of each.
        settings: arguments of `create_app`.

    Raises:
        MissingExtraError: without ``ray[serve]``.
    """
    ray_serve = import_extra("ray.serve", package="ray[serve]", extra="ray", purpose="Ray Serve")

    def build() -> Any:
        return create_app(**settings)

    @ray_serve.deployment(name=name, num_replicas=replicas, ray_actor_options={"num_cpus": cpus})
    @ray_serve.ingress(build)
    class SemidService:
        """One replica."""

    replica: Any = SemidService
    return replica.bind()
