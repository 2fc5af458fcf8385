"""Values that programs stumble over, and mutations of bytes, JSON and folders."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

TEXTS = (
    "", " ", "a", "0", "-1", "007", "1e30", "nan", "NaN", "null", "None", "NA", "true", "é", "日本",
    "\x00", "a\x00b", "\t", "a\nb", "a\r\nb", "\x1b[31m", "\u202e", "\ufeff", "💥", "|", "a|b",
    "**b**",
    "`c`", "[x](http://y)", "<script>alert(1)</script>", "</script>", "&amp;", '"', "'", ",", "a,b",
    "\\", "../x", "%s{}", "=1+1", "x" * 3000,
)  # fmt: skip
SURROGATE = "\ud800"
NUMBERS: tuple[Any, ...] = (
    0, 1, 2, 3, -1, 7, 255, 65_537, 10**9, 2**31, 2**32, 2**63, 2**64, 10**30, -(2**63), 0.5, -0.5,
    1.0, 1e-30, 1e30, 1e308, math.inf, -math.inf, math.nan,
)  # fmt: skip
OBJECTS: tuple[Any, ...] = (
    None, True, False, "", "2", "nan", "auto", [], {}, [1, 2], [2, -1], ["a"], {"a": 1}, (), (8, 8),
    b"x", [[1]], np.float32(2.0), np.int64(2), np.array([1, 2]),
)  # fmt: skip
SLOW = {"epochs", "levels", "n_codebooks", "max_iter", "n_init", "n_local_trials", "rounds",
        "annealing_rounds", "seeds", "scales", "rotation_iter", "max_em_iter", "stages", "groups",
        "pretrain_epochs", "hidden"}  # fmt: skip
"""Options and arguments whose large values only take long, which is no fault."""

JSON_BODIES: tuple[bytes, ...] = (
    b"", b"{", b"null", b"[]", b"{}", b"0", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"1" * 6000,
    b"NaN", b'{"0": NaN}', b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"\x80", b'{"0":1,"0":2}',
    b'"\\ud800"',
)  # fmt: skip


def value(random: Random) -> Any:
    """Return a number, text or object of any type."""
    return random.choice(random.choice((NUMBERS, TEXTS, OBJECTS)))


def json_value(random: Random) -> Any:
    """Return a value that JSON can carry."""
    pool = [x for x in (*NUMBERS, *TEXTS, *OBJECTS) if isinstance(x, int | float | str | list)]
    return random.choice([*pool, None, {}, {"a": 1}, [1, 2, 3], SURROGATE])


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """Return ``data`` with one to three faults of transport."""
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(data) + 1)
        size = random.choice((1, 1, 4, 8, 64, 1000))
        kind = random.randrange(7)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + random.randbytes(size) + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + size :]
        elif kind == 4:
            data = data[:at] + random.choice((b"\xff", b"\x00")) * size + data[at + size :]
        elif kind == 5:
            data = data[:at] + data[at : at + size] + data[at:]
        else:
            data += random.randbytes(size)
    return data


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    places = [path] if path else []
    if isinstance(document, dict):
        items: Any = document.items()
    elif isinstance(document, list):
        items = enumerate(document[:50])
    else:
        return places
    return places + [p for key, inner in items for p in _places(inner, (*path, key))]


def mutate_document(random: Random, document: Any) -> tuple[Any, str]:
    """Return a copy with one value replaced, removed, renamed or repeated, and what was done."""
    changed = copy.deepcopy(document)
    places = _places(changed)
    if not places:
        new = json_value(random)
        return new, f"all = {new!r:.60}"
    *outer, key = random.choice(places)
    holder = changed
    for step in outer:
        holder = holder[step]
    where = ".".join(map(str, (*outer, key)))
    kind = random.randrange(6)
    if kind == 0:
        del holder[key]
        return changed, f"without {where}"
    if kind == 1 and isinstance(holder, dict):
        holder[str(key) + random.choice(("_", "\x00", "X"))] = holder.pop(key)
        return changed, f"{where} renamed"
    if kind == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
        return changed, f"{where} twice"
    if kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = holder[key] * random.choice((-1, 0, 2, 1000, 10**9)) + random.choice((0, 1))
    elif kind == 4 and isinstance(holder[key], str):
        holder[key] = random.choice((*TEXTS, holder[key] + "x", holder[key].upper()))
    else:
        holder[key] = json_value(random)
    return changed, f"{where} = {holder[key]!r:.60}"


def json_bytes(document: Any) -> bytes:
    """Write JSON as other programs may write it."""
    return json.dumps(document).encode("utf8")


def mutate_json_file(random: Random, file: Path) -> str:
    """Change a JSON file in place and say how."""
    kind = random.randrange(10)
    if kind == 0:
        body = random.choice(JSON_BODIES)
        file.write_bytes(body)
        return f"{file.name} = {body[:30]!r}"
    if kind == 1:
        file.write_bytes(mutate_bytes(random, file.read_bytes()))
        return f"bytes of {file.name} changed"
    document, words = mutate_document(random, json.loads(file.read_text(encoding="utf8")))
    file.write_bytes(json_bytes(document))
    return f"{file.name}: {words}"


def mutate_file(random: Random, file: Path) -> str:
    """Change, empty, remove or replace a file, and say how."""
    kind = random.randrange(8)
    if kind == 0:
        file.unlink()
        return f"{file.name} removed"
    if kind == 1:
        file.write_bytes(b"")
        return f"{file.name} empty"
    if kind == 2:
        file.unlink()
        file.mkdir()
        return f"{file.name} is a folder"
    file.write_bytes(mutate_bytes(random, file.read_bytes()))
    return f"bytes of {file.name} changed"


def distinct_texts(random: Random, count: int) -> list[str]:
    """Return different ids, some of them odd."""
    odd = random.sample(TEXTS, min(count, random.choice((0, 0, 1, 5))))
    texts = [*odd, *(f"i{n}" for n in range(count - len(odd)))]
    random.shuffle(texts)
    return texts


INTEGER_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
TEXT_TYPES = ("string", "large_string", "string_view")


def arrow_ids(random: Random, count: int) -> tuple[pa.Array, list[str | None]]:
    """Return an Arrow array of ids of any type, and the texts they mean (None for null)."""
    family = random.choice(("text", "text", "integer", "dictionary", "other"))
    if family == "other":
        return _other_ids(random, count)
    values: list[Any]
    if family == "integer":
        kind = getattr(pa, random.choice(INTEGER_TYPES))()
        top = 2**kind.bit_width - 1
        low = 0 if pa.types.is_unsigned_integer(kind) else -(top // 2 + 1)
        values = [*{random.randint(low, low + top) for _ in range(count)} - {low + top}]
        if values and random.random() < 0.3:
            values[0] = low + top
        values += range(low, low + count - len(values))
    else:
        kind = getattr(pa, random.choice(TEXT_TYPES))()
        values = list(distinct_texts(random, count))
    if count and random.random() < 0.15:
        values[random.randrange(count)] = random.choice(values)
    if count and random.random() < 0.1:
        values[random.randrange(count)] = None
    array = pa.array(values, kind)
    if random.random() < 0.2 and count:  # a slice of a longer array
        array = pa.array([values[0], *values], kind).slice(1)
    if family == "dictionary" and kind != pa.string_view():
        array = array.dictionary_encode()
    return array, [None if v is None else str(v) for v in array.to_pylist()]


def _other_ids(random: Random, count: int) -> tuple[pa.Array, list[str | None]]:
    kinds: list[tuple[pa.DataType, Any]] = [
        (pa.float64(), lambda n: n + 0.5),
        (pa.float32(), float),
        (pa.bool_(), lambda n: n % 2 == 0),
        (pa.binary(), lambda n: bytes([n % 256, 0xFF])),
        (pa.date32(), lambda n: n),
        (pa.timestamp("us"), lambda n: n),
        (pa.decimal128(10, 2), lambda n: n),
        (pa.null(), lambda n: None),
        (pa.struct([("a", pa.int64())]), lambda n: {"a": n}),
        (pa.list_(pa.int64()), lambda n: [n]),
        (pa.duration("s"), lambda n: n),
        (pa.dictionary(pa.int32(), pa.int64()), lambda n: n),
        (pa.dictionary(pa.int8(), pa.binary()), lambda n: b"x%d" % (n % 100)),
    ]
    kind, make = random.choice(kinds)
    array = pa.array([make(n) for n in range(count)], kind)
    return array, [None if v is None else str(v) for v in array.to_pylist()]


def pick(random: Random, weights: dict[Any, int]) -> Any:
    """Return a key, by weight."""
    return random.choices(list(weights), list(weights.values()))[0]


def rows_of(random: Random, count: int, dim: int) -> np.ndarray:
    """Return ordinary embeddings ``(count, dim)`` float32."""
    return np.random.default_rng(random.getrandbits(32)).normal(size=(count, dim)).astype("f4")


def spoiled(
    random: Random, rows: Sequence[Any], *, chance: float = 0.5, ragged: bool = True
) -> list[list[Any] | None]:
    """Return rows as lists, some of them null, not finite, too large or of another width."""
    lists: list[list[Any] | None] = [[float(x) for x in row] for row in rows]
    if not lists or random.random() > chance:
        return lists
    for _ in range(random.choice((1, 1, 2, 5))):
        row = random.randrange(len(lists))
        kind = random.choice(("null", "value", "nan", "inf", "big", *(["width"] if ragged else [])))
        old = lists[row]
        if kind == "null":
            lists[row] = None
        elif old:
            at = random.randrange(len(old))
            if kind == "value":
                old[at] = None
            elif kind == "nan":
                old[at] = math.nan
            elif kind == "inf":
                old[at] = random.choice((math.inf, -math.inf))
            elif kind == "big":
                old[at] = random.choice((1e39, -1e300, 70_000.0, 3e38))
            else:
                lists[row] = random.choice((old[:-1], [*old, 1.0], []))
    return lists
