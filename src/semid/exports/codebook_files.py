"""Codebooks that other programs fitted, as tokenizers: FAISS indexes and checkpoints of torch.

No file can run code: FAISS reads its own format, and of a pickle only numbers, containers and
tensors are made; every other name in it becomes an empty stand-in.
"""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.artefact import read_tensors
from semid.errors import ArtefactError, UsageError, check_choice, import_extra
from semid.exports.formats import CODEBOOK_SOURCES
from semid.lazy import torch
from semid.options import MAX_BEAM
from semid.tokenizers.from_arrays import Codebooks, from_codebooks

Array = npt.NDArray[np.float32]

CHECKPOINTS = {
    "openonerec": re.compile(r"(?:^|.*\.)centroids\.(\d+)$"),
    "torcheasyrec": re.compile(r"(?:^|.*\.)layers\.(\d+)\.centroids$"),
    "grid-checkpoint": re.compile(r"(?:^|.*\.)quantization_layer_list\.(\d+)\.centroids$"),
}
"""What the programs call the codebook of each level in a state dict."""

LSQ_BEAM = 16
"""Beam for codebooks of local search quantization, fitted for a search over all levels."""


def import_codebooks(
    source: str, path: str | os.PathLike[str], *, normalize_residuals: bool | None = None
) -> Codebooks:
    """Read codebooks of another program as a tokenizer; see `semid.from_codebooks`.

    Args:
        source: ``faiss``: an index with product codes (also after an OPQ or another linear
            transform), residual or additive codes. ``openonerec``, ``torcheasyrec``,
            ``grid-checkpoint``: a file of residual K-means that torch or safetensors wrote.
        path: the file.
        normalize_residuals: whether the program scales residuals to unit length before every
            level; None takes what the file says, else the program's default (GRID does).

    Returns:
        A fitted tokenizer without a report.

    Raises:
        UsageError: for an unknown source, or a kind of index that has no counterpart.
        ArtefactError: if the file cannot be read, or holds no such codebooks.

    Example:
        >>> model = semid.import_codebooks("openonerec", "tokenizer.pt")
    """
    check_choice("--from", source, CODEBOOK_SOURCES)
    if not Path(path).is_file():
        raise ArtefactError(f"'{path}' is no file; give the one that {source} wrote")
    if source == "faiss":
        if normalize_residuals:
            raise UsageError("FAISS does not scale residuals; leave normalize_residuals out")
        return _read_faiss(path)
    document = read_checkpoint(path)
    books = _levels(path, source, document)
    if normalize_residuals is None:
        hyper = document.get("hyper_parameters")
        stored = hyper.get("normalize_residuals") if isinstance(hyper, Mapping) else None
        normalize_residuals = stored if isinstance(stored, bool) else source == "grid-checkpoint"
    try:
        return from_codebooks(books, combine="sum", normalize_residuals=normalize_residuals)
    except UsageError as error:
        raise ArtefactError(f"'{path}' holds no residual codebooks: {error}") from None


# Checkpoints ------------------------------------------------------------------------------------


def _levels(path: Any, source: str, document: Mapping[str, Any]) -> list[Any]:
    """Return the codebooks of all levels by the names that the program gives them."""
    pattern = CHECKPOINTS[source]
    tensors = dict(_tensors(document))
    if any(re.search(r"(?:^|\.)encoder\.", name) for name in tensors):
        raise ArtefactError(
            f"'{path}' holds an encoder too, so it is no residual K-means on embeddings; encode "
            "with that program, and give semid its latents and the arrays to semid.from_codebooks"
        )
    # Level number to tensor, for each stem before the number: one stem is one set of codebooks.
    places: dict[str, dict[int, Any]] = {}
    for name, tensor in tensors.items():
        match = pattern.match(name)
        if match is not None:
            stem = name[: match.start(1)]
            places.setdefault(stem, {})[int(match.group(1))] = tensor
    if len(places) != 1:
        listed = ", ".join(sorted(tensors)[:8]) or "no tensors"
        what = "several sets of codebooks" if places else "no codebooks"
        raise ArtefactError(
            f"'{path}' holds {what} by the names of {source} (it holds {listed}); give the "
            "program's checkpoint, or the arrays to semid.from_codebooks"
        )
    [levels] = places.values()
    if sorted(levels) != list(range(len(levels))):
        raise ArtefactError(f"'{path}' holds levels {sorted(levels)}; some are missing")
    return [levels[level] for level in range(len(levels))]


