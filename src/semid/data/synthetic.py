"""A synthetic catalogue of any size: for the demo, for tests, and before one's own data is there.

Items belong to niches within aisles within departments; their embeddings are sums of what they
share with each level, on top of a common direction (the anisotropy of text embeddings) and noise
with a decaying spectrum. Popularity has a long tail, and users walk from niche to niche.

Everything is a function of the seed and of fixed units of 4,096 items or users, so that
nothing depends on how much is made at once, and a larger catalogue begins with a smaller one.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from semid.data.blocks import RawBlock, gather
from semid.data.ids import ItemIds
from semid.data.interactions import Interactions, read_interactions
from semid.data.source import EmbeddingSource, write_npy
from semid.errors import check_choice
from semid.options import Options, option
from semid.output import atomic_file, check_output

_REACH = (0.55, 0.25, 0.12, 0.08)  # chances of an item of the same niche, aisle, department, any
_LONGEST = 60  # interactions of a user
_DAY = 86_400
_FIRST_DAY = 1_420_070_400  # 2015-01-01
_UNIT = 4_096
_GROUP = 16  # units of a Parquet row group
_TABLES, _ATTRIBUTES, _NOISE, _USERS = range(4)  # streams of randomness
_NICHES_OF_AISLE = 4


class Department(NamedTuple):
    """A part of the shop with its own vocabulary: aisles with their niches, parts of titles."""

    name: str
    aisles: dict[str, list[str]]
    styles: list[str]
    finishes: list[str]
    brands: list[str]


def plural(noun: str) -> str:
    """Return the plural of a noun of these lists."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


_FILE = tomllib.loads(Path(__file__).with_name("synthetic_words.toml").read_text("utf8"))
DEPARTMENTS = tuple(Department(**words) for words in _FILE["departments"])
# Every niche with its department and aisle, neighbors side by side.
PATHS = [(d, a, n) for d in DEPARTMENTS for a, niches in d.aisles.items() for n in niches]
# Word lists in the order in which attributes count them; most variants are empty.
_WORDS = {
    "style": pa.array([s for d in DEPARTMENTS for s in d.styles]),
    "finish": pa.array([f for d in DEPARTMENTS for f in d.finishes]),
    "brand": pa.array([b for d in DEPARTMENTS for b in d.brands]),
    "noun": pa.array([noun for _, _, noun in PATHS]),
    "categories": pa.array([f"{d.name} > {a} > {plural(n).capitalize()}" for d, a, n in PATHS]),
    "variant": pa.array([v and f", {v}" for v in _FILE["variants"]]),
}
_NICHES, _STYLES, _FINISHES, _BRANDS = (
    len(_WORDS[name]) // len(DEPARTMENTS) for name in ("noun", "style", "finish", "brand")
)


class Attributes(NamedTuple):
    """What items are like: one number per item, (n,) each; words as places in their lists."""

    niche: np.ndarray
    style: np.ndarray
    finish: np.ndarray
    variant: np.ndarray
    brand: np.ndarray
    popularity: np.ndarray
    quality: np.ndarray


def _item_table(units: list[Attributes], start: int, stop: int) -> pa.Table:
    """Describe the items of some units, which are numbered from ``start``, up to ``stop``."""
    a = Attributes(*(np.concatenate(column)[: stop - start] for column in zip(*units, strict=True)))
    department = a.niche // _NICHES

    def words(name: str, places: np.ndarray) -> pa.Array:
        return _WORDS[name].take(pa.array(places))

    def join(*parts: pa.Array | str) -> pa.Array:
        return pc.binary_join_element_wise(*parts, "")

    title = join(
        words("style", department * _STYLES + a.style),
        " ",
        words("noun", a.niche),
        ", ",
        words("finish", department * _FINISHES + a.finish),
        words("variant", a.variant),
    )
    brand = words("brand", department * _BRANDS + a.brand)
    categories = words("categories", a.niche)
    return pa.table(
        {
            "item_id": _names("P", np.arange(start, start + len(department))),
            "title": title,
            "brand": brand,
            "categories": categories,
            "text": join("Title: ", title, "; Brand: ", brand, "; Categories: ", categories),
            "popularity": pa.array(a.popularity.astype(np.float32)),
        }
    )


def _names(letter: str, numbers: np.ndarray) -> pa.Array:
    """Return the ids of things by their numbers (n,), such as ``P0000012``."""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 7, "0")
    return pc.binary_join_element_wise(letter, digits, "")


