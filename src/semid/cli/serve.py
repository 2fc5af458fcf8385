"""The command that serves a published catalogue."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from semid.cli.flags import check_keys
from semid.cli.shared import INPUT
from semid.errors import MissingExtraError, UsageError

TOKEN_VARIABLE = "SEMID_SERVE_TOKEN"


def serve(
    published: Path,
    model: Annotated[Path, typer.Option(rich_help_panel=INPUT)],
    settings: Annotated[dict[str, Any], "serve"],
    items: Annotated[Path | None, typer.Option(rich_help_panel=INPUT)] = None,
    retriever: Annotated[Path | None, typer.Option(rich_help_panel=INPUT)] = None,
    host: str = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535)] = 8080,
    token_file: Path | None = None,
    trace: bool = False,
) -> None:
    """Serve ids, new items, neighbors, recommendations and the explorer over HTTP.

    The explorer is at /, the endpoints are described at /openapi.json. The log goes to the error
    stream as JSON lines.

    Example: semid serve published/ --model model/ --items items.parquet --port 8080

    Args:
        published: Bundle, as 'semid encode --catalogue' grows it.
        model: Folder written by 'semid fit'; the model that made the ids.
        items: Table with item_id and title, for the explorer and for answers.
        retriever: Folder written by 'semid retrieve'; without it nothing is recommended.
        host: Address to listen on; by default this machine alone is served.
        port: Port to listen on; 0 takes a free one, which the log names.
        token_file: File with the token that requests need; else the variable SEMID_SERVE_TOKEN.
        trace: Send traces to where OTEL_EXPORTER_OTLP_ENDPOINT says (pip install 'semid[otel]').
    """
    check_keys("serve", settings)
    try:
        from semid.serve.app import create_app
        from semid.serve.limits import ServeOptions
        from semid.serve.observe import otlp_provider
        from semid.serve.run import serve as run
    except ModuleNotFoundError as error:
        package = (error.name or "fastapi").partition(".")[0]
        raise MissingExtraError(package, extra="serve", purpose="semid serve") from None
    options = ServeOptions(**settings)
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="utf8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token-file '{token_file}' cannot be read: {error}") from None
        if not token:
            raise UsageError(f"--token-file '{token_file}' is empty; write a token into it")
    app = create_app(
        published,
        model,
        items=items,
        retriever=retriever,
        token=token,
        host=host,
        options=options,
        trace_provider=otlp_provider() if trace else None,
    )
    run(app, host=host, port=port)
