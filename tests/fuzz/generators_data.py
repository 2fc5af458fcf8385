"""Cases of data that comes in: embeddings, ids, interactions, item tables."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench import DIM, ITEMS, Bench
from fuzzing import Case, cli, expect
from values import (
    SURROGATE,
    TEXTS,
    arrow_ids,
    distinct_texts,
    mutate_bytes,
    pick,
    rows_of,
    spoiled,
    value,
)

import semid
from semid.codes import SemanticIds
from semid.data.blocks import MAX_NORM
from semid.data.ids import ItemIds
from semid.data.interactions import read_interactions
from semid.data.items import read_items


def check_ids(ids: SemanticIds, texts: list[str], codes: np.ndarray) -> None:
    """Items in order, codes as the array interface gives them, finite norms."""
    expect(ids.items.strings().to_pylist() == texts, "other item ids than were given")
    expect(np.array_equal(ids.codes, codes), "other codes than tokenizer.encode gives")
    expect(np.isfinite(ids.residual_norms).all(), "a residual norm is not finite")


# Matrices ------------------------------------------------------------------------------------


def npy(random: Random, bench: Bench, work: Path) -> Case:
    """An ``.npy`` file, its header or its body changed."""
    x = rows_of(random, random.choice((1, 2, 17)), DIM)
    if random.random() < 0.2:
        x[random.randrange(len(x)), 0] = random.choice((math.nan, math.inf))
    file = work / "x.npy"
    kind = random.choice(("bytes", "header", "dtype", "shape", "order", "descr"))
    if kind == "dtype":
        name = random.choice(
            ["f2", "f8", ">f4", ">f8", "i4", "u1", "?", "c8", "U3", "S2", "M8[s]", "O", "f4,f4"]
        )
        if name != "f4,f4":
            array: Any = x.astype(name)
        else:
            array = np.zeros(3, name)
        np.save(file, array, allow_pickle=True)
        text = f"dtype {name}"
    elif kind == "shape":
        shape: Any = random.choice(
            [(), (0,), (0, DIM), (3, 0), (DIM,), (2, 3, DIM), (1, 1), (4, DIM + 1), (1,) * 33]
        )
        try:
            np.save(file, np.zeros(shape, np.float32))
        except ValueError:
            np.save(file, np.zeros((1,) * 30, np.float32))
        text = f"shape {shape}"
    elif kind == "order":
        np.save(file, np.asfortranarray(x))
        text = "Fortran order"
    else:
        np.save(file, x)
        data = file.read_bytes()
        if kind == "bytes":
            head = data.index(b"\n") + 1
            data = (
                mutate_bytes(random, data[:head]) + data[head:]
                if random.random() < 0.7
                else data[:head] + mutate_bytes(random, data[head:])
            )
        else:
            old, new = random.choice(HEADER_EDITS)
            old = old % (len(x), DIM) if b"%d" in old else old
            head = data.index(b"\n") + 1
            header = data[10 : head - 1].rstrip().replace(old, new)
            header += b" " * random.choice((0, 7)) + b"\n"
            data = data[:8] + len(header).to_bytes(2, "little") + header + data[head:]
        file.write_bytes(data)
        text = f"{kind}: {data[:100]!r}"
    skip = random.random() < 0.3

    def call() -> Any:
        if random.random() < 0.3:
            flags = ("--on-invalid", "skip" if skip else "error")
            cli("encode", bench / "rqkmeans", file, "-o", work / "ids.parquet", "-q", *flags)()
            return SemanticIds.read(work / "ids.parquet")
        source = semid.open_embeddings(file, on_invalid="skip" if skip else "error")
        return bench.model("rqkmeans").encode(source)

    def check(ids: SemanticIds) -> None:
        rows = np.load(file, mmap_mode="r", allow_pickle=False).astype(np.float32)
        usable = np.linalg.norm(np.nan_to_num(rows, nan=np.inf).astype("f8"), axis=1) <= MAX_NORM
        expect(usable.all() or skip, "rows that are not finite were accepted")
        check_ids(ids, [str(n) for n in np.flatnonzero(usable)], bench.encode(rows[usable]))

    return Case(text, call, check, outputs=[work / "ids.parquet", work / "ids.parquet.partial"])


HEADER_EDITS: tuple[tuple[bytes, bytes], ...] = (
    (b"(%d, %d)", b"(1000000000000, 6)"), (b"(%d, %d)", b"(-1, 6)"), (b"(%d, %d)", b"(1, -6)"),
    (b"(%d, %d)", b"(6,)"), (b"(%d, %d)", b"6"), (b"(%d, %d)", b"(1.0, 6)"),
    (b"(%d, %d)", b"('a', 6)"), (b"(%d, %d)", b"(True, 6)"), (b"(%d, %d)", b"[1, 6]"),
    (b"(%d, %d)", b"(99999999999999999999999, 6)"), (b"(%d, %d)", b"None"),
    (b"(%d, %d)", b"(0, 99999999999)"), (b"(%d, %d)", b"(" * 500 + b"1" + b")" * 500),
    (b"<f4", b"<f9"), (b"<f4", b"|O"), (b"<f4", b""), (b"<f4", b"<f16"), (b"<f4", b"(2,)<f4"),
    (b"<f4", b"f4,i4"), (b"'<f4'", b"[('a', '<f4')]"), (b"'<f4'", b"None"), (b"'<f4'", b"4"),
    (b"'<f4'", b"{'a': 1}"), (b"'<f4'", b"[('a',)]"), (b"False", b"2"), (b"False", b"'no'"),
    (b"False", b"True"), (b"'descr'", b"'x'"), (b"{", b"["), (b"}", b", 'extra': 1}"),
    (b"{", b"-" * 9000 + b"{"), (b"'descr'", b"1: 1, 'descr'"), (b"(%d, %d)", b"1" * 5000),
    (b"(%d, %d)", b"\x00"), (b"{", b"(" * 400), (b"False", b"__import__('os')"),
)  # fmt: skip


def matrix(random: Random, bench: Bench, work: Path) -> Case:
    """A numpy array, a torch tensor or a plain object in memory."""
    x = rows_of(random, random.choice((1, 2, 17)), DIM)
    bad = random.random() < 0.3
    if bad:
        x[random.randrange(len(x)), random.randrange(DIM)] = random.choice((math.nan, -math.inf))
    wide = np.concatenate([x, x], axis=1)
    containers: list[Any] = [
        x, x.astype("f8"), x.astype(">f4"), np.asfortranarray(x), wide[:, ::2], x[::-1], x[:0],
        x.astype("f8") * 1e300, x.astype(np.longdouble), x.astype(int, casting="unsafe"), x > 0,
        x.astype(object), x.astype(complex), x.astype(str), x[0], x[None], x[:, :3], wide,
        np.ma.masked_array(x, mask=x > 1), x.view(np.recarray) if bad else x, np.float32(1.0),
        torch.from_numpy(x.copy()), torch.from_numpy(x.copy()).double(),
        torch.from_numpy(x.copy()).bfloat16(), torch.from_numpy(x.copy()).to_sparse(),
        torch.from_numpy(x.copy()).requires_grad_(), torch.from_numpy(wide.copy())[:, ::2],
        torch.zeros(3, DIM, dtype=torch.int64), torch.zeros(0, DIM), torch.tensor(1.0),
        torch.zeros(3, DIM, device="meta"), torch.zeros(2, DIM, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.zeros(2, DIM), 0.1, 0, torch.qint8),
        x.tolist(), (x,), {"embedding": x}, None, 7, "", "nothing.npy", b"x", iter(x), work,
        object(),
        [], [None], memoryview(x),
    ]  # fmt: skip
    container = random.choice(containers)
    with_ids = random.choice((None, None, "right", "short"))
    ids = None if with_ids is None else [f"i{n}" for n in range(len(x) - (with_ids == "short"))]
    skip = random.random() < 0.4
    text = f"{type(container).__name__} {getattr(container, 'dtype', '')}, ids {with_ids}"

    def call() -> Any:
        invalid = "skip" if skip else "error"
        source = semid.open_embeddings(container, ids=ids, on_invalid=invalid)
        return bench.model("rqkmeans").encode(source)

    def check(result: SemanticIds) -> None:
        tensor = isinstance(container, torch.Tensor)
        rows = container.detach().float().numpy() if tensor else np.asarray(container)
        rows = rows.astype(np.float32)
        expect(rows.ndim == 2 and len(rows), "no matrix, but accepted")
        usable = np.linalg.norm(np.nan_to_num(rows, nan=np.inf).astype("f8"), axis=1) <= MAX_NORM
        expect(usable.all() or skip, "rows that are not finite were accepted")
        names = ids or [str(n) for n in range(len(rows))]
        expect(len(names) == len(rows), "another number of ids was accepted")
        names = [names[n] for n in np.flatnonzero(usable)]
        check_ids(result, names, bench.encode(rows[usable]))

    return Case(text, call, check)


# Tables --------------------------------------------------------------------------------------


def frame(random: Random, bench: Bench, work: Path) -> Case:
    """A table with an embedding column of any type, in memory or in a file."""
    count = random.choice((0, 1, 2, 5, 40))
    storage = random.choice(("float16", "float32", "float64"))
    dim = DIM if random.random() < 0.9 else random.choice((1, DIM - 1, DIM + 1))
    kind = pick(random, {"list": 3, "large": 2, "fixed": 3, "pandas": 3, "polars": 3, "odd": 2})
    ragged = kind != "fixed" and dim == DIM  # a lone ragged row of width DIM would be right
    rows = spoiled(random, rows_of(random, count, dim), ragged=ragged)
    ids, texts = (
        arrow_ids(random, count)
        if random.random() < 0.5
        else (pa.array([f"i{n}" for n in range(count)], pa.string()),) * 2
    )
    texts = [None if v is None else str(v) for v in ids.to_pylist()]
    number = np.dtype(storage).type
    with np.errstate(all="ignore"):
        stored = [
            None if r is None else [None if v is None else number(v) for v in r] for r in rows
        ]
        truth = [_vector(row, dim) for row in stored]
    table, words = _container(random, kind, stored, storage, dim, ids)
    skip = random.random() < 0.5
    options = {"on_invalid": "skip" if skip else "error"}
    if random.random() < 0.1:
        options["id_column"] = random.choice(("item_id", "embedding", "nothing", ""))
    if random.random() < 0.1:
        options["embedding_column"] = random.choice(("embedding", "item_id", "twin", "", "nothing"))
    file, broken = work / random.choice(("x.parquet", "x.pq", "folder/a.parquet")), False
    place = random.choice(("memory", "file", "cli")) if isinstance(table, pa.Table) else "memory"
    text = f"{words} of {storage}, {count} rows, ids {ids.type}, {options}, {place}"
    if place != "memory":
        file.parent.mkdir(exist_ok=True)
        try:
            pq.write_table(table, file, row_group_size=random.choice((1, 3, 1000)))
        except (pa.ArrowException, NotImplementedError):
            place = "memory"
        broken = place != "memory" and random.random() < 0.15
        if broken:
            file.write_bytes(mutate_bytes(random, file.read_bytes()))
            text += ", bytes changed"
        if file.parent != work:
            file = file.parent

    def call() -> Any:
        if place == "cli":
            flags = [f"--{name.replace('_', '-')}={v}" for name, v in options.items()]
            out = work / "ids.parquet"
            cli("encode", bench / "rqkmeans", file, "-o", out, "-q", *flags)()
            return SemanticIds.read(out)
        source = semid.open_embeddings(table if place == "memory" else file, **options)
        return bench.model("rqkmeans").encode(source)

    def check(result: SemanticIds) -> None:
        if broken or options.get("embedding_column", "embedding") != "embedding":
            return
        usable = [n for n, row in enumerate(truth) if row is not None]
        expect(len(usable) == count or skip, "rows that cannot be used were accepted")
        clean = np.array([truth[n] for n in usable], np.float32)
        if options.get("id_column", "item_id") != "item_id":
            return
        expect(None not in texts, "null ids were accepted")
        expect(len(set(texts)) == len(texts), "repeated ids were accepted")
        check_ids(result, [str(texts[n]) for n in usable], bench.encode(clean))

    return Case(text, call, check, outputs=[work / "ids.parquet", work / "ids.parquet.partial"])


def _vector(row: list[Any] | None, dim: int) -> list[float] | None:
    """Return what a row means in float32, or None for one that cannot be used."""
    if row is None or len(row) != dim or None in row:
        return None
    numbers = [float(np.float32(v)) for v in row]
    return numbers if math.hypot(*numbers) <= MAX_NORM else None


def _container(
    random: Random, kind: str, rows: list[Any], storage: str, dim: int, ids: pa.Array
) -> tuple[Any, str]:
    value_type = pa.from_numpy_dtype(np.dtype(storage))
    if kind == "pandas":
        shape = random.choice(("arrays", "lists", "mixed", "arrow"))
        cells: list[Any] = [_cell(random, row, shape, storage) for row in rows]
        series = pd.Series(cells, dtype=object)
        if shape == "arrow":
            series = pd.Series(pa.array(rows, pa.list_(value_type)), dtype=object)
        data = pd.DataFrame({"embedding": series})
        view = ids.type == pa.string_view()  # which pandas does not have
        data["item_id"] = (ids.cast(pa.string()) if view else ids).to_pandas()
        if random.random() < 0.2:
            data = data.set_index("item_id")
        return data, f"pandas of {shape}"
    if kind == "polars":
        lists = [None if r is None else [None if v is None else float(v) for v in r] for r in rows]
        inner = pl.Float64 if storage == "float64" else pl.Float32
        fixed = random.random() < 0.4 and all(r is None or len(r) == dim for r in rows)
        column = pl.Series(
            "embedding", lists, dtype=pl.Array(inner, dim) if fixed else pl.List(inner)
        )
        try:
            names = pl.from_arrow(ids)
        except Exception:  # noqa: BLE001 - an Arrow type that polars does not have
            names = pl.Series([f"x{n}" for n in range(len(ids))])
            return pl.DataFrame([column]), "polars without ids"
        data = pl.DataFrame([column, names.rename("item_id")])  # type: ignore[union-attr]
        return (data.lazy() if random.random() < 0.05 else data), "polars"
    types: dict[str, pa.DataType] = {
        "list": pa.list_(value_type),
        "large": pa.large_list(value_type),
        "fixed": pa.list_(value_type, dim),
    }
    if kind == "odd":
        odd = random.choice(
            ("string", "struct", "ints", "nested", "dictionary", "decimal", "binary", "view",
            "null",
             "map", "bool")
        )  # fmt: skip
        column = _odd_column(odd, rows, value_type)
        words = f"Arrow {odd}"
    else:
        column = pa.array(rows, types[kind])
        words = f"Arrow {kind}"
    if len(column) and not pa.types.is_dictionary(column.type) and random.random() < 0.2:
        column = pa.concat_arrays([column.slice(0, 1), column]).slice(1)
    names, columns = ["item_id", "embedding"], [ids, column]
    extra = random.choice((None, None, "twin", "twice", "ids twice", "nested"))
    if extra == "twin":
        names, columns = [*names, "twin"], [*columns, column]
    elif extra == "twice":
        names, columns = [*names, "embedding"], [*columns, column]
    elif extra == "ids twice":
        names, columns = [*names, "item_id"], [*columns, ids]
    elif extra == "nested":
        rows_ = pa.array(
            [{"embedding": [1.0]}] * len(ids), pa.struct([("embedding", pa.list_(pa.float32()))])
        )
        names, columns = [*names, "s"], [*columns, rows_]
    if random.random() < 0.3:
        columns = [pa.chunked_array([c.slice(0, 1), c.slice(1)]) for c in columns]
    return pa.Table.from_arrays(columns, names=names), f"{words}, extra {extra}"


def _cell(random: Random, row: Any, shape: str, storage: str) -> Any:
    if row is None:
        return random.choice((None, math.nan))
    if shape == "mixed":
        return random.choice(
            (list(row), tuple(row), np.array(row, storage if None not in row else object))
        )
    return list(row) if shape == "lists" or None in row else np.array(row, storage)


def _odd_column(odd: str, rows: list[Any], kind: pa.DataType) -> pa.Array:
    lists = pa.array(rows, pa.list_(kind))
    n = len(rows)
    if odd == "string":
        return pa.array([str(r) for r in rows], pa.string())
    if odd == "struct":
        return pa.array([{"x": 1.0}] * n, pa.struct([("x", pa.float32())]))
    if odd == "ints":
        return pa.array([[1, 2, 3, 4, 5, 6]] * n, pa.list_(pa.int32()))
    if odd == "nested":
        return pa.array([[[1.0] * DIM]] * n, pa.list_(pa.list_(pa.float32())))
    if odd == "dictionary":
        indices = pa.array(range(n), pa.int32())
        return pa.DictionaryArray.from_arrays(indices, lists)
    if odd == "decimal":
        return pa.array([[1] * DIM] * n, pa.list_(pa.decimal128(10, 2)))
    if odd == "binary":
        return pa.array([b"\x00" * 4 * DIM] * n, pa.binary(4 * DIM))
    if odd == "view":
        return pa.array(rows, pa.list_view(kind))
    if odd == "map":
        return pa.array([[("a", 1.0)]] * n, pa.map_(pa.string(), pa.float32()))
    if odd == "bool":
        return pa.array([[True] * DIM] * n, pa.list_(pa.bool_()))
    return pa.nulls(n)


# Ids -----------------------------------------------------------------------------------------


def ids(random: Random, bench: Bench, work: Path) -> Case:
    """Item ids of any type, from anywhere, written and read back."""
    count = random.choice((1, 2, 9, 30))
    array, texts = arrow_ids(random, count)
    form = random.choice(("arrow", "arrow", "chunked", "table", "pandas", "polars", "python",
        "numpy", "text", "csv", "parquet", "cli"))  # fmt: skip
    given: Any = array
    same_type = form in ("arrow", "chunked", "table", "parquet", "cli")
    file = work / "ids.csv"
    try:
        if form == "chunked":
            given = pa.chunked_array([array.slice(0, 1), array.slice(1)])
        elif form == "table":
            given = pa.table({"item_id": array})
        elif form == "pandas":
            series = array.to_pandas()
            given = random.choice((series, pd.Index(series), series.to_frame("item_id")))
        elif form == "polars":
            given = pl.from_arrow(array)
        elif form in ("parquet", "cli"):
            given = work / "names.parquet"
            pq.write_table(pa.table({"item_id": array}), given)
    except Exception:  # noqa: BLE001 - a type that the other library does not have
        form, given = "arrow", array
    if form in ("python", "numpy", "text", "csv"):
        plain: list[Any] = distinct_texts(random, count)
        if random.random() < 0.4:
            plain[random.randrange(count)] = (
                value(random) if form in ("python", "numpy") else SURROGATE
            )
        if form in ("text", "csv"):
            plain = [v.replace(SURROGATE, "s") for v in plain]
        if random.random() < 0.1:
            plain[0] = SURROGATE if form == "python" else plain[-1]
        given, texts = plain, [None if v is None else str(v) for v in plain]
        if form == "numpy":
            try:
                given = random.choice(
                    (np.array(plain), np.array(plain, dtype=object), np.arange(count))
                )
            except (ValueError, TypeError):
                given = np.arange(count)
            if given.dtype.kind in "iuU":  # numpy's texts end before trailing NULs
                texts = [str(v) for v in given]
        elif form == "text":
            given = work / "ids.txt"
            given.write_bytes("\n".join(plain).encode("utf8"))
        elif form == "csv":
            with file.open("w", encoding="utf8", newline="") as out:
                writer = csv.writer(out, quoting=random.choice((csv.QUOTE_ALL, csv.QUOTE_MINIMAL)))
                writer.writerows([["item_id"], *([v] for v in plain)])
            given = file
    x = rows_of(random, len(texts) or 1, DIM)
    out = work / "out.parquet"
    np.save(work / "x.npy", x)

    def call() -> Any:
        if form == "cli":
            cli("encode", bench / "rqkmeans", work / "x.npy", "--ids", given, "-o", out, "-q")()
        else:
            bench.model("rqkmeans").encode(x, ids=given).write(out)
        return SemanticIds.read(out)

    def check(result: SemanticIds) -> None:
        expect(None not in texts, "null ids were accepted")
        expect(len(set(texts)) == len(texts), "repeated ids were accepted")
        check_ids(result, [str(t) for t in texts], bench.encode(x))
        if same_type:
            stored = array
            if array.type == pa.string_view():  # Parquet has no such type; all text is one type
                stored = array.cast(pa.large_string())
            pq.write_table(pa.table({"item_id": stored}), work / "plain.parquet")
            plain = pq.read_table(work / "plain.parquet")["item_id"].type
            kind = result.items.to_arrow().type
            expect(kind == plain, "ids of another type come back", f"{array.type} -> {kind}")
        hits = result.items.index_of(ItemIds(result.items.to_arrow()).strings())
        expect(np.array_equal(hits, np.arange(len(result))), "an id is not at its own row")

    names = array.type if same_type else ""
    outputs = [out, work / "out.parquet.partial"]
    return Case(f"{form} {names} {texts[:4]!r:.100}", call, check, outputs)


# Interactions and items ----------------------------------------------------------------------


def interactions(random: Random, bench: Bench, work: Path) -> Case:
    """A log with columns of any type, in memory or in a file."""
    count = random.choice((0, 1, 2, 30))
    users, user_texts = arrow_ids(random, count)
    items, item_texts = arrow_ids(random, count)
    count = min(len(users), len(items))
    users, items = users.slice(0, count), items.slice(0, count)
    user_texts, item_texts = user_texts[:count], item_texts[:count]
    times = _times(random, count)
    columns: dict[str, Any] = {"user_id": users, "item_id": items}
    if random.random() < 0.8:
        columns[random.choice(("timestamp", "position"))] = times
    if random.random() < 0.5:
        columns["rating"] = _times(random, count)
    options: dict[str, Any] = {}
    if random.random() < 0.15:
        name = random.choice(("user_column", "item_column", "time_column", "rating_column"))
        options[name] = random.choice((*columns, "", "nothing"))
    table, form = pa.table(columns), random.choice(("arrow", "pandas", "polars", "parquet", "csv"))
    if random.random() < 0.1:
        table = pa.Table.from_arrays([*table.columns, items], [*table.column_names, "user_id"])
    given: Any = table
    try:
        if form == "pandas":
            given = table.to_pandas()
        elif form == "polars":
            given = pl.from_arrow(table)
        elif form == "parquet":
            given = work / "log.parquet"
            pq.write_table(table, given, row_group_size=random.choice((1, 7, 1000)))
        elif form == "csv":
            given = work / random.choice(("log.csv", "log.tsv"))
            data = _csv(random, table, "\t" if given.suffix == ".tsv" else ",")
            given.write_bytes(data)
    except Exception:  # noqa: BLE001 - a type that the other library does not have
        form, given = "arrow", table
    if form in ("parquet", "csv") and random.random() < 0.2:
        given.write_bytes(mutate_bytes(random, given.read_bytes()))
        form = f"broken {form}"

    def check(log: Any) -> None:
        if options or form.startswith("broken") or table.column_names.count("user_id") > 1:
            return
        expect(len(log) == count, "another number of interactions")
        expect(None not in (*user_texts, *item_texts), "null users or items were accepted")
        back = log.user_ids.take(pa.array(log.users)).to_pylist()
        expect(back == user_texts, "other users than were given")
        back = log.item_ids.take(pa.array(log.items)).to_pylist()
        given_items = item_texts
        if form != "csv" and pa.types.is_list(items.type):  # a row per user
            given_items = [str(each) for row in items.to_pylist() for each in row or [None]]
        expect(back == given_items, "other items than were given")
        if log.order is not None:
            expect(np.isfinite(log.order.astype(float)).all(), "a time is not finite")
            _same_order(log.order, times)

    kinds = {name: str(column.type) for name, column in columns.items()}
    return Case(f"{form} {kinds} {options}", lambda: read_interactions(given, **options), check)


def _same_order(order: np.ndarray, times: Any) -> None:
    values = times.to_pylist()
    if times.null_count or pa.types.is_string(times.type):
        return
    rank = np.argsort(np.argsort(order, kind="stable"), kind="stable")
    truth = sorted(range(len(values)), key=lambda n: (values[n], n))
    expect([int(n) for n in np.argsort(rank)] == truth, "times are in another order")


def _times(random: Random, count: int) -> pa.Array:
    kinds: list[tuple[pa.DataType, Any]] = [
        (pa.int64(), lambda n: n), (pa.int64(), lambda n: -n), (pa.int8(), lambda n: n),
        (pa.uint64(), lambda n: 2**64 - 1 - n), (pa.float64(), lambda n: n / 3),
        (pa.float64(), lambda n: [1.0, math.nan][n % 2]), (pa.float32(), lambda n: 1e38),
        (pa.float16(), lambda n: np.float16(n)), (pa.timestamp("ns"), lambda n: n),
        (pa.timestamp("s", "UTC"), lambda n: n), (pa.date32(), lambda n: n),
        (pa.date64(), lambda n: n * 86_400_000), (pa.time64("us"), lambda n: n),
        (pa.duration("s"), lambda n: n), (pa.string(), lambda n: f"2020-01-{n % 28 + 1:02d}"),
        (pa.string(), lambda n: "x"), (pa.decimal128(20, 2), lambda n: n),
        (pa.bool_(), lambda n: n % 2 == 0), (pa.null(), lambda n: None),
        (pa.list_(pa.int64()), lambda n: [n]), (pa.int64(), lambda n: None if n == 1 else n),
        (pa.int64(), lambda n: 2**63 - 1 - n), (pa.dictionary(pa.int8(), pa.int64()), lambda n: n),
    ]  # fmt: skip
    kind, make = random.choice(kinds)
    return pa.array([make(n) for n in range(count)], kind)


def _csv(random: Random, table: pa.Table, delimiter: str) -> bytes:
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    lines = [table.column_names, *([_field(v) for v in row] for row in rows)]
    path = Path("raw.csv")
    with path.open("w", encoding="utf8", newline="") as out:
        csv.writer(out, delimiter=delimiter).writerows(lines)
    data = path.read_bytes()
    path.unlink()
    if random.random() < 0.1:
        data = random.choice(
            (b"\xef\xbb\xbf" + data, data + b"x\n", data + b"1,2,3,4,5,6,7\n", b"", b"\n")
        )
    return data


def _field(v: Any) -> str:
    return "" if v is None else str(v)


def items(random: Random, bench: Bench, work: Path) -> Case:
    """A table of items with titles of any type, lined up with a catalogue."""
    count = random.choice((0, 1, 5, ITEMS))
    names, texts = (
        arrow_ids(random, count)
        if random.random() < 0.4
        else (
            pa.array([f"i{n}" for n in range(count)], pa.string()),
            [f"i{n}" for n in range(count)],
        )
    )
    count = len(names)
    titles, title_texts = _texts(random, count)
    columns: dict[str, Any] = {"item_id": names, random.choice(("title", "title", "text")): titles}
    for extra in ("categories", "brand", "text"):
        if random.random() < 0.3:
            columns.setdefault(extra, _texts(random, count)[0])
    table = pa.table(columns)
    form = random.choice(("arrow", "parquet", "csv", "pandas", "polars"))
    given: Any = table
    try:
        if form == "pandas":
            given = table.to_pandas()
        elif form == "polars":
            given = pl.from_arrow(table)
        elif form == "parquet":
            given = work / "t.parquet"
            pq.write_table(table, given)
        elif form == "csv":
            given = work / "t.csv"
            given.write_bytes(_csv(random, table, ","))
    except Exception:  # noqa: BLE001 - a type that the other library does not have
        form, given = "arrow", table
    catalogue = None
    if random.random() < 0.5:
        catalogue = ItemIds([f"i{n}" for n in range(random.choice((1, 3, 60)))])
    options: dict[str, Any] = {}
    if random.random() < 0.1:
        options[random.choice(("id_column", "title_column"))] = random.choice((*columns, "", "no"))

    def check(table: Any) -> None:
        if options:
            return
        expect(None not in texts and len(set(texts)) == len(texts), "ids null or twice, accepted")
        names = texts if catalogue is None else catalogue.strings().to_pylist()
        expect(table.ids.strings().to_pylist() == names, "other items than were given")
        if "text" in columns or title_texts is None or form == "csv":
            return
        by_id = dict(zip(texts, title_texts, strict=True))
        expect(table.titles.to_pylist() == [by_id.get(name, "") for name in names], "other titles")

    kinds = {name: str(column.type) for name, column in columns.items()}
    text = f"{form} {kinds} {options}"
    return Case(text, lambda: read_items(given, ids=catalogue, **options), check)


def _texts(random: Random, count: int) -> tuple[pa.Array, list[str] | None]:
    """Return a column and what its values are called, where that is beyond doubt."""
    kind = random.choice(("text", "text", "large", "dictionary", "null", "list", "int", "other"))
    words = [random.choice((*TEXTS, f"title {n}", None)) for n in range(count)]
    plain = [w or "" for w in words]
    if kind in ("text", "large"):
        return pa.array(words, pa.large_string() if kind == "large" else pa.string()), plain
    if kind == "dictionary":
        return pa.array(words, pa.string()).dictionary_encode(), plain
    if kind == "int":
        return pa.array(range(count)), [str(n) for n in range(count)]
    if kind == "null":
        return pa.nulls(count), [""] * count
    if kind == "list":
        value_type = random.choice(
            (pa.string(), pa.large_string(), pa.int64(), pa.list_(pa.string()))
        )
        cell: Any = {pa.int64(): [1, None], pa.list_(pa.string()): [["a"]]}.get(
            value_type, ["a", None]
        )
        rows = [random.choice((None, [], cell)) for _ in range(count)]
        outer = random.choice((pa.list_, pa.large_list))
        return pa.array(rows, outer(value_type)), None
    return _times(random, count), None


def predict(random: Random, bench: Bench, work: Path) -> Case:
    """Rows for a ranking model, with columns of any type, missing or too many."""
    count = random.choice((0, 1, 5))
    known = random.random() < 0.6
    users, _ = arrow_ids(random, count)
    columns: dict[str, Any] = {
        "user_id": pa.array([f"u{n}" for n in range(count)], pa.string()) if known else users,
        "item_id": arrow_ids(random, count)[0],
    }
    if random.random() < 0.7:
        columns["item_id"] = pa.array([f"i{n}" for n in range(count)], pa.string())
    if random.random() < 0.2:
        del columns[random.choice([*columns])]
    if random.random() < 0.3:
        column = [random.choice(([], ["i1", "zz"], None, ["i1"] * 500)) for _ in range(count)]
        columns["history"] = pa.array(column, pa.list_(pa.string()))
    form = random.choice(("table", "dictionary", "pandas", "rank", "parquet"))
    columns = {k: v.slice(0, min(map(len, columns.values()))) for k, v in columns.items()}
    table, ranker = pa.table(columns), bench.model("ranker")
    given: Any = table
    try:
        if form == "dictionary":
            given = table.to_pydict()
        elif form == "pandas":
            given = table.to_pandas()
        elif form == "parquet":
            given = work / "rows.parquet"
            pq.write_table(table, given)
    except Exception:  # noqa: BLE001 - a type that the other library does not have
        given = table
    user, candidates, k = value(random), None, random.choice((None, 0, -1, 3, 1000))
    if random.random() < 0.5:
        candidates = random.choice(
            (["i1", "i2"], [], ["zz"], ["i1", "i1"], [None], "i1", [value(random)])
        )

    def check(result: Any) -> None:
        if form == "rank":
            scores = np.asarray(result.score, dtype=float) if hasattr(result, "score") else None
            if scores is not None:
                expect(np.isfinite(scores).all(), "a score is not finite")
            return
        expect(len(result) == len(table), "another number of scores than rows")
        right = np.isfinite(result.logit).all() and (np.abs(result.probability - 0.5) <= 0.5).all()
        expect(right, "scores are no probabilities")

    if form == "rank":
        text = f"rank user={user!r:.40} candidates={candidates!r:.40} k={k}"
        return Case(text, lambda: ranker.rank(user, candidates, k=k), check)
    return Case(f"{form} {table.schema!s:.150}", lambda: ranker.predict(given), check)
