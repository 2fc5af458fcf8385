"""What operators see of the service: metrics for Prometheus, JSON logs, traces."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from semid.errors import MissingExtraError, printable
from semid.serve.batching import BatchQueue
from semid.serve.versions import Catalogue

logger = logging.getLogger("semid.serve")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """Prometheus metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name: Any = {"registry": self.registry, "namespace": "semid"}
        self.requests = Histogram(
            "request_seconds", "Time per request.", ("route", "status"), buckets=_SECONDS, **name
        )
        self.batches = Histogram(
            "batch_rows", "Rows per engine call.", ("queue",), buckets=_ROWS, **name
        )
        self.queue = Gauge("queue_rows", "Rows that wait.", ("queue",), **name)
        self.version = Gauge("catalogue_version", "Version that is served.", **name)
        self.items = Gauge("catalogue_items", "Items of that version.", **name)
        self.churn = Gauge(
            "catalogue_churn", "Share of items that the last swap took from the catalogue.", **name
        )
        self.swaps = Counter("swaps", "Versions asked for.", ("outcome",), **name)
        self.encoded = Counter("encoded_rows", "Rows encoded.", **name)
        self.novel = Counter(
            "novel_rows", "Encoded rows beyond 99 % of the training distribution.", **name
        )
        self.added = Counter("added_items", "Items published.", **name)

    def watch(self, catalogue: Catalogue, queues: list[BatchQueue[Any, Any]]) -> None:
        """Read the state of these whenever metrics are asked for."""
        self.version.set_function(lambda: catalogue.current.number)
        self.items.set_function(lambda: len(catalogue.current.ids))
        self.churn.set_function(lambda: catalogue.churn)
        for queue in queues:
            self.queue.labels(queue.name).set_function(partial(getattr, queue, "rows"))

    def batch(self, name: str, rows: int) -> None:
        """Count a batch."""
        self.batches.labels(name).observe(rows)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate_latest(self.registry)


class JsonFormatter(logging.Formatter):
    """One JSON object per record; the fields of a request are its ``extra={"fields": ...}``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": printable(record.getMessage()),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def log_json(level: int = logging.INFO) -> None:
    """Write the service's log to the error stream as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("semid.serve", "uvicorn", "uvicorn.error"):
        target = logging.getLogger(name)
        target.handlers, target.propagate = [handler], False
        target.setLevel(level if name == "semid.serve" else logging.WARNING)


class Tracer:
    """Spans of requests for OpenTelemetry; without a provider there are none.

    Args:
        provider: an OpenTelemetry ``TracerProvider``; None traces nothing.
    """

    def __init__(self, provider: Any = None) -> None:
        self._tracer = None if provider is None else provider.get_tracer("semid.serve")

    def span(self, name: str, headers: dict[str, str]) -> AbstractContextManager[Any]:
        """Return the span of a request, below the one that its headers name."""
        if self._tracer is None:
            return nullcontext()
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        span: AbstractContextManager[Any] = self._tracer.start_as_current_span(
            name, context=extract(headers), kind=SpanKind.SERVER
        )
        return span


def otlp_provider() -> Any:
    """Return a provider that sends spans where OTEL_EXPORTER_OTLP_ENDPOINT says.

    Raises:
        MissingExtraError: without the extra ``otel``.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise MissingExtraError(
            "opentelemetry-exporter-otlp-proto-http", extra="otel", purpose="--trace"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "semid"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
