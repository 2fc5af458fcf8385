"""From texts of items to embeddings, by a sentence encoder, in parts that a stopped run keeps."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import string
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semid.data.columns import TextModel
from semid.data.ids import ItemIds
from semid.data.items import DEFAULT_ID_COLUMN, text_column_of
from semid.data.tables import open_table
from semid.documents import checksum
from semid.errors import (
    ArtefactError,
    EmbeddingError,
    IdsError,
    InputError,
    OutputExistsError,
    UsageError,
    brief,
    check_choice,
    import_extra,
)
from semid.filesystems import Folder, local_path, open_parquet, split_path
from semid.output import atomic_file, claim_output
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.runs import KEY_FILE, partial_path, remove_state_folder

logger = logging.getLogger(__name__)

PART_ROWS = 4096
"""Rows of a part: what a kill costs at most."""
_CHUNK_BATCHES = 8  # texts of so many batches are sorted by length, to pad less

Array = npt.NDArray[np.float32]


@with_progress
def embed(
    items: Any,
    output: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    text_column: str | None = None,
    template: str | None = None,
    id_column: str | None = None,
    revision: str | None = None,
    batch_size: int = 32,
    normalize: bool = True,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    progress: ProgressArgument = None,
) -> Path:
    """Write embeddings of items' texts to Parquet: ``item_id`` and ``embedding`` in float32.

    The name and the revision of the encoder lie in the file's metadata. A tokenizer that is fitted
    on it remembers them, and warns about embeddings of another encoder.

    Args:
        items: table of items, or the path of one: anything that has columns, see
            `semid.data.tables.open_table`. The texts are held in memory.
        output: Parquet file to write.
        model: model of sentence-transformers: a name on the Hugging Face Hub, or a folder.
        text_column: column of the text; default ``text``.
        template: several columns as one text, instead of ``text_column``, such as
            ``"{title}. {brand}"``; missing values are empty.
        id_column: column of the item ids; default ``item_id``.
        revision: revision of a model on the Hub; default: the newest.
        batch_size: texts per step of the encoder (1 to 65,536).
        normalize: whether vectors get length 1.
        device: ``auto`` (CUDA if available), ``cpu`` or ``cuda``.
        overwrite: replace an existing output.
        resume: continue a run that was stopped; it lies beside the output, ``OUTPUT.partial``.
        progress: callback that receives progress events.

    Returns:
        ``output``, which `open_embeddings` reads.

    Raises:
        MissingExtraError: without sentence-transformers.
        UsageError: for a model, a column or a template that is none.
        InputError: if not one item has a text.
        ArtefactError: if the run that was stopped had other texts or another model.
    """
    if isinstance(batch_size, bool) or not 1 <= batch_size <= 65_536:
        raise UsageError(f"batch_size={batch_size!r} (--batch-size): give 1 to 65,536")
    ids, texts, template = read_texts(
        items, text_column=text_column, template=template, id_column=id_column
    )
    progress = progress or QuietProgress()
    state = partial_path(output)
    with claim_output(output, overwrite=overwrite, inputs=[items], state=state):
        progress.start("load the encoder")
        encoder, revision = open_encoder(
            model, revision=revision, device=device, bars=not isinstance(progress, QuietProgress)
        )
        about = TextModel(
            model=str(model), revision=revision, template=template, normalized=normalize
        )
        parts = Folder(state)
        _begin(parts, _run_key(about, batch_size, ids, texts), resume=resume)
        progress.start("embed", total=len(ids))
        names = []
        for start in range(0, len(ids), PART_ROWS):
            names.append(f"part-{start:012d}.parquet")
            part = texts[start : start + PART_ROWS]
            if parts.exists_file(names[-1]):  # complete: files appear whole
                progress.step(len(part))
                continue
            blocks = []
            for block in _encode(encoder, part, batch_size, normalize=normalize):
                blocks.append(block)
                progress.step(len(block))
            rows = ids.take(np.arange(start, start + len(part)))
            parts.write_table(names[-1], _table(rows, np.concatenate(blocks), about))
        _join(parts, names, output, overwrite=overwrite)
        remove_state_folder(state)
    return Path(output)


def read_texts(
    items: Any,
    *,
    text_column: str | None = None,
    template: str | None = None,
    id_column: str | None = None,
) -> tuple[ItemIds, list[str], str]:
    """Return item ids, one text per item, and the template that made them."""
    if template is not None and text_column is not None:
        raise UsageError("--text-column and --template both say what the text is; give one of them")
    pieces: list[tuple[str, str | None]] = [("", text_column or "text")]
    if template is None:
        template = "{" + (text_column or "text") + "}"
    else:
        pieces = _parse(template)
    table = open_table(items, what="items", error=IdsError)
    key = table.require(id_column or DEFAULT_ID_COLUMN, flag="--id-column (id_column=)")
    flag = "--text-column (text_column=) or --template (template=)"
    columns = [table.require(name, flag=flag) for _, name in pieces if name is not None]
    read = list(dict.fromkeys([key, *columns]))
    content = table.read(read, text=read)
    ids = ItemIds(content.column(key), source=f"id column '{key}' of {table.label}")
    parts: list[Any] = []
    for literal, name in pieces:
        parts.append(pa.scalar(literal, pa.large_string()))
        parts.append(
            pa.scalar("", pa.large_string()) if name is None else text_column_of(content, name)
        )
    joined = pc.utf8_trim_whitespace(
        pc.binary_join_element_wise(*parts, pa.scalar("", pa.large_string()))
    )
    texts: list[str] = joined.to_pylist()
    empty = texts.count("")
    if empty == len(texts):
        raise InputError(f"not one of {len(texts)} items has a text; name columns with {flag}")
    if empty:
        logger.warning(
            "%s of %s items have no text: all of them get the same vector",
            f"{empty:,}",
            f"{len(texts):,}",
        )
    return ids, texts, template


def _parse(template: str) -> list[tuple[str, str | None]]:
    """Return literal texts and the column behind each, None behind the last."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError:
        parsed = []
    plain = all(not spec and not conversion for _, _, spec, conversion in parsed)
    if not plain or not any(name for _, name, _, _ in parsed) or "" in [p[1] for p in parsed]:
        raise UsageError(
            f"template='{template}' (--template): name columns in braces, such as '{{title}}. "
            "{brand}'"
        )
    return [(literal, name) for literal, name, _, _ in parsed]


