"""A catalogue, the engines and their queues: what all endpoints share."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import numpy as np
from fastapi import Request

from semid.data.embeddings import open_embeddings
from semid.errors import UsageError
from semid.quantization.threads import resolve_threads
from semid.serve import bodies
from semid.serve.batching import BatchQueue, Refused
from semid.serve.bodies import JSON, Rows, read_body
from semid.serve.explore import warm
from semid.serve.limits import ServeOptions
from semid.serve.observe import Metrics, logger
from semid.serve.versions import Catalogue, Version


class Service:
    """A catalogue, the engines and their queues: what the endpoints share."""

    def __init__(self, catalogue: Catalogue, options: ServeOptions, retriever: Any = None) -> None:
        self.catalogue, self.options, self.retriever = catalogue, options, retriever
        self.metrics = Metrics()
        self.closing = False
        self.warm: Version | None = None  # version that the explorer is ready for
        tokenizer = catalogue.tokenizer
        threads = resolve_threads(options.threads)
        tokenizer.threads = 1  # calls run beside each other instead
        limits: dict[str, Any] = {
            "max_rows": options.queue_rows,
            "batch_rows": options.batch_rows,
            "timeout": options.timeout,
            "observe": self.metrics.batch,
        }
        self.encode_queue: BatchQueue[Any, Any] = BatchQueue(
            self._encode, name="encode", wait=options.batch_wait, workers=threads, **limits
        )
        self.decode_queue: BatchQueue[Any, Any] = BatchQueue(
            lambda many: _split(tokenizer.decode(np.concatenate(many)), many),
            name="decode",
            **limits,
        )
        self.add_queue: BatchQueue[Any, Any] = BatchQueue(catalogue.add, name="add", **limits)
        # Reads are answered one by one: none waits for the slowest of its batch.
        self.read_queue: BatchQueue[Any, Any] = BatchQueue(
            _call_each, name="read", **{**limits, "batch_rows": 1}
        )
        self.recommend_queue: BatchQueue[Any, Any] = BatchQueue(
            self._recommend, name="recommend", **limits
        )
        self.queues = [
            self.encode_queue, self.decode_queue, self.add_queue, self.read_queue,
            self.recommend_queue,
        ]  # fmt: skip
        self.metrics.watch(catalogue, self.queues)

    def _encode(self, many: list[Any]) -> list[Any]:
        version = self.catalogue.current
        beam = version.ids.info.beam_width
        source = open_embeddings(np.concatenate(many))
        blocks = list(self.catalogue.tokenizer.encode_blocks(source, beam_width=beam))
        codes = np.concatenate([block.codes for block in blocks])
        norms = np.concatenate([block.residual_norms for block in blocks])
        novelty = version.novelty_of(norms)
        parts = [_split(codes, many), _split(norms, many)]
        parts.append([None] * len(many) if novelty is None else _split(novelty, many))
        return [(version, *each) for each in zip(*parts, strict=True)]

    def _recommend(self, many: list[bodies.RecommendRequest]) -> list[Any]:
        results: list[Any] = [None] * len(many)
        groups: dict[tuple[Any, ...], list[int]] = {}
        for place, asked in enumerate(many):
            key = (asked.k, asked.exclude_history, asked.within_ids, asked.cold_slots)
            groups.setdefault(key, []).append(place)
        for (k, exclude, within, cold), places in groups.items():
            histories = [list(h) for place in places for h in many[place].histories]
            try:
                best = self.retriever.recommend(
                    histories, k=k, exclude_history=exclude, within_ids=within, cold_slots=cold
                )
            except UsageError as error:
                best = error
            for place in places:
                count = len(many[place].histories)
                results[place] = best if isinstance(best, Exception) else best[:count]
                best = best if isinstance(best, Exception) else best[count:]
        return results

    async def read(self, work: Callable[[], Any]) -> Any:
        """Run work that reads a version in the queue of such work, and return its result."""
        return await self.read_queue.submit(work, 1)

    async def body(self, request: Request) -> bytes:
        """Return the body of a request within the limits."""
        options = self.options
        return await read_body(request, max_bytes=options.max_body_bytes, seconds=options.timeout)

    async def rows(self, request: Request) -> Rows:
        """Return the embeddings of a request; large bodies are read in a thread."""
        body = await self.body(request)
        kind = request.headers.get("content-type", JSON)
        dim, most = self.catalogue.tokenizer.dim, self.options.max_rows
        if len(body) < 65_536:
            return bodies.read_rows(kind, body, dim=dim, max_rows=most)
        return await asyncio.to_thread(bodies.read_rows, kind, body, dim=dim, max_rows=most)

    async def swap(self, number: int | None) -> Version:
        """Load a version in a thread and make it the current one."""
        try:
            version = await asyncio.to_thread(self.catalogue.swap, number)
        except Refused:
            raise
        except Exception as error:
            self.metrics.swaps.labels("failed").inc()
            logger.warning("swap failed", extra={"fields": {"error": str(error)}})
            raise
        self.metrics.swaps.labels("done").inc()
        logger.info("swap", extra={"fields": {"version": version.number}})
        return version

    async def warm_up(self) -> None:
        """Make the explorer ready for each version that is served, until cancelled."""
        while True:
            version = self.catalogue.current
            if self.warm is not version:
                await asyncio.to_thread(warm, version)
                self.warm = version
            await asyncio.sleep(1)

    async def watch(self) -> None:
        """Look for new versions of the bundle until cancelled."""
        failed = None
        while self.options.watch:
            await asyncio.sleep(self.options.watch)
            last = await asyncio.to_thread(lambda: self.catalogue.bundle.versions()[-1])
            if last in (self.catalogue.current.number, failed) or self.catalogue.pinned:
                continue
            try:
                await self.swap(None)
            except Exception:  # noqa: BLE001 - the version before stays; `swap` has logged it
                failed = last

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Start the queues; at the end finish what waits."""
        for queue in self.queues:
            queue.start()
        tasks = [asyncio.create_task(self.warm_up()), asyncio.create_task(self.watch())]
        try:
            yield
        finally:
            self.closing = True
            for task in tasks:
                task.cancel()
            for queue in self.queues:
                await queue.close()


def _call_each(many: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = []
    for work in many:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001 - it is the result of this request alone
            results.append(error)
    return results


def _split(array: Any, many: Sequence[Any]) -> list[Any]:
    return np.split(array, np.cumsum([len(each) for each in many])[:-1])
