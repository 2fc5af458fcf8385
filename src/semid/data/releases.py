"""Public releases of review data (Amazon, MovieLens), read into the layout of semid."""

from __future__ import annotations

import ast
import csv
import gzip
import html
import json
import math
import os
import reprlib
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.data.source import write_npy
from semid.data.texts import encode_texts
from semid.errors import InputError, InteractionsError, UsageError
from semid.output import atomic_folder

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Release:
    """A release, read."""

    # ``user_id``, ``item_id``, ``timestamp`` (seconds), ``position`` (0 is a user's oldest) and
    # ``rating``, users in order of appearance, oldest first
    interactions: pa.Table
    # ``item_id``, ``title``, ``brand``, ``categories`` and ``text`` of every item that occurs;
    # empty where the release says nothing
    items: pa.Table
    notes: tuple[str, ...]  # what was dropped, in sentences

    def write(
        self, folder: str | os.PathLike[str], *, embed: str | None = None, overwrite: bool = False
    ) -> Path:
        """Write ``items.parquet``, ``interactions.parquet`` and, with a model, embeddings."""
        with atomic_folder(folder, overwrite=overwrite) as work:
            pq.write_table(self.items, work / "items.parquet")
            pq.write_table(self.interactions, work / "interactions.parquet")
            if embed is not None:
                rows = encode_texts(self.items.column("text").to_pylist(), embed)
                write_npy(work / "embeddings.f16.npy", [rows], shape=rows.shape, dtype="<f2")
        return Path(folder)


def text_lines(path: Path, *, encoding: str = "utf8") -> Iterator[str]:
    """Yield the lines of a text file; InputError if it is cut short, damaged or misencoded."""
    if not path.is_file():
        raise UsageError(f"'{path}' does not exist; check the path")
    number = 0
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding=encoding) as file:
        try:
            for line in file:
                number += 1
                yield line
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
            raise InputError(
                f"'{path}' cannot be read after line {number} ({reason}); download it again"
            ) from None


def interaction(
    user: Any, item: Any, time: Any, rating: Any, *, where: str, unit: int = 1
) -> tuple[str, str, int, float]:
    """Return user, item, seconds and rating; InputError, naming the line ``where``, for others."""
    for value in (user, item):
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise InputError(
                f"{where} holds the id {reprlib.repr(value)}; ids are texts or integers"
            )
    try:
        seconds, stars = int(time) // unit, float(rating)
    except (TypeError, ValueError, OverflowError):
        seconds, stars = 2**63, 0.0
    if not -(2**63) <= seconds < 2**63 or not math.isfinite(stars):
        raise InputError(
            f"{where} holds the rating {reprlib.repr(rating)} at time {reprlib.repr(time)}, which "
            "are no numbers"
        )
    return str(user), str(item), seconds, stars


def core_mask(users: Ints, items: Ints, least: int) -> npt.NDArray[np.bool_]:
    """Return the mask ``(interactions,)`` of the k-core, ``least`` being k; 0 or 1 keeps all."""
    mask = np.ones(len(users), dtype=bool)
    # Leaving out a rare item can make a user rare, so both are repeated until nothing changes.
    while least > 1:
        before = int(mask.sum())
        for codes in (users, items):
            counts = np.bincount(codes[mask], minlength=int(codes.max(initial=-1)) + 1)
            mask &= counts[codes] >= least
        if int(mask.sum()) == before:
            break
    return mask


def make_release(
    rows: Iterator[tuple[str, str, int, float]],
    described: dict[str, tuple[str, str, str]],
    *,
    core: int,
    label: str,
) -> Release:
    """Gather rows (user, item, seconds, rating) into tables; ``core`` is k of the k-core."""
    if core < 0:
        raise UsageError(f"--core {core} (core=): give 0 or more")
    user_ids: dict[str, int] = {}
    item_ids: dict[str, int] = {}
    # 24 bytes per interaction; ids are numbered in order of first appearance.
    log = np.fromiter(
        (
            (
                user_ids.setdefault(user, len(user_ids)),
                item_ids.setdefault(item, len(item_ids)),
                time,
                rating,
            )
            for user, item, time, rating in rows
        ),
        dtype=[("user", "i8"), ("item", "i8"), ("time", "i8"), ("rating", "f4")],
    )
    users, items = log["user"], log["item"]
    mask = core_mask(users, items, core)
    if not mask.any():
        raise InteractionsError(
            f"none of the {len(users)} interactions of {label} is left in the {core}-core; give a "
            "smaller --core"
        )
    order = np.flatnonzero(mask)
    order = order[np.lexsort((log["time"][order], users[order]))]  # stable: ties keep their order
    # Users stand together now, so a position is the distance to the first row of the user.
    starts = np.searchsorted(users[order], users[order])
    user_names = pa.array(list(user_ids), pa.large_string())
    item_names = pa.array(list(item_ids), pa.large_string())
    interactions = pa.table(
        {
            "user_id": user_names.take(pa.array(users[order])),
            "item_id": item_names.take(pa.array(items[order])),
            "timestamp": log["time"][order],
            "position": (np.arange(len(order)) - starts).astype(np.int32),
            "rating": log["rating"][order],
        }
    )
    # Only items that occur in the k-core are described.
    names = item_names.take(pa.array(np.unique(items[order]))).to_pylist()
    facts = [described.get(name, ("", "", "")) for name in names]
    texts = [item_text(*fact) for fact in facts]
    table = pa.table(
        [
            pa.array(column, pa.large_string())
            for column in (names, *zip(*facts, strict=True), texts)
        ],
        names=["item_id", "title", "brand", "categories", "text"],
    )
    user_count = len(np.unique(starts))
    notes = [f"{len(order):,} interactions of {user_count:,} users with {len(names):,} items"]
    if len(order) < len(users):
        notes.append(f"{len(users) - len(order):,} interactions outside the {core}-core left out")
    if bare := sum(name not in described for name in names):
        notes.append(f"{bare:,} items have no description")
    return Release(interactions, table, tuple(notes))