def open_encoder(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    device: str = "auto",
    bars: bool = True,
) -> tuple[Any, str | None]:
    """Open a model of sentence-transformers; return it and its revision.

    That of a folder is a digest of the weights in it. ``bars`` says whether transformers shows its
    progress.
    """
    import torch

    check_choice("--device (device=)", device, ("auto", "cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda (device=) needs a GPU that torch can use; take auto or cpu")
    package = import_extra(
        "sentence_transformers",
        package="sentence-transformers",
        extra="text",
        purpose="embedding item texts",
    )
    name, folder = os.fspath(model), Path(model).expanduser()
    if folder.is_dir() and revision is not None:
        raise UsageError(f"--revision (revision=) is for the Hub, and '{name}' is a folder here")
    options = {} if device == "auto" else {"device": device}
    options |= {} if revision is None else {"revision": revision}
    try:
        with _bars(shown=bars):
            encoder = package.SentenceTransformer(
                str(folder) if folder.is_dir() else name, **options
            )
    except (OSError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise UsageError(
            f"'{name}' cannot be opened as a model of sentence-transformers ({brief(error)}); give "
            "the name of one on the Hugging Face Hub, or its folder"
        ) from error
    return encoder, _weights_digest(folder) if folder.is_dir() else _hub_revision(name, revision)


@contextlib.contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Hide the progress bars of transformers, which sentence-transformers has imported."""
    module: Any = sys.modules.get("transformers.utils.logging")
    hides = not shown and module is not None and module.is_progress_bar_enabled()
    if hides:
        module.disable_progress_bar()
    try:
        yield
    finally:
        if hides:
            module.enable_progress_bar()


def _weights_digest(folder: Path) -> str:
    """Identify the weights in a folder, wherever it lies."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".safetensors", ".bin"):
            digest.update(file.relative_to(folder).as_posix().encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:16]}"


def _hub_revision(name: str, revision: str | None) -> str | None:
    """Return the commit of a model that has just been opened, from the cache of the Hub."""
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError:
        return revision
    for repository in (name, f"sentence-transformers/{name}"):
        try:
            file = hub.try_to_load_from_cache(repository, "config.json", revision=revision)
        except ValueError:  # not a name of the Hub
            continue
        if isinstance(file, str):
            return Path(file).parent.name
    return revision


def _encode(encoder: Any, texts: list[str], batch_size: int, *, normalize: bool) -> Iterator[Array]:
    """Yield the vectors of some texts at a time."""
    import torch

    size = batch_size * _CHUNK_BATCHES
    for start in range(0, len(texts), size):
        try:
            rows = encoder.encode(
                texts[start : start + size],
                batch_size=batch_size,
                normalize_embeddings=normalize,
                show_progress_bar=False,
            )
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"batch_size={batch_size} (--batch-size) needs more memory than the GPU has "
                f"({brief(error)}); give less"
            ) from error
        rows = np.ascontiguousarray(rows, dtype=np.float32)
        if not np.isfinite(rows).all():
            raise EmbeddingError("the encoder gave NaN or infinite values; try another device")
        yield rows


