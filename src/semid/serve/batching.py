"""One bounded queue in front of each engine: concurrent requests become one call."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from semid.errors import SemidError

LARGE = 128
"""Rows that are worth a call beside a running one; fewer are cheaper together in the next."""

T = TypeVar("T")
R = TypeVar("R")


class Refused(SemidError):  # noqa: N818 - it is an answer
    """A request that is answered with an error: status, sentence and seconds to wait."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        self.status, self.retry_after = status, retry_after
        super().__init__(message)


@dataclass
class _Waiting(Generic[T]):
    item: T
    rows: int
    answer: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)


class BatchQueue(Generic[T, R]):
    """Joins concurrent requests into calls of ``run`` in threads of its own.

    Args:
        run: returns one result, or one exception, per item.
        name: what the queue is called in metrics.
        max_rows: rows that may wait; requests beyond it are refused with 429.
        batch_rows: rows of one call; a larger request is a call by itself.
        wait: seconds that the first request of a batch waits for others while the engine is idle.
        timeout: seconds after which a request is given up.
        workers: calls at a time; all but one of them only for `LARGE` rows and more.
        observe: told the rows of every batch.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R | Exception]],
        *,
        name: str,
        max_rows: int,
        batch_rows: int,
        wait: float = 0.0,
        timeout: float = 30.0,
        workers: int = 1,
        observe: Callable[[str, int], None] = lambda name, rows: None,
    ) -> None:
        self.run, self.name, self.max_rows, self.batch_rows = run, name, max_rows, batch_rows
        self.wait, self.timeout, self.workers, self.observe = wait, timeout, workers, observe
        self.rows = 0  # rows that wait
        self._waiting: deque[_Waiting[T]] = deque()
        self._arrival = asyncio.Event()
        self._closing = False
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=f"semid-{name}")
        self._calls: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to work; called inside the event loop."""
        self._task = asyncio.create_task(self._work())

    async def close(self) -> None:
        """Finish what waits, then stop."""
        self._closing = True
        self._arrival.set()
        if self._task is not None:
            await self._task
        self._threads.shutdown()

    async def submit(self, item: T, rows: int) -> R:
        """Wait for the result of one item.

        Raises:
            Refused: the queue is full (429), or the result did not come in time (503).
        """
        # A request that alone is larger than the queue is served when nothing else waits.
        if self._closing or (self.rows and self.rows + rows > self.max_rows):
            raise Refused(
                503 if self._closing else 429,
                f"the service is busy: {self.rows:,} rows wait; try again in a second",
                retry_after=1,
            )
        entry = _Waiting(item, rows, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        self.rows += rows
        self._arrival.set()
        try:
            result: R = await asyncio.wait_for(entry.answer, self.timeout)
        except TimeoutError:
            raise Refused(
                503,
                f"no answer within {self.timeout:g} seconds; send fewer rows, or try again later",
                retry_after=1,
            ) from None
        return result

    async def _work(self) -> None:
        while True:
            await self._arrival.wait()
            if not self._waiting or not self._has_room():
                if self._closing and not self._waiting:
                    break
                self._arrival.clear()  # the next request or the end of a call sets it
                continue
            pause = self._waiting[0].since + self.wait - time.monotonic()
            if pause > 0 and self.rows < self.batch_rows and not self._closing:
                await asyncio.sleep(pause)
            batch = self._next_batch()
            if not batch:
                continue
            call = asyncio.create_task(self._call(batch))
            self._calls.add(call)
            call.add_done_callback(self._end)
        while self._calls:
            await asyncio.wait(self._calls)

    def _has_room(self) -> bool:
        busy = len(self._calls)
        return not busy or (busy < self.workers and self.rows >= LARGE)

    def _end(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        self._arrival.set()

    async def _call(self, batch: list[_Waiting[T]]) -> None:
        self.observe(self.name, sum(entry.rows for entry in batch))
        items = [entry.item for entry in batch]
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._threads, self.run, items)
        except Exception as error:  # noqa: BLE001 - every waiting request must be answered
            results = [error] * len(batch)
        for entry, result in zip(batch, results, strict=True):
            if entry.answer.done():  # its client has given up
                continue
            if isinstance(result, Exception):
                entry.answer.set_exception(result)
            else:
                entry.answer.set_result(result)

    def _next_batch(self) -> list[_Waiting[T]]:
        batch: list[_Waiting[T]] = []
        rows = 0
        while self._waiting and (not batch or rows + self._waiting[0].rows <= self.batch_rows):
            entry = self._waiting.popleft()
            self.rows -= entry.rows
            if not entry.answer.done():
                batch.append(entry)
                rows += entry.rows
        return batch
