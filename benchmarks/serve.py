"""Load of the service on loopback, beside a plain FastAPI handler that encodes per request.

    python benchmarks serve
    python benchmarks serve --minutes 10    # memory under a steady load, every minute

Bounded: one process serves, this one asks, for a few seconds per row. Overload is asked for last.
On a machine that does other work too, the CPU time per answer is the figure to compare.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import uvloop

import semid

DIM, CODES, LEVELS = 256, 4096, 3
SECONDS = 6.0
JSON, NPY = "application/json", "application/x-npy"


def write_shop(folder: Path) -> None:
    generator = np.random.default_rng(0)
    books = [
        0.5**level * generator.normal(size=(CODES, DIM)).astype(np.float32)
        for level in range(LEVELS)
    ]
    model = semid.from_codebooks(books)
    model.save(folder / "model")
    x = generator.normal(size=(2_000, DIM)).astype(np.float32)
    semid.CatalogueBundle.create(
        folder / "bundle", model.encode(x, ids=[f"i{n}" for n in range(2_000)])
    )


def plain_app(folder: Path):
    """The handler that one writes first: typed body, `encode` in the request."""
    from fastapi import FastAPI
    from pydantic import create_model

    model = semid.load(folder / "model")
    body = create_model("Body", embeddings=(list[list[float]], ...))
    app = FastAPI()

    def encode(asked):
        ids = model.encode(np.array(asked.embeddings, np.float32))
        return {"codes": ids.codes.tolist()}

    encode.__annotations__ = {"asked": body}
    app.post("/v1/encode")(encode)
    return app


def serve(kind: str, folder: Path, port: int, queue_rows: int) -> None:
    import uvicorn

    if kind == "plain":
        uvicorn.run(plain_app(folder), port=port, log_level="error", access_log=False)
        return
    from semid.serve import run
    from semid.serve.app import create_app
    from semid.serve.limits import ServeOptions

    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - the log is made, not shown
    app = create_app(
        folder / "bundle", folder / "model", options=ServeOptions(queue_rows=queue_rows)
    )
    run.serve(app, port=port)


async def client(port: int, request: bytes, until: float, pause: float, out: list) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    due = time.perf_counter() + pause * np.random.default_rng(id(out) % 2**32).random()
    while time.perf_counter() < until:
        # With a rate, time counts from when the request was due: a stall is not hidden.
        if pause:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
        started = due if pause else time.perf_counter()
        due += pause
        writer.write(request)
        await writer.drain()
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        out.append((int(head[9:12]), time.perf_counter() - started))
    writer.close()


async def load(
    port: int, kind: str, body: bytes, clients: int, rate: float = 0.0, seconds: float = SECONDS
) -> list:
    head = f"POST /v1/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    out: list = []
    until = time.perf_counter() + seconds
    pause = clients / rate if rate else 0.0
    await asyncio.gather(*(client(port, request, until, pause, out) for _ in range(clients)))
    return out


def answers_once(port: int, media: str, body: bytes) -> bool:
    answers = uvloop.run(load(port, media, body, 1, seconds=0.5))
    return any(status == 200 for status, _ in answers)


def memory(process: multiprocessing.Process) -> float:
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def cpu_seconds(process: multiprocessing.Process) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def running(kind: str, folder: Path, media: str, body: bytes):
    """Serve in a process until the block ends; yields the process and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = 512 if kind == "overload" else 16_384
    process = multiprocessing.Process(target=serve, args=(kind, folder, port, queue))
    process.start()
    try:
        while process.is_alive():
            try:
                if answers_once(port, media, body):
                    break
            except OSError:
                time.sleep(0.2)
        yield process, port
    finally:
        process.terminate()
        process.join()


def soak(folder: Path, body: bytes, minutes: int) -> None:
    """Print the memory after each minute of 500 single rows per second."""
    with running("semid", folder, JSON, body) as (process, port):
        print("| minute | answers | p99 ms | MiB |")
        print("|--:|--:|--:|--:|")
        for minute in range(1, minutes + 1):
            answers = uvloop.run(load(port, JSON, body, 32, 500.0, 60.0))
            assert all(status == 200 for status, _ in answers)
            p99 = 1000 * np.quantile([seconds for _, seconds in answers], 0.99)
            print(
                f"| {minute} | {len(answers):,} | {p99:.1f} | {memory(process):.1f} |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=int, default=0)
    minutes = parser.parse_args().minutes
    generator = np.random.default_rng(1)
    x = generator.normal(size=(256, DIM)).astype(np.float32)
    one = json.dumps({"embeddings": [[float(f"{v:.6g}") for v in x[0]]]}).encode()
    file = io.BytesIO()
    np.save(file, x)
    many = file.getvalue()
    cases = [
        ("1 row, JSON, 1,000 per second asked for", "semid", 1, JSON, one, 32, 1000.0),
        ("1 row, JSON, 32 clients", "semid", 1, JSON, one, 32, 0.0),
        ("1 row, JSON, 32 clients", "plain", 1, JSON, one, 32, 0.0),
        ("256 rows, .npy, 8 clients", "semid", 256, NPY, many, 8, 0.0),
        ("256 rows, .npy, 8 clients, queue of 512", "overload", 256, NPY, many, 8, 0.0),
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_shop(folder)
        if minutes:
            soak(folder, one, minutes)
            return
        print("| load | server | answers/s | rows/s | p50 ms | p99 ms | CPU ms | refused | MiB |")
        print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
        for title, kind, rows, media, body, clients, rate in cases:
            with running(kind, folder, media, body) as (process, port):
                before, cpu = memory(process), cpu_seconds(process)
                answers = uvloop.run(load(port, media, body, clients, rate))
                cpu = 1000 * (cpu_seconds(process) - cpu) / len(answers)
                good = [seconds for status, seconds in answers if status == 200]
                refused = sum(status == 429 for status, _ in answers)
                assert len(good) + refused == len(answers)
                assert answers_once(port, media, body)  # it recovers
                p50, p99 = 1000 * np.quantile(good, [0.5, 0.99])
                grown = memory(process) - before
                print(
                    f"| {title} | {'plain FastAPI' if kind == 'plain' else 'semid serve'} "
                    f"| {len(good) / SECONDS:,.0f} | {rows * len(good) / SECONDS:,.0f} "
                    f"| {p50:.1f} | {p99:.1f} | {cpu:.2f} | {refused} "
                    f"| {before:.0f} +{grown:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