def encode_texts(texts: list[str], model: str) -> Array:
    """Embed texts in memory: ``(texts, dim)`` rows of unit length."""
    if not any(texts):
        raise InputError("not one item has a text to embed; give the release's item metadata")
    encoder, _ = open_encoder(model)
    return np.concatenate(list(_encode(encoder, texts, 32, normalize=True)))


def _run_key(about: TextModel, batch_size: int, ids: ItemIds, texts: list[str]) -> str:
    """Identify a run: the encoder, the ids and the texts; batches decide the last bits."""
    digest = hashlib.sha256(ids.hash64().tobytes())
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return checksum([asdict(about), batch_size, digest.hexdigest()])


def _begin(parts: Folder, key: str, *, resume: bool) -> None:
    """Mark the folder as this run's, or check that it is."""
    stored = parts.read(KEY_FILE)
    if stored is None:
        parts.write(KEY_FILE, json.dumps({"key": key}).encode())
    elif not resume:
        raise OutputExistsError(
            f"'{parts}' holds an unfinished run; continue it with --resume (resume=True) or delete "
            "that folder"
        )
    elif stored != json.dumps({"key": key}).encode():
        raise ArtefactError(
            f"'{parts}' belongs to a run with another model, other texts or another batch size; "
            "repeat the command that began it, or delete that folder"
        )


def _table(ids: ItemIds, rows: Array, about: TextModel) -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    table = pa.table({"item_id": ids.to_arrow(), "embedding": vectors})
    return table.replace_schema_metadata(about.to_metadata())


def _join(parts: Folder, names: list[str], output: Any, *, overwrite: bool) -> None:
    """Write one file of all parts, a part at a time."""
    local = local_path(output)
    if local is None:
        folder, name = split_path(output)
        opened: Any = folder.stream(name)
    else:
        opened = atomic_file(local, overwrite=overwrite)
    with open_parquet(parts.file(names[0])) as first:
        schema = first.schema_arrow
    with opened as sink, pq.ParquetWriter(sink, schema, write_page_checksum=True) as writer:
        for name in names:
            with open_parquet(parts.file(name)) as part:
                writer.write_table(part.read())