def _tensors(document: Any, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the names and tensors of nested dictionaries and lists."""
    if isinstance(document, torch.Tensor | np.ndarray):
        yield prefix, document
    elif depth < 8 and isinstance(document, Mapping):
        for key, value in document.items():
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)
    elif depth < 8 and isinstance(document, list | tuple):
        for key, value in enumerate(document):
            yield from _tensors(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Read what ``torch.save`` or safetensors wrote, without running any code in it.

    Objects of classes that are no tensors or containers become empty stand-ins.

    Raises:
        ArtefactError: if the file is neither, damaged, or holds no dictionary.
    """
    if Path(path).suffix == ".safetensors":
        return read_tensors(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                raise ValueError("a checksum does not match")
            document = _TensorReader(archive).load()
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises nearly anything
        raise ArtefactError(
            f"'{path}' cannot be read as what torch.save writes ({error}); it is damaged, of a "
            "version before torch 1.6, or something else: give a .pt, .ckpt or .safetensors file"
        ) from None
    if not isinstance(document, Mapping):
        raise ArtefactError(f"'{path}' holds a {type(document).__name__}; give a state dict")
    return document


class _StandIn:
    """What an object of any other class becomes: it takes everything and does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **named: Any) -> _StandIn:
        return _StandIn()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take a value of a list."""

    def extend(self, values: Any) -> None:
        """Take values of a list."""


_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuild(
    storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any
) -> torch.Tensor:
    return torch.as_strided(storage, size, stride, offset)  # raises beyond the storage


def _rebuild_parameter(data: torch.Tensor, *rest: Any) -> torch.Tensor:
    return data


class _TensorReader(pickle.Unpickler):
    """Reads the pickle in an archive of ``torch.save``; only the names below stand for anything."""

    KNOWN: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    }

    def __init__(self, archive: zipfile.ZipFile) -> None:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        self.archive, self.folder = archive, name[: -len("data.pkl")]
        super().__init__(archive.open(name))

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for; nothing is ever imported."""
        return self.KNOWN.get((module, name), _StandIn)

    def persistent_load(self, pid: Any) -> Any:
        """Return the numbers of a storage, which lie beside the pickle."""
        # torch.save writes ("storage", type, file, device, number of elements).
        _, dtype, key, _, _ = pid
        if not isinstance(dtype, torch.dtype):
            return _StandIn()
        data = bytearray(self.archive.read(f"{self.folder}data/{key}"))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


# FAISS ------------------------------------------------------------------------------------------


def _read_faiss(path: str | os.PathLike[str]) -> Codebooks:
    faiss = import_extra("faiss", package="faiss-cpu", extra="faiss", purpose="reading an index")
    try:
        whole = faiss.read_index(str(path))  # owns the memory that the names below point into
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"'{path}' cannot be read as a FAISS index ({reason})") from None
    settings: dict[str, Any] = {}
    index: Any = faiss.downcast_index(whole)
    if isinstance(index, faiss.IndexPreTransform):
        matrix, offset = _transform(faiss, index)
        settings = {"projection": matrix, "offset": offset}
        index = faiss.downcast_index(index.index)
    if not index.is_trained:
        raise ArtefactError(f"'{path}' is an index that is not trained; train it first")
    if isinstance(index, faiss.IndexPQ):
        pq = index.pq
        centroids = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
        return from_codebooks(list(centroids), combine="concat", **settings)
    if isinstance(index, faiss.IndexResidualQuantizer):
        beam = min(int(index.rq.max_beam_size), MAX_BEAM)
        books = _additive(faiss, index.rq)
        return from_codebooks(books, combine="sum", beam_width=beam, **settings)
    if isinstance(index, faiss.IndexLocalSearchQuantizer):
        # No codebook of LSQ comes first: those that carry most go first, and a beam replaces the
        # local search.
        books = sorted(_additive(faiss, index.lsq), key=lambda book: -float(book.var(0).sum()))
        return from_codebooks(books, combine="sum", beam_width=LSQ_BEAM, **settings)
    raise UsageError(
        f"'{path}' is an {type(index).__name__}; semid reads IndexPQ, IndexResidualQuantizer and "
        "IndexLocalSearchQuantizer, alone or after linear transforms in an IndexPreTransform"
    )


def _additive(faiss: Any, quantizer: Any) -> list[Array]:
    """Return the codebooks of an additive quantizer, whose codewords lie one after another."""
    words = faiss.vector_to_array(quantizer.codebooks).reshape(-1, quantizer.d)
    bounds = faiss.vector_to_array(quantizer.codebook_offsets).astype(np.int64)
    return [words[a:b] for a, b in pairwise(bounds.tolist())]


def _transform(faiss: Any, index: Any) -> tuple[Array, Array]:
    """Return the chain of transforms as a ``(dim, latent)`` matrix and a ``(latent,)`` offset."""
    matrix, offset = np.eye(index.d), np.zeros(index.d)
    for place in range(index.chain.size()):
        step = faiss.downcast_VectorTransform(index.chain.at(place))
        if not isinstance(step, faiss.LinearTransform):
            raise UsageError(
                f"the index has a {type(step).__name__} before its codes; semid reads linear "
                "transforms (OPQ, PCA, rotations)"
            )
        weight = faiss.vector_to_array(step.A).reshape(step.d_out, step.d_in).astype(np.float64)
        # A step takes x to A x + b, and rows are multiplied from the left.
        matrix, offset = matrix @ weight.T, weight @ offset
        if step.have_bias:
            offset = offset + faiss.vector_to_array(step.b)
    return matrix.astype(np.float32), offset.astype(np.float32)