def item_text(title: str, brand: str, categories: str) -> str:
    """Write what an encoder reads of an item."""
    parts = [("Title", title), ("Brand", brand), ("Categories", categories)]
    return "; ".join(f"{name}: {value}" for name, value in parts if value)


# user, item, rating, time, and how many of the time's units make a second
_LAYOUTS = (  # of 2014 and of 2023
    ("reviewerID", "asin", "overall", "unixReviewTime", 1),
    ("user_id", "parent_asin", "rating", "timestamp", 1000),
)


def read_amazon(
    reviews: str | os.PathLike[str],
    *,
    items: str | os.PathLike[str] | None = None,
    core: int = 5,
) -> Release:
    """Read a category of the Amazon reviews (2014, 2018 and 2023)."""
    described = {} if items is None else dict(_items(Path(items)))
    return make_release(_reviews(Path(reviews)), described, core=core, label=f"'{reviews}'")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text_lines(path), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            try:
                document = ast.literal_eval(line)  # the 2014 metadata are Python literals
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
                document = None
        if not isinstance(document, dict):
            raise InputError(f"line {number} of '{path}' is no JSON object; is it cut short?")
        yield number, document


def _reviews(path: Path) -> Iterator[tuple[str, str, int, float]]:
    for number, review in _lines(path):
        where = f"line {number} of '{path}'"
        layout = next((x for x in _LAYOUTS if x[0] in review and x[1] in review), None)
        if layout is None:
            raise InputError(
                f"{where} has neither {' or '.join(f'{x[0]}, {x[1]}' for x in _LAYOUTS)}"
            )
        user, item, rating, time, unit = layout
        if rating not in review or time not in review:
            raise InputError(f"{where} has no number in '{rating}' or '{time}'")
        ids = review[user], review[item]
        yield interaction(*ids, review[time], review[rating], where=where, unit=unit)


def _items(path: Path) -> Iterator[tuple[str, tuple[str, str, str]]]:
    for number, item in _lines(path):
        key = item.get("parent_asin") or item.get("asin")
        if not key:
            raise InputError(f"line {number} of '{path}' names no item: no asin, no parent_asin")
        yield str(key), (_text(item.get("title")), _brand(item), _categories(item))


def _brand(item: Mapping[str, Any]) -> str:
    details = item.get("details")
    named = details.get("Brand") if isinstance(details, Mapping) else None
    return _text(item.get("brand") or named or item.get("store"))


def _categories(item: Mapping[str, Any]) -> str:
    """Write the path of categories; of several paths the longest."""
    categories = item.get("categories") or item.get("category") or []
    if not isinstance(categories, list | tuple):
        return _text(categories)
    paths = [path for path in categories if isinstance(path, list | tuple)] or [categories]
    return " > ".join(_text(name) for name in max(paths, key=len))


def _text(value: Any) -> str:
    """Return one line of plain text."""
    if not value:
        return ""
    text = value if isinstance(value, str) else reprlib.repr(value)
    # Half a surrogate pair, which JSON can spell, is no character.
    return " ".join(html.unescape(text).encode("utf8", "replace").decode("utf8").split())


def read_movielens(folder: str | os.PathLike[str], *, core: int = 0) -> Release:
    """Read a release of MovieLens; ratings stay as they are, genres are the categories."""
    place = Path(folder)
    for suffix in (".dat", ".csv"):
        ratings, movies = place / f"ratings{suffix}", place / f"movies{suffix}"
        if ratings.is_file() and movies.is_file():
            described = {key: (title, "", genres) for key, title, genres in _rows(movies, 3)}
            rows = (
                interaction(user, movie, time, rating, where=f"'{ratings}'")
                for user, movie, rating, time in _rows(ratings, 4)
            )
            return make_release(rows, described, core=core, label=f"'{folder}'")
    raise UsageError(
        f"'{folder}' holds neither ratings.dat and movies.dat nor ratings.csv and movies.csv; give "
        "the folder of an unpacked MovieLens release"
    )


def _rows(path: Path, width: int) -> Iterator[list[str]]:
    """Yield the fields of each line, ``width`` of them."""
    for fields in _split_lines(path):
        if len(fields) != width:
            raise InputError(
                f"'{path}' holds a line of {len(fields)} fields ({fields[0][:40]}...), not {width}"
            )
        yield fields


def _split_lines(path: Path) -> Iterator[list[str]]:
    """Split lines that are not empty; CSV has a header, ``::`` has none and is Latin-1."""
    if path.suffix == ".dat":
        lines = text_lines(path, encoding="latin-1")
        yield from (line.rstrip("\n").split("::") for line in lines if line.strip())
        return
    reader = csv.reader(text_lines(path))
    try:
        next(reader, None)
        yield from filter(None, reader)
    except csv.Error as error:
        raise InputError(
            f"'{path}' is not CSV after line {reader.line_num} ({error}); download it again"
        ) from None
