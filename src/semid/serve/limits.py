"""Limits of a service, and what its command line takes; nothing here needs a web framework."""

from __future__ import annotations

from dataclasses import dataclass

from semid.options import Options, option

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Addresses that this machine alone reaches."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Limits of a service."""

    max_rows: int = option(4096, ge=1, le=65_536, help="Largest number of rows of a request.")
    max_body_bytes: int = option(64 * 2**20, ge=1024, help="Largest body of a request, in bytes.")
    queue_rows: int = option(16_384, ge=1, help="Rows that may wait for an engine.")
    batch_rows: int = option(1024, ge=1, le=65_536, help="Rows of one engine call.")
    batch_wait: float = option(
        0.002, ge=0, le=1, help="Seconds that a lone request waits for others to join it."
    )
    timeout: float = option(30.0, gt=0, le=3600, help="Seconds until a request is given up.")
    watch: float = option(
        10.0, ge=0, le=86_400, help="Seconds between looks for new versions; 0 never looks."
    )
    threads: int | None = option(None, ge=1, le=4096, help="CPU threads of the engine.")
