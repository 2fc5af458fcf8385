"""Item ids: strings inside, their original Arrow type outside, never a duplicate.

Their 64-bit hash decides who is held out, today and in five years. It depends on the characters and
the salt alone: not on where an id stands, the process, the machine or a library's version, so new
items never move an item from training to validation. To repeat it elsewhere: FNV-1a with 64 bits
(offset basis ``0xcbf29ce484222325``, prime ``0x100000001b3``) over the bytes
``utf8(salt) + 0xFF + utf8(id)``, then MurmurHash3's 64-bit finalizer, which spreads the last
characters over all bits (FNV alone leaves the high bits of short, similar ids alike, and a
threshold reads those). ``0xFF`` occurs in no UTF-8 text, so no salt and id pose as another pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from semid.data.columns import (
    ARROW_CONVERSION_ERRORS,
    conversion_problem,
    id_type_problem,
    is_text,
    normalize_ids,
    numbers_to_arrow,
    whole_text,
)
from semid.errors import IdsError, UsageError

_BASIS = 0xCBF29CE484222325
_PRIME = 0x100000001B3
_MASK = 0xFFFFFFFFFFFFFFFF
_BLOCK = 65_536


def hash_strings(strings: Any, *, salt: str = "") -> np.ndarray:
    """Hash each string of an Arrow array (items,) without nulls: (items,) uint64, uniform."""
    state = _BASIS
    for byte in salt.encode() + b"\xff":
        state = ((state ^ byte) * _PRIME) & _MASK
    chunks = strings.chunks if isinstance(strings, pa.ChunkedArray) else [strings]
    blocks = [
        _hash_block(chunk.slice(start, _BLOCK), np.uint64(state))
        for chunk in chunks
        for start in range(0, len(chunk), _BLOCK)
    ]
    return np.concatenate([np.empty(0, np.uint64), *blocks])


def mix_hashes(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return a hash (rows,) uint64 of two hashes (rows,); which is the first matters."""
    # Multipliers and shifts of splitmix64's finalizer: all 64 bits depend on both.
    mixed = (first ^ (first >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) ^ second
    hashes: np.ndarray = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return hashes


def share_mask(hashes: np.ndarray, start: float, stop: float) -> np.ndarray:
    """Return which hashes (items,) fall in a share of their range, ``0 <= start <= stop <= 1``."""
    if not 0.0 <= start <= stop <= 1.0:
        raise UsageError(f"a share from {start} to {stop} is not within 0 and 1")
    # The lower end belongs to the share and the upper does not, except that 1 takes all above.
    # The share as integers: a comparison in floating point would blur its ends.
    low, high = round(start * 2**64), round(stop * 2**64)
    # 2**64 itself does not fit in 64 bits, and is above every hash.
    above = hashes >= np.uint64(low) if low <= _MASK else np.zeros(len(hashes), dtype=bool)
    return above & (hashes < np.uint64(high)) if high <= _MASK else above


def _hash_block(strings: Any, state: np.uint64) -> np.ndarray:
    """FNV-1a over a block, one character position of all its strings at a time."""
    strings = strings.cast(pa.large_string())
    offsets = np.frombuffer(strings.buffers()[1], dtype=np.int64)
    starts = offsets[strings.offset : strings.offset + len(strings)]
    lengths = offsets[strings.offset + 1 : strings.offset + len(strings) + 1] - starts
    data_buffer = strings.buffers()[2]
    data = np.frombuffer(data_buffer, dtype=np.uint8) if data_buffer else np.empty(0, np.uint8)
    hashes = np.full(len(strings), state, dtype=np.uint64)
    prime = np.uint64(_PRIME)
    # All strings have the first positions, so these need no selection.
    shortest = int(lengths.min()) if len(lengths) else 0
    for position in range(shortest):
        hashes = (hashes ^ data[starts + position]) * prime
    # Beyond that, only the strings that are longer than the position go on.
    longer = np.flatnonzero(lengths > shortest)
    position = shortest
    while len(longer):
        hashes[longer] = (hashes[longer] ^ data[starts[longer] + position]) * prime
        position += 1
        longer = longer[lengths[longer] > position]
    # MurmurHash3's 64-bit finalizer spreads the last characters over all bits.
    shift = np.uint64(33)
    hashes ^= hashes >> shift
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> shift
    hashes *= np.uint64(0xC4CEB9FE1A85EC53)
    hashes ^= hashes >> shift
    return hashes


class ItemIds:
    """The ids of the items of a catalogue, in row order; none is null or occurs twice.

    An id is a string everywhere inside semid (``7`` and ``"7"`` are one id) and is written back in
    the Arrow type it came in. Row numbers (`range`) take no memory.
    """

    def __init__(self, values: Any, *, source: str = "item ids", allow_empty: bool = True) -> None:
        # ``source`` is what the ids are called in errors; a category may be an empty string.
        self._values = _to_arrow(values, source)
        if not allow_empty:
            _refuse_empty(self._values, source)
        self._count = len(self._values)
        self._lookup: tuple[np.ndarray, np.ndarray] | None = None
        self._refuse_duplicates(source)

    @classmethod
    def range(cls, n: int) -> ItemIds:
        """Number ``n`` rows from 0, without storing the numbers."""
        if n < 0:
            raise UsageError(f"a catalogue cannot have {n} items")
        return cls._trusted(None, n)

    @classmethod
    def _trusted(cls, values: Any, count: int) -> ItemIds:
        ids = cls.__new__(cls)
        ids._values, ids._count, ids._lookup = values, count, None
        return ids

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        """Return the id of one row (negative numbers count from the end)."""
        row = index + self._count if index < 0 else index
        if not 0 <= row < self._count:
            raise IndexError(f"row {index} is outside the {self._count} items")
        return str(row) if self._values is None else str(self._values[int(row)].as_py())

    def __eq__(self, other: object) -> bool:
        """Compare as strings, so ``7`` equals ``"7"``."""
        if not isinstance(other, ItemIds):
            return NotImplemented
        return len(self) == len(other) and (
            (self.is_range and other.is_range)
            or all(
                self.strings(a, a + _BLOCK).equals(other.strings(a, a + _BLOCK))
                for a in range(0, len(self), _BLOCK)
            )
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        kind = "row numbers" if self.is_range else str(self._values.type)
        return f"ItemIds({self._count} {kind})"

    @property
    def example(self) -> str:
        """The first id in quotes, for messages that show what ids look like."""
        return f"'{self[0]}'" if len(self) else "none, since there are no ids"

    @property
    def is_range(self) -> bool:
        """Whether the ids are plain row numbers."""
        return self._values is None

    def to_arrow(self) -> pa.Array:
        """Return the ids (items,) in the Arrow type they came in; row numbers as int64."""
        return numbers_to_arrow(np.arange(self._count)) if self._values is None else self._values

    def strings(self, start: int = 0, stop: int | None = None) -> pa.Array:
        """Return the ids of rows ``start`` to ``stop`` (exclusive) as Arrow large_string."""
        begin, end, _ = slice(start, stop).indices(self._count)
        end = max(begin, end)
        if self._values is None:
            return numbers_to_arrow(np.arange(begin, end)).cast(pa.large_string())
        return _to_strings(self._values.slice(begin, end - begin))

    def take(self, rows: np.ndarray) -> ItemIds:
        """Return the ids of ``rows`` (n,), which must not repeat."""
        numbers = numbers_to_arrow(np.asarray(rows, dtype=np.int64))
        values = numbers if self._values is None else self._values.take(numbers)
        return self._trusted(values, len(rows))

    def index_of(self, ids: Any) -> np.ndarray:
        """Return the row of each of the ids (n,), -1 for unknown ones: (n,) int64."""
        # The first call sorts the catalogue's hashes (16 bytes per item); after that a lookup costs
        # a binary search per id.
        queries = _to_strings(_to_arrow(ids, "ids looked up", allow_null=True))
        if isinstance(queries, pa.ChunkedArray):
            queries = queries.combine_chunks()
        result = np.full(len(queries), -1, dtype=np.int64)
        if self._count == 0 or len(queries) == 0:
            return result
        hashes, order = self._sorted_hashes()
        query_hashes = hash_strings(queries.fill_null(""))
        # Binary search gives the first row of equal hash. Two ids can share a hash, so the strings
        # decide; queries without an answer go on to the next row while its hash is equal too.
        place = np.searchsorted(hashes, query_hashes)
        pending = np.flatnonzero(place < self._count)
        pending = pending[hashes[place[pending]] == query_hashes[pending]]
        while len(pending):
            rows = order[place[pending]]
            values = numbers_to_arrow(rows)
            values = values if self._values is None else self._values.take(values)
            same = pc.equal(_to_strings(values), queries.take(numbers_to_arrow(pending)))
            hit = same.fill_null(False).to_numpy(zero_copy_only=False)
            result[pending[hit]] = rows[hit]
            pending = pending[~hit]
            place[pending] += 1
            pending = pending[place[pending] < self._count]
            pending = pending[hashes[place[pending]] == query_hashes[pending]]
        return result

    def whitespace_hint(self, ids: Any) -> str:
        """Say how many unknown ids (n,) are known without the spaces around them, or nothing."""
        unknown = _to_strings(_to_arrow(ids, "ids looked up", allow_null=True))
        # Spaces on one side are the most frequent reason for ids that do not match.
        trimmed = pc.utf8_trim_whitespace(unknown)
        rows = int((self.index_of(trimmed) >= 0).sum())
        if not rows and len(self):
            # Or the spaces are in the catalogue; its first ids tell.
            first = pc.utf8_trim_whitespace(self.strings(0, _BLOCK))
            rows = pc.sum(pc.is_in(trimmed, value_set=first)).as_py() or 0
        if not rows:
            return ""
        return f"; {rows} would match without spaces around the ids: strip them in both files"

    def hash64(self, salt: str = "") -> np.ndarray:
        """Hash the id strings: (items,) uint64, the same for an id wherever it stands."""
        # Row numbers are written as text for one block at a time.
        starts = range(0, self._count, _BLOCK)
        blocks = [hash_strings(self.strings(a, a + _BLOCK), salt=salt) for a in starts]
        return np.concatenate([np.empty(0, np.uint64), *blocks])

    def _sorted_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        if self._lookup is None:
            hashes = self.hash64()
            order = np.argsort(hashes, kind="stable")
            self._lookup = hashes[order], order
        return self._lookup

    def _refuse_duplicates(self, source: str) -> None:
        if pa.types.is_integer(self._values.type):
            numbers = self._values.to_numpy(zero_copy_only=False)
            if (numbers[1:] > numbers[:-1]).all():
                return  # they rise strictly
        # Equal ids have equal hashes: only rows whose hash has a neighbor of the same are compared.
        hashes, order = self._sorted_hashes()
        equal = np.r_[False, hashes[1:] == hashes[:-1], False]
        rows = np.sort(order[(equal[1:] | equal[:-1])[: len(order)]])
        counts = pc.value_counts(_to_strings(self._values.take(numbers_to_arrow(rows))))
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated) == 0:
            return
        extra = pc.sum(repeated.field("counts")).as_py() - len(repeated)
        listed = ", ".join(
            f"'{r['values']}' ({r['counts']} times)" for r in repeated[:5].to_pylist()
        )
        more = ", ..." if len(repeated) > 5 else ""
        raise IdsError(
            f"{source}: {_count(len(repeated), 'id')} more than once ({extra} rows too many): "
            f"{listed}{more}; every item needs an id of its own: drop the repeats or choose "
            "another id column"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def held_out_mask(ids: ItemIds, fraction: float, *, salt: str = "validation") -> np.ndarray:
    """Return the mask (items,) of items held out of a fit, chosen by a hash of their id alone."""
    if not 0.0 <= fraction <= 1.0:
        raise UsageError(f"the held-out fraction is {fraction}; it must lie between 0 and 1")
    if fraction == 0.0:
        return np.zeros(len(ids), dtype=bool)
    return share_mask(ids.hash64(salt), 0.0, fraction)


def cast_ids(values: Any, kind: pa.DataType, *, source: str) -> pa.Array:
    """Return ids in another type, if every id stays what it is."""
    plain = _to_arrow(values, source)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if plain.type == kind:
        return plain
    # A cast there and back shows whether "007" or 2**60 stays what it is.
    text = _to_strings(plain)
    try:
        cast = text.cast(kind)
        different = pc.fill_null(pc.not_equal(_to_strings(cast), text), False)
        problem = f"'{text.filter(different)[0]}' would change" if pc.any(different).as_py() else ""
    except pa.ArrowInvalid as error:
        problem = str(error)
    if problem:
        raise IdsError(
            f"{source} are {plain.type}, the catalogue's {kind}, and cannot be written as such "
            f"({problem}); give both the same type"
        )
    return cast


def _to_strings(values: Any) -> Any:
    if pa.types.is_large_string(values.type):
        return values
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return values.cast(pa.large_string())


def _to_arrow(values: Any, source: str, *, allow_null: bool = False) -> Any:
    """Turn ids of any container into one Arrow array of strings or integers."""
    array = values
    if isinstance(values, ItemIds):
        return values.to_arrow()
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
            raise UsageError(
                f"{source} are a {type(values).__name__}; give an array or a list of strings or "
                "integers"
            )
        if isinstance(values, np.ndarray) and values.ndim != 1:
            raise IdsError(f"{source} have shape {values.shape}; ids are one value per item")
        try:
            kind = pa.large_string() if len(values) == 0 else None
            array = pa.array(whole_text(values), type=kind)
        except ARROW_CONVERSION_ERRORS as error:
            raise IdsError(
                f"{source}: the sequence {conversion_problem(error, '[str(x) for x in ids]')}"
            ) from error
    if isinstance(array, pa.ChunkedArray):
        # `string` counts bytes in 32 bits, which a joined array of ids can outgrow.
        if pa.types.is_string(array.type) and array.nbytes > 2**31 - 1:
            array = array.cast(pa.large_string())
        array = array.unify_dictionaries().combine_chunks()
        if isinstance(array, pa.ChunkedArray):
            array = array.chunk(0) if array.num_chunks else pa.array([], type=array.type)
    if pa.types.is_null(array.type):
        array = array.cast(pa.large_string())
    if problem := id_type_problem(array.type):
        raise IdsError(f"{source} are of type {problem}")
    array = normalize_ids(array)
    if array.null_count and not allow_null:
        first = int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise IdsError(
            f"{source}: {_count(array.null_count, 'null')} (first: row {first}); give every item "
            "an id or drop the rows"
        )
    if is_text(array.type):
        try:
            array.validate(full=True)  # Some writers store other encodings as text.
        except pa.ArrowInvalid as error:
            raise IdsError(
                f"{source} hold text that is not UTF-8 ({error}); re-encode it"
            ) from error
    return array


def _refuse_empty(array: Any, source: str) -> None:
    if not is_text(array.type):
        return
    coded = pa.types.is_dictionary(array.type)
    empty = pc.equal(pc.binary_length(array.dictionary if coded else array), 0)
    if pc.any(empty).as_py():
        empty = empty.take(array.indices) if coded else empty
        rows = np.flatnonzero(empty.to_numpy(zero_copy_only=False))
        if len(rows):
            raise IdsError(
                f"{source}: {_count(len(rows), 'empty string')} (first: row {rows[0]}); give every "
                "item an id or drop the rows"
            )
