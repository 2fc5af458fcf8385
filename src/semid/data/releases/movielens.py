"""MovieLens: the ``::`` files of ml-1m and ml-10m, and the CSV files of ml-latest and ml-25m on."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from semid.data.releases.release import Release, interaction, make_release, text_lines
from semid.errors import InputError, UsageError

__all__ = ["read_movielens"]


def read_movielens(folder: str | os.PathLike[str], *, core: int = 0) -> Release:
    """Read a release of MovieLens.

    Args:
        folder: as unpacked, with ``ratings.dat`` and ``movies.dat`` (ml-1m, ml-10m) or
            ``ratings.csv`` and ``movies.csv`` (ml-latest, ml-20m, ml-25m, ml-32m).
        core: users and movies with fewer ratings are left out; 0 keeps all.

    Returns:
        Ratings as they are (1 to 5 or 0.5 to 5); genres are the categories.

    Raises:
        UsageError: neither layout is there.
        InputError: a line of another layout.
        InteractionsError: nothing is left.
    """
    place = Path(folder)
    for suffix in (".dat", ".csv"):
        ratings, movies = place / f"ratings{suffix}", place / f"movies{suffix}"
        if ratings.is_file() and movies.is_file():
            described = {key: (title, "", genres) for key, title, genres in _rows(movies, 3)}
            return make_release(_ratings(ratings), described, core=core, label=f"'{folder}'")
    raise UsageError(
        f"'{folder}' holds neither ratings.dat and movies.dat nor ratings.csv and movies.csv; give "
        "the folder of an unpacked MovieLens release"
    )


def _ratings(path: Path) -> Iterator[tuple[str, str, int, float]]:
    for user, movie, rating, time in _rows(path, 4):
        yield interaction(user, movie, time, rating, where=f"'{path}'")


def _rows(path: Path, width: int) -> Iterator[list[str]]:
    """Yield the fields of each line; CSV has a head, ``::`` has none and is Latin-1."""
    if path.suffix == ".csv":
        reader = csv.reader(text_lines(path))
        try:
            next(reader, None)
            for fields in reader:
                if fields:
                    yield _checked(fields, width, path)
        except csv.Error as error:
            raise InputError(
                f"'{path}' is not CSV after line {reader.line_num} ({error}); download it again"
            ) from None
        return
    for line in text_lines(path, encoding="latin-1"):
        if line.strip():
            yield _checked(line.rstrip("\n").split("::"), width, path)


def _checked(fields: list[str], width: int, path: Path) -> list[str]:
    if len(fields) != width:
        raise InputError(
            f"'{path}' holds a line of {len(fields)} fields ({fields[0][:40]}...), not {width}"
        )
    return fields