class Steps(NamedTuple):
    """Interactions of a block of users, by user, oldest first: (n,) each; no item twice."""

    user: np.ndarray
    item: np.ndarray
    position: np.ndarray
    timestamp: np.ndarray
    rating: np.ndarray


def walk(
    niche: np.ndarray, weight: np.ndarray, quality: np.ndarray
) -> Callable[[np.random.Generator], Steps]:
    """Return a function that draws a block of 4,096 users from a generator."""
    # Niches that each reach spans; those of an aisle and of a department lie side by side.
    span = np.array((1, _NICHES_OF_AISLE, _NICHES, len(PATHS)))
    # Items sorted by niche make each reach one range of their cumulative popularity: a step of the
    # walk is a binary search in it.
    order = np.argsort(niche, kind="stable")
    cumulative = np.concatenate([[0.0], np.cumsum(weight[order], dtype=np.float64)])
    sorted_niche = niche[order].astype(np.int64)
    bounds = np.searchsorted(sorted_niche, np.arange(span[-1] + 1))
    chances = np.cumsum(_REACH)[:-1]

    def draw(rng: np.random.Generator, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        start, stop = cumulative[bounds[low]], cumulative[bounds[high]]
        at = np.searchsorted(cumulative, start + rng.random(len(low)) * (stop - start), "right")
        # Rounding may touch the end of the range, which belongs to the next one.
        return np.asarray(np.clip(at - 1, bounds[low], bounds[high] - 1))

    def block(rng: np.random.Generator) -> Steps:
        lengths = np.minimum(6 + rng.exponential(6.0, _UNIT).astype(np.int64), _LONGEST)
        taste = rng.normal(3.6, 0.4, _UNIT)
        longest = int(lengths.max())
        places, reach = np.zeros((2, _UNIT, longest), dtype=np.int64)
        everywhere = np.zeros(_UNIT, dtype=np.int64)
        places[:, 0] = draw(rng, everywhere, everywhere + span[-1])
        # One step of all users at a time, of those whose walk has not ended.
        for step in range(1, longest):
            still = np.flatnonzero(lengths > step)
            kind = np.searchsorted(chances, rng.random(len(still)), side="right")
            low = sorted_niche[places[still, step - 1]] // span[kind] * span[kind]
            places[still, step] = draw(rng, low, np.minimum(low + span[kind], span[-1]))
            reach[still, step] = kind
        # Eight days on average between two interactions, from a start in the first three years.
        gaps = rng.exponential(8.0 * _DAY, (_UNIT, longest)).astype(np.int64) + 1
        gaps[:, 0] = rng.integers(0, 3 * 365 * _DAY, _UNIT)
        inside = np.arange(longest) < lengths[:, None]
        times = (_FIRST_DAY + np.cumsum(gaps, axis=1))[inside]
        user = np.repeat(np.arange(_UNIT), lengths)
        item = order[places[inside]]
        # Good items rate higher, and so do those close to home.
        mood = rng.normal(0.0, 0.7, len(item))
        ratings = taste[user] + 0.5 - 0.3 * reach[inside] + quality[item] + mood
        ratings = np.clip(np.rint(ratings), 1, 5)
        # Keep a user's first interaction with every item, and number what remains.
        key = user * (int(item.max()) + 1) + item
        rows = np.sort(np.unique(key, return_index=True)[1])
        user = user[rows]
        position = np.arange(len(user)) - np.searchsorted(user, user)
        return Steps(user, item[rows], position, times[rows], ratings[rows])

    return block


class SyntheticFiles(NamedTuple):
    """What `SyntheticCatalogue.write` has written."""

    items: Path
    embeddings: Path
    interactions: Path


@dataclass(frozen=True, kw_only=True)
class SyntheticCatalogue(Options):
    """A catalogue with a known structure."""

    items: int = option(20_000, ge=1, help="Number of items.")
    dim: int = option(64, ge=2, help="Width of the embeddings.")
    users: int | None = option(None, ge=1, help="Number of users; one per two items by default.")
    seed: int = option(0, ge=0, help="Everything follows from it.")

    @property
    def user_count(self) -> int:
        """Number of users."""
        return max(1, self.items // 2) if self.users is None else self.users

    @cached_property
    def ids(self) -> ItemIds:
        """The item ids, ``P0000000`` onwards."""
        return ItemIds._trusted(_names("P", np.arange(self.items)), self.items)

    def embeddings(self) -> EmbeddingSource:
        """Return the embeddings as a source that makes its rows when they are read."""
        return _SyntheticSource(self)

    def matrix(self) -> np.ndarray:
        """Return the embeddings in memory: (items, dim) float32, rows of unit length."""
        return np.concatenate([raw.values for raw in self._units()])

    def niches(self) -> np.ndarray:
        """Return each item's niche (items,) int64; 4 niches make an aisle, 16 a department."""
        units = range(self._unit_count)
        return np.concatenate([self._attributes(u).niche for u in units])[: self.items]

    def items_table(self) -> pa.Table:
        """Return all items in memory: id, title, brand, categories, text, popularity."""
        return pa.concat_tables(self._item_groups(None))

    def interactions_table(self) -> pa.Table:
        """Return all interactions in memory, users in order, each user's oldest first."""
        return pa.concat_tables(self._interaction_units())

    def interactions(self) -> Interactions:
        """Return the interactions as the rest of semid reads them."""
        return read_interactions(self.interactions_table())

    def write(
        self,
        folder: str | Path,
        *,
        embeddings: str = "npy",
        dtype: str = "float32",
        overwrite: bool = False,
    ) -> SyntheticFiles:
        """Write ``items.parquet``, the embeddings and ``interactions.parquet``, block by block.

        Memory: about 40 bytes per item for the users' walk, and a few blocks.

        Args:
            folder: target folder.
            embeddings: ``npy`` for ``embeddings.npy`` beside the items, ``parquet`` for a column
                ``embedding`` of ``items.parquet``.
            dtype: ``float32`` or ``float16``.
            overwrite: replace files that exist; else that is an OutputExistsError.
        """
        check_choice("embeddings", embeddings, ("npy", "parquet"))
        check_choice("dtype", dtype, ("float16", "float32"))
        target = Path(folder)
        paths = SyntheticFiles(
            target / "items.parquet",
            target / ("embeddings.npy" if embeddings == "npy" else "items.parquet"),
            target / "interactions.parquet",
        )
        for path in paths:
            check_output(path, overwrite=overwrite)
        if embeddings == "npy":
            blocks = (raw.values for raw in self._units())
            kind = {"float16": "<f2", "float32": "<f4"}[dtype]
            with atomic_file(paths.embeddings, overwrite=overwrite) as work:
                write_npy(work, blocks, shape=(self.items, self.dim), dtype=kind)
        groups = self._item_groups(None if embeddings == "npy" else dtype)
        _write_parquet(paths.items, groups, overwrite=overwrite)
        _write_parquet(paths.interactions, self._interaction_units(), overwrite=overwrite)
        return paths

    @property
    def _unit_count(self) -> int:
        return -(-self.items // _UNIT)

    def _generator(self, stream: int, unit: int = 0) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(stream, unit)))

    @cached_property
    def _tables(self) -> dict[str, np.ndarray]:
        """Vectors that items share, each about as long as its level weighs."""
        rng = self._generator(_TABLES)
        # Embeddings of texts have few strong directions; the lengths fall like 1/sqrt(rank).
        spectrum = (1.0 + np.arange(self.dim)) ** -0.5
        spectrum /= np.sqrt((spectrum**2).sum())
        # A random rotation, lest the large directions be the first coordinates.
        rotation = np.linalg.qr(rng.standard_normal((self.dim, self.dim)))[0]
        basis = (spectrum[:, None] * rotation).astype(np.float32)

        def vectors(count: int, weight: float) -> np.ndarray:
            return np.asarray(
                weight * (rng.standard_normal((count, self.dim)).astype(np.float32) @ basis)
            )

        departments = len(DEPARTMENTS)
        # A niche is near its aisle, which is near its department, and all share one direction.
        niche = vectors(len(PATHS), 0.55)
        niche += np.repeat(vectors(len(PATHS) // _NICHES_OF_AISLE, 0.7), _NICHES_OF_AISLE, axis=0)
        niche += np.repeat(vectors(departments, 0.9), _NICHES, axis=0)
        niche += vectors(1, 1.0)
        # Few niches hold most items: Zipf over a random ranking.
        ranks = rng.permutation(len(PATHS)) + 1.0
        share = ranks**-0.8
        return {
            "basis": 0.45 * basis,
            "niche": niche,
            "style": vectors(departments * _STYLES, 0.35),
            "finish": vectors(departments * _FINISHES, 0.2),
            "cumulative": np.cumsum(share / share.sum()),
        }

    def _attributes(self, unit: int) -> Attributes:
        rng = self._generator(_ATTRIBUTES, unit)
        niche = np.searchsorted(self._tables["cumulative"][:-1], rng.random(_UNIT), side="right")
        return Attributes(
            niche,
            rng.integers(0, _STYLES, _UNIT),
            rng.integers(0, _FINISHES, _UNIT),
            np.maximum(rng.integers(-9, len(_WORDS["variant"]), _UNIT), 0),
            # The first makers sell most.
            np.minimum(rng.geometric(0.35, _UNIT) - 1, _BRANDS - 1),
            # A Pareto tail: the top 1 % of items draw about a quarter of the interest.
            (1.0 - rng.random(_UNIT)) ** (-1 / 1.3),
            rng.normal(0.0, 0.5, _UNIT),
        )

    def _unit(self, unit: int) -> np.ndarray:
        """Make the embeddings of one unit: (4096 or what is left, dim) float32."""
        a, tables = self._attributes(unit), self._tables
        department = a.niche // _NICHES
        drawn = self._generator(_NOISE, unit).standard_normal((_UNIT, self.dim), dtype=np.float32)
        x = drawn @ tables["basis"]
        x += tables["niche"][a.niche]
        x += tables["style"][department * _STYLES + a.style]
        x += tables["finish"][department * _FINISHES + a.finish]
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return np.asarray(x[: self.items - unit * _UNIT])

    def _units(self, first: int = 0) -> Iterator[RawBlock]:
        for unit in range(first // _UNIT, self._unit_count):
            yield RawBlock(self._unit(unit)[max(0, first - unit * _UNIT) :])

    def _item_groups(self, dtype: str | None) -> Iterator[pa.Table]:
        """Yield the items a row group at a time, with their embeddings where asked for."""
        for first in range(0, self._unit_count, _GROUP):
            units = range(first, min(first + _GROUP, self._unit_count))
            group = _item_table(
                [self._attributes(unit) for unit in units], first * _UNIT, self.items
            )
            if dtype is not None:
                flat = np.concatenate([self._unit(unit) for unit in units]).astype(dtype)
                column = pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), self.dim)
                group = group.append_column("embedding", column)
            yield group

    def _interaction_units(self) -> Iterator[pa.Table]:
        niche = np.empty(self.items, dtype=np.int16)
        weight, quality = np.empty((2, self.items), dtype=np.float32)
        for unit in range(self._unit_count):
            a, rows = self._attributes(unit), slice(unit * _UNIT, (unit + 1) * _UNIT)
            for column, values in (niche, a.niche), (weight, a.popularity), (quality, a.quality):
                column[rows] = values[: len(column[rows])]
        steps = walk(niche, weight, quality)
        for unit in range(-(-self.user_count // _UNIT)):
            first = unit * _UNIT
            count = min(_UNIT, self.user_count - first)
            block = steps(self._generator(_USERS, unit))
            # All 4,096 users are drawn, so that the number of users changes none of them.
            rows = slice(0, int(np.searchsorted(block.user, count)))
            yield pa.table(
                {
                    "user_id": _names("U", first + block.user[rows]),
                    "item_id": _names("P", block.item[rows]),
                    "timestamp": pa.array(block.timestamp[rows]),
                    "position": pa.array(block.position[rows].astype(np.int16)),
                    "rating": pa.array(block.rating[rows].astype(np.float32)),
                }
            )


class _SyntheticSource(EmbeddingSource):
    """The embeddings of a synthetic catalogue, made as they are read."""

    cheap_rows = False

    def __init__(self, catalogue: SyntheticCatalogue) -> None:
        self._catalogue = catalogue
        self.ids = catalogue.ids
        self.dim = catalogue.dim
        self.label = "the synthetic catalogue"

    def describe(self) -> dict[str, Any]:
        """Return kind, seed, items and dim."""
        seed = self._catalogue.seed
        return {"kind": "synthetic", "seed": seed, "items": len(self), "dim": self.dim}

    def _pieces(self, size: int, first: int) -> Iterator[RawBlock]:
        return self._catalogue._units(first)

    def _raw_rows(self, indices: np.ndarray) -> RawBlock:
        unit = indices // _UNIT
        parts = (
            (mask, RawBlock(self._catalogue._unit(number)[indices[mask] - number * _UNIT]))
            for number in np.unique(unit).tolist()
            for mask in [unit == number]
        )
        return gather(len(indices), self.dim, parts)


def _write_parquet(path: Path, tables: Iterator[pa.Table], *, overwrite: bool) -> None:
    """Write tables as one file, a row group per table, complete or not at all."""
    first = next(tables)
    with (
        atomic_file(path, overwrite=overwrite) as work,
        pq.ParquetWriter(work, first.schema) as writer,
    ):
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
