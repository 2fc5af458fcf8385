"""Histories of users for trainers of other programs, as rows of the exported ids.

Every history is in order of time and has at least three items: both programs hold out its last item
for the test and the one before it for validation. Items without ids are left out.
"""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.codes import SemanticIds
from semid.data.interactions import Interactions
from semid.errors import InteractionsError
from semid.exports.formats import ExportFormat

logger = logging.getLogger(__name__)

MIN_LENGTH = 3
"""Interactions of a user: one to train on, one for validation, one for the test."""


def histories(
    ids: SemanticIds, interactions: Interactions
) -> tuple[list[str], list[npt.NDArray[np.int32]]]:
    """Return the users with at least three known items, and the rows of the items of each.

    Raises:
        InteractionsError: if the interactions have no order, or no user has as many.
    """
    sequences = interactions.sequences(ids.items)
    owner = np.repeat(np.arange(len(sequences)), sequences.lengths)
    is_known = sequences.items >= 0
    counts = np.bincount(owner[is_known], minlength=len(sequences))
    parts = np.split(sequences.items[is_known], np.cumsum(counts)[:-1])
    is_long = counts >= MIN_LENGTH
    if not is_long.any():
        raise InteractionsError(
            f"none of the {len(sequences)} users of {interactions.label} has {MIN_LENGTH} "
            "interactions with items of these ids: the last two are for validation and test"
        )
    if not is_long.all():
        logger.warning(
            "%d of %d users have fewer than %d interactions with items of these ids and are left "
            "out",
            int((~is_long).sum()),
            len(sequences),
            MIN_LENGTH,
        )
    users = sequences.user_ids.filter(pa.array(is_long)).to_pylist()
    return users, [part for part, long in zip(parts, is_long, strict=True) if long]


# LC-Rec, LETTER: ``NAME.inter.json``, ``{"user": [17, 3, 25], ...}`` with the keys of
# ``NAME.index.json`` as numbers. Their training splits off the last two items itself.


def _write_lcrec(path: Path, *, ids: SemanticIds, interactions: Interactions) -> None:
    users, rows = histories(ids, interactions)
    with path.open("w", encoding="utf8") as file:
        file.write("{")
        for number, (user, items) in enumerate(zip(users, rows, strict=True)):
            separator = "," if number else ""
            file.write(f"{separator}\n{json.dumps(user)}: {json.dumps(items.tolist())}")
        file.write("\n}\n")


LCREC_SEQUENCES = ExportFormat(_write_lcrec, interactions="required")


# GRID: the folders ``training``, ``evaluation`` and ``testing`` of gzipped TFRecord files. An
# example has the int64 lists ``sequence_data``, columns of the tensor of ids, and ``user_id``. GRID
# predicts the last item of each sequence, so evaluation ends with the last but one.

GRID_SPLITS = {"training": -2, "evaluation": -1, "testing": None}

GRID_FILES = 64
"""Files per split: GRID gives whole files to its 8 workers per GPU, and none may go without."""


def _write_grid(path: Path, *, ids: SemanticIds, interactions: Interactions) -> None:
    """Write the splits, and ``users.parquet`` with the number and the id of each user."""
    users, rows = histories(ids, interactions)
    for split, end in GRID_SPLITS.items():
        (path / split).mkdir()
        for number, part in enumerate(np.array_split(range(len(users)), GRID_FILES)):
            if not len(part):
                break
            with (
                (path / split / f"part-{number:05d}.tfrecord.gz").open("wb") as raw,
                # Without a name and a time, equal histories give equal files.
                gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as file,
            ):
                for user in part.tolist():
                    lists = {"sequence_data": rows[user][:end].tolist(), "user_id": [user]}
                    file.write(tfrecord(example(lists)))
    table = {"user": np.arange(len(users)), "user_id": pa.array(users, pa.string())}
    pq.write_table(pa.table(table), path / "users.parquet")


def example(lists: dict[str, list[int]]) -> bytes:
    """Return lists of non-negative integers as the bytes of a ``tf.train.Example``.

    Source: ``tensorflow/core/example/example.proto`` and ``feature.proto``, in the wire format of
    protocol buffers.
    """
    features = b""
    for name, values in lists.items():
        int64_list = _message(1, b"".join(map(_varint, values)))  # packed
        feature = _message(3, int64_list)
        features += _message(1, _message(1, name.encode()) + _message(2, feature))
    return _message(1, features)


def _message(field: int, content: bytes) -> bytes:
    """Return a field of bytes: its number and wire type 2, the length, the content."""
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Return a non-negative integer in groups of 7 bits, the lowest first."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def tfrecord(content: bytes) -> bytes:
    """Return one record of a TFRecord file: length, its checksum, content, its checksum."""
    length = len(content).to_bytes(8, "little")
    return length + _masked_crc(length) + content + _masked_crc(content)


def _masked_crc(content: bytes) -> bytes:
    """Return the checksum as TFRecord masks it: rotated by 15 bits, plus a constant."""
    crc = crc32c(content)
    return ((((crc >> 15 | crc << 17) & 0xFFFFFFFF) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(
        4, "little"
    )


def crc32c(content: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of bytes."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _crc_table() -> Iterator[int]:
    """Yield the remainder of each byte by the reversed polynomial of Castagnoli."""
    for byte in range(256):
        remainder = byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0x82F63B78 if remainder & 1 else 0)
        yield remainder


_CRC_TABLE = tuple(_crc_table())

GRID_SEQUENCES = ExportFormat(_write_grid, folder=True, interactions="required")
