"""Cases of files that semid or another program wrote, changed on the way."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bench import DIM, ITEMS, Bench
from fuzzing import Case, cli, expect
from values import (
    JSON_BODIES,
    SLOW,
    TEXTS,
    arrow_ids,
    json_bytes,
    json_value,
    mutate_bytes,
    mutate_document,
    mutate_file,
    mutate_json_file,
    pick,
    rows_of,
    value,
)

import semid
from semid.catalogue.bundle import CatalogueBundle, read_catalogue
from semid.codes import CodesInfo, SemanticIds
from semid.data.ids import ItemIds
from semid.exports.formats import IMPORTS, import_ids
from semid.exports.id_files import parse_text


def in_range(ids: SemanticIds) -> None:
    """Every code is inside its codebook and every item has one row."""
    codes = ids.codes.astype(np.int64)
    sizes = np.array(ids.info.codebook_sizes)
    expect(codes.ndim == 2 and codes.shape[1] == len(sizes), "codes of another shape")
    expect(((codes >= 0) & (codes < sizes)).all(), "a code is outside its codebook")
    names = ids.items.strings().to_pylist()
    expect(None not in names and len(set(names)) == len(names), "item ids null or twice")
    expect(len(names) == len(codes), "another number of items than rows")


# Models --------------------------------------------------------------------------------------


def artefact(random: Random, bench: Bench, work: Path) -> Case:
    """A saved tokenizer with bytes, keys, types or sizes changed."""
    name = random.choice(("rqkmeans", "rqvae", "pipeline", "codebooks"))
    folder = bench.copy(name, work / "model")
    weights = False
    if random.random() < 0.75:
        text = mutate_json_file(random, folder / "config.json")
    else:
        text, weights = _mutate_tensors(random, folder), True
    use = random.choice(("load", "cli", "report"))

    def call() -> Any:
        if use == "load":
            return semid.load(folder).encode(bench.rows)
        out = work / "ids.parquet"
        cli("encode", folder, bench / "items.parquet", "-o", out, "-q")()
        if use == "report":
            model = semid.load(folder)
            model.decode(model.encode(bench.rows))
            repr((model, model.report))
        return SemanticIds.read(out)

    def check(ids: SemanticIds) -> None:
        in_range(ids)
        expect(len(ids) == ITEMS, "another number of items than rows")
        expect(np.isfinite(ids.residual_norms).all(), "a residual norm is not finite")
        if weights:
            same = np.array_equal(ids.codes, bench.encode(bench.rows, name))
            expect(same, "altered tensors were accepted and give other codes")

    return Case(f"{name}: {text}, {use}", call, check, outputs=[work / "ids.parquet"])


def ranker(random: Random, bench: Bench, work: Path) -> Case:
    """A saved ranking model, changed."""
    folder = bench.copy("ranker", work / "ranker")
    kind = random.random()
    if kind < 0.6:
        text = mutate_json_file(random, folder / "config.json")
    else:
        text = _mutate_tensors(random, folder)
    frame = pa.table({"user_id": ["u1", "zz"], "item_id": ["i1", "zz"]})

    def check(result: Any) -> None:
        expect(len(result) == 2 and np.isfinite(result.logit).all(), "scores are not finite")

    return Case(text, lambda: semid.load(folder).predict(frame), check)


def _mutate_tensors(random: Random, folder: Path) -> str:
    """Change ``model.safetensors`` as bytes, or its header as the JSON that it is."""
    file = folder / "model.safetensors"
    if random.random() < 0.4:
        return mutate_file(random, file)
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, words = mutate_document(random, json.loads(data[8 : 8 + size]))
    body = json_bytes(header)
    length = random.choice((len(body),) * 6 + (2**63, 2**40, 0, len(body) - 1))
    file.write_bytes(length.to_bytes(8, "little") + body + data[8 + size :])
    return f"tensor header: {words}"


# Ids and bundles -----------------------------------------------------------------------------


def ids_file(random: Random, bench: Bench, work: Path) -> Case:
    """A Parquet file of Semantic IDs: bytes, metadata or columns changed."""
    name = random.choice(("ids.parquet", "unique.parquet"))
    file = bench.copy(name, work / "in.parquet")
    kind = random.choice(("bytes", "metadata", "metadata", "column", "column"))
    if kind == "bytes":
        text = mutate_file(random, file)
    else:
        table = pq.read_table(file)
        document = json.loads(table.schema.metadata[b"semid"])
        if kind == "metadata":
            document, text = mutate_document(random, document)
            body = random.choice(JSON_BODIES) if random.random() < 0.15 else json_bytes(document)
            table = table.replace_schema_metadata({b"semid": body})
        else:
            table, text = _mutate_columns(random, table)
        pq.write_table(table, file)
    use = random.choice(("read", "unique", "none", "export", "add", "rank"))
    out = work / "out.parquet"

    def call() -> Any:
        if use == "unique":
            cli("unique", file, "-o", out, "-q")()
            return SemanticIds.read(out)
        if use == "none":
            cli("unique", file, "-o", out, "--method", "none", "-q")()
            return SemanticIds.read(out)
        if use == "export":
            to = random.choice(("lcrec", "grid", "openonerec", "torcheasyrec", "fuxictr"))
            cli("export", file, "--to", to, "-o", work / "out")()
            return read_catalogue(file)
        if use == "add":
            flags = ("--catalogue", file, "-o", out, "-q")
            cli("encode", bench / "rqkmeans", bench / "items.parquet", *flags)()
            return SemanticIds.read(out)
        if use == "rank":
            small = ("--epochs", 1, "--hidden", "4", "--width", 2, "-q")
            cli("rank", bench / "log.parquet", "--ids", file, "-o", work / "ranker", *small)()
        return SemanticIds.read(file)

    outputs = [out, work / "out", work / "ranker"]
    return Case(f"{name}: {kind} {text}, {use}", call, in_range, outputs)


def _mutate_columns(random: Random, table: pa.Table) -> tuple[pa.Table, str]:
    metadata = table.schema.metadata
    name = random.choice(table.column_names)
    at = table.column_names.index(name)
    kind = random.choice(("drop", "twice", "type", "null", "empty", "shuffle", "extra", "rename"))
    if kind == "drop":
        table = table.drop_columns([name])
    elif kind == "twice":
        table = table.append_column(name, table.column(at))
    elif kind == "empty":
        table = table.slice(0, random.choice((0, 1)))
    elif kind == "shuffle":
        table = table.select(random.sample(table.column_names, table.num_columns))
    elif kind == "extra":
        table = table.append_column("codes_", pa.array([None] * len(table)))
    elif kind == "rename":
        names = table.column_names
        names[at] = random.choice((*TEXTS[:8], "codes", name.upper()))
        table = table.rename_columns(names)
    elif kind == "null":
        values = table.column(at).to_pylist()
        row = random.randrange(len(values))
        values[row] = None
        if isinstance(values[0], list) and random.random() < 0.5:
            values[row] = [None, 1]
        column = pa.array(values, None if isinstance(values[0], list) else table.column(at).type)
        table = table.set_column(at, name, column)
    else:
        n = len(table)
        columns: list[Any] = [
            pa.array([f"x{k}" for k in range(n)]), pa.array([1.5] * n), pa.array([[0, 0]] * n),
            pa.array([[0, 9]] * n), pa.array([[0, -1]] * n), pa.array([[0, 2**40]] * n),
            pa.array([[0.5, math.nan]] * n), pa.array([[0]] * n), pa.array([[]] * n,
            pa.list_(pa.int64())),
            pa.array([[0, 0, 0]] * (n - 1) + [[0]]), pa.array([["a", "b"]] * n), pa.nulls(n),
            pa.array([{"a": 1}] * n), pa.array([[[0], [0]]] * n), pa.array([True] * n),
            pa.array([math.nan] * n), pa.array([[0, 0]] * n, pa.list_(pa.uint64(), 2)),
            pa.array([b"x"] * n), pa.array([[0, 1]] * n, pa.large_list(pa.int32())),
        ]  # fmt: skip
        column = random.choice(columns)
        table = table.set_column(at, name, column)
        kind = f"type {column.type}"
    return table.replace_schema_metadata(metadata), f"column {name}: {kind}"


def bundle(random: Random, bench: Bench, work: Path) -> Case:
    """A catalogue in versions with a manifest or a part changed."""
    folder = bench.copy("bundle", work / "bundle")
    manifests = sorted(folder.glob("manifest-*.json"))
    kind = random.choice(("json", "json", "part", "outside", "name", "swap"))
    file = random.choice(manifests)
    outside = False
    if kind == "json":
        text = mutate_json_file(random, file)
    elif kind == "part":
        text = mutate_file(random, random.choice(sorted(folder.glob("parts/*"))))
    elif kind == "swap":  # another table under the same name, with a fresh checksum
        document = json.loads(manifests[-1].read_text(encoding="utf8"))
        part = folder / document["parts"][-1]["file"]
        table, text = _mutate_columns(random, pq.read_table(part))
        pq.write_table(table, part)
        document["parts"][-1]["sha256"] = hashlib.sha256(part.read_bytes()).hexdigest()
        manifests[-1].write_bytes(json_bytes(document))
    elif kind == "name":
        names = ("manifest-0000000001.json", "manifest-000009.json", "manifest-999999999999.json")
        text = random.choice((*names, "manifest-٠٠٠٠٠٣.json", "manifest-000000.json"))
        target = folder / text
        (shutil.copy(file, target) if random.random() < 0.7 else target.mkdir())
    else:
        outside = True
        document = json.loads(manifests[-1].read_text(encoding="utf8"))
        part = folder / document["parts"][0]["file"]
        shutil.copy(part, work / "outside.parquet")
        names = ("../outside.parquet", str(work / "outside.parquet"), "parts/../../outside.parquet")
        document["parts"][0]["file"] = text = random.choice(names)
        manifests[-1].write_bytes(json_bytes(document))
    use = random.choice(("read", "append", "versions", "export"))

    def call() -> Any:
        if use == "append":
            cli(
                *("encode", bench / "rqkmeans", bench / "items.parquet"),
                *("--catalogue", folder, "-o", folder, "-q"),
            )()
        elif use == "export":
            cli("export", folder, "--to", "lcrec", "-o", work / "x.json")()
        elif use == "versions":
            opened = CatalogueBundle(folder)
            versions = opened.versions()[-1:] if outside else opened.versions()
            return opened.read(random.choice(versions))
        return read_catalogue(folder)

    def check(ids: SemanticIds) -> None:
        in_range(ids)
        expect(not outside, "a part outside of the bundle was read")
        names = ids.items.strings().to_pylist()
        # A part that was swapped under a fresh checksum may hold other valid codes.
        if kind != "swap" and names == [f"i{n}" for n in range(len(names))]:
            published = bench.codes[: len(ids)]
            same = np.array_equal(ids.codes, published)
            expect(same, "other codes than published", (ids.codes.shape, published.shape))

    return Case(f"{kind} {file.name}: {text}, {use}", call, check, [folder, work / "x.json"])


# Recipes -------------------------------------------------------------------------------------

TOML_BODIES = (
    b"", b"tokenizer", b"tokenizer = 1", b"tokenizer = []", b'tokenizer = "x"', b"\x00",
    b"\xff\xfe",
    b'tokenizer = "rqkmeans"\nlevels = ' + b"[" * 5000, b"a = 1\na = 2",
        b'tokenizer = "rqkmeans"\n[levels]',
    b'tokenizer = "rqkmeans"\nlevels = ' + b"1" * 5000, b'[tokenizer]\na = 1',
    b'"" = 1\ntokenizer = "rqvae"',
    b'tokenizer = "rqkmeans"\n"training.epochs" = 1',
    b'tokenizer = "rqkmeans"\nlevels = 1979-05-27',
    b'tokenizer = "rqkmeans"\nkmeans = [[1]]',
    b'tokenizer = "rqkmeans"\n[kmeans]\niterations = nan',
    b"\xef\xbb\xbftokenizer = 'rqkmeans'", b"tokenizer = 'rqkmeans'\nthreads = 0",
    b"tokenizer = 'rqvae'\nlogger = 1", b"tokenizer = 'rqkmeans'\nself = 1",
)  # fmt: skip


def _toml(v: Any) -> str:
    if isinstance(v, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(x)}" for k, x in v.items()) + "}"
    if isinstance(v, list | tuple):
        return "[" + ", ".join(map(_toml, v)) + "]"
    if isinstance(v, float):
        return repr(v)
    return json.dumps(v) if v is not None else '"none"'


def _short(document: Any) -> Any:
    """Return a document in which no number asks for hours of work."""
    if not isinstance(document, dict):
        return document
    slow = {
        k: v for k, v in document.items() if k in {*SLOW, "latent"} and isinstance(v, int | float)
    }
    return {k: 2 if k in slow and v > 9 else _short(v) for k, v in document.items()}


def recipe(random: Random, bench: Bench, work: Path) -> Case:
    """A recipe in TOML with values of any type, and the fit by it."""
    import tomllib

    file = work / "recipe.toml"
    base = bench / random.choice(("recipe.toml", "recipe.toml", "pipeline.toml"))
    kind = random.random()
    if kind < 0.15:
        body = random.choice(TOML_BODIES)
        text = repr(body[:60])
    elif kind < 0.3:
        body = mutate_bytes(random, base.read_bytes())
        text = f"{base.name}: bytes changed"
    else:
        document = tomllib.loads(base.read_text(encoding="utf8"))
        if base.name == "recipe.toml" and random.random() < 0.4:
            document["tokenizer"] = random.choice(
                ("rqkmeans", "vqvae", "rqpvae", "drqvae", "mocvae")
            )
        text = document["tokenizer"]
        for _ in range(random.choice((1, 1, 2))):
            document, words = mutate_document(random, document)
            text += f", {words}"
        if random.random() < 0.2:
            key = random.choice(
                ("projection", "rule", "kmeans", "contrastive_weight", "bogus", "device")
            )
            document[key] = json_value(random)
            text += f", {key} = {document[key]!r:.40}"
        if base.name == "pipeline.toml":
            document = _short(document)
        lines = [f"{json.dumps(k)} = {_toml(v)}" for k, v in document.items()]
        body = "\n".join(lines).encode("utf8", "surrogatepass")
    file.write_bytes(body)
    # Flags win over the recipe: what would only take long is set here.
    flags: list[Any] = ["--max-iter", 3] if b"rqkmeans" in body else ["--epochs", 1]
    if base.name == "pipeline.toml":
        flags = []
    if re.search(rb'levels"? *= *[+]?[0-9]{3}', body):
        flags += ["--levels", 2]
    out = work / "model"

    def call() -> Any:
        cli("fit", bench / "items.parquet", "--recipe", file, "-o", out, "-q", *flags)()
        return semid.load(out).encode(bench.rows)

    def check(ids: SemanticIds) -> None:
        in_range(ids)
        expect(np.isfinite(ids.residual_norms).all(), "a residual norm is not finite")

    return Case(text, call, check, outputs=[out, work / "model.partial"])


# Other programs' files -----------------------------------------------------------------------


def imports(random: Random, bench: Bench, work: Path) -> Case:
    """Ids of another program, changed."""
    fmt = pick(random, {"lcrec": 4, "grid": 4, "openonerec": 1, "torcheasyrec": 1})
    file = work / "in"
    if fmt == "lcrec":
        bench.copy("lcrec.json", file)
        text = _mutate_lcrec(random, file)
    elif fmt == "grid":
        text = _mutate_grid(random, bench, file)
    elif fmt == "torcheasyrec":
        table, text = _mutate_columns(random, pq.read_table(bench / "torcheasyrec.parquet"))
        pq.write_table(table, file)
    else:
        bench.copy("openonerec", file)
        part = random.choice(sorted(file.glob("*.parquet")))
        table, text = _mutate_columns(random, pq.read_table(part))
        pq.write_table(table, part)
    use = random.choice(("api", "cli", "model", "ids"))
    flags: list[Any] = []
    if use == "model":
        flags = ["--model", bench / "rqkmeans"]
    elif use == "ids":
        flags = ["--ids", bench / "ids.txt"]
    lies = {"orientation": "levels-first"} if fmt == "grid" else {}
    if lies:
        flags += ["--orientation", "levels-first"]
    out = work / "out.parquet"

    def call() -> Any:
        if use == "api" and fmt in IMPORTS:
            return import_ids(fmt, file, **lies)
        cli("import", file, "--from", fmt, "-o", out, *flags)()
        ids = SemanticIds.read(out)
        cli("unique", out, "-o", work / "unique.parquet", "-q")()
        return ids

    def check(ids: SemanticIds) -> None:
        in_range(ids)
        if fmt == "lcrec":
            document = json.loads(file.read_text(encoding="utf8"))
            codes = [[int(t[3:-1]) for t in document[str(n)]] for n in range(len(document))]
            expect(ids.codes.tolist() == codes, "other codes than the file has")
        elif fmt == "grid":
            tensor = torch.load(file, weights_only=True)
            codes = tensor.T.tolist()
            same = ids.codes.tolist() == codes
            expect(same, "other codes than the file has", (ids.codes[:2], codes[:2]))

    return Case(f"{fmt}: {text}, {use}", call, check, [out, work / "unique.parquet"])


def any_ids(random: Random, bench: Bench, work: Path) -> Case:
    """Ids of any layout, changed; what is read is audited and checked against itself."""
    codes = np.random.default_rng(random.randrange(100)).integers(0, 5, (12, 2))
    names = [f"i{n}" for n in range(len(codes))]
    kind = random.choice((".json", ".json", ".csv", ".parquet", ".npy"))
    file = work / f"in{kind}"
    text = kind
    if kind == ".json":
        texts = ["".join(f"<{'ab'[k]}_{c}>" for k, c in enumerate(row)) for row in codes.tolist()]
        values = random.choice((codes.tolist(), texts, ["-".join(map(str, row)) for row in codes]))
        file.write_text(json.dumps(dict(zip(names, values, strict=True))), encoding="utf8")
        text = mutate_json_file(random, file)
    elif kind == ".npy":
        odd = (codes, codes.astype(float), codes - 2, codes[:1], codes.T, codes * 2**40, codes[:0])
        np.save(file, random.choice((*odd, codes.astype(np.uint8))))
        if random.random() < 0.3:
            file.write_bytes(mutate_bytes(random, file.read_bytes()))
    else:
        split = random.random() < 0.5
        columns = {f"c{k}": codes[:, k] for k in (1, 0)} if split else {"codes": codes.tolist()}
        table, text = _mutate_columns(random, pa.table({"item_id": names, **columns}))
        if kind == ".parquet":
            pq.write_table(table, file)
        else:
            lines = [table.column_names, *zip(*table.to_pydict().values(), strict=True)]
            rows = (",".join(f'"{value}"' for value in line) for line in lines)
            file.write_text("\n".join(rows), encoding="utf8", errors="surrogatepass")
    out, page = work / "out.parquet", work / "audit.html"

    def call() -> Any:
        cli("import", file, "-o", out)()
        cli("audit", file, "-o", page)()
        ids = SemanticIds.read(out)
        result = semid.check_release(ids, ids, maxima={"unresolved": False})
        expect(result.passed, "ids may not replace themselves", result.summary())
        return ids

    def check(ids: SemanticIds) -> None:
        in_range(ids)
        expect(len(page.read_text(encoding="utf8")) > 1000, "the page is empty")

    return Case(text, call, check, [out, page])


def _mutate_lcrec(random: Random, file: Path) -> str:
    if random.random() < 0.5:
        return mutate_json_file(random, file)
    tokens = ("<a_-1>", "<a_٣>", "<a_99999999999999999999>", "<a_4294967296>", "<a_70000>", "<b_0>",
              "<a_1><b_1>", "<a_01>", "<A_1>", "<a_1>\n", "", "<a_" + "1" * 5000 + ">", None, 1,
              [])  # fmt: skip
    document = json.loads(file.read_text(encoding="utf8"))
    row, token = str(random.randrange(ITEMS)), random.choice(tokens)
    document[row][0] = token
    file.write_bytes(json_bytes(document))
    return f"row {row}: {token!r:.30}"


def _mutate_grid(random: Random, bench: Bench, file: Path) -> str:
    tensor = torch.load(bench / "grid.pt", weights_only=True)
    if random.random() < 0.4:
        file.write_bytes(mutate_bytes(random, (bench / "grid.pt").read_bytes()))
        return "bytes changed"
    strange: list[Any] = [
        tensor - 1, tensor * 2**33, tensor * 2**61, tensor.float(), tensor.bool(), tensor.int(),
        tensor.to(torch.uint8), tensor.to_sparse(), tensor[0], tensor[None], tensor[:, :0],
        tensor[:0], tensor.T, tensor.tolist(), {"codes": tensor}, [tensor], None, "x", 3,
        tensor.to(torch.complex64), tensor.to(torch.int8), tensor.half(),
        tensor.t().contiguous().t(),
        torch.zeros(2, 3, dtype=torch.long, device="meta"), torch.full((2, 3), 2**63 - 1),
        torch.nn.Parameter(tensor.float()), torch.quantize_per_tensor(tensor.float(), 1.0, 0,
        torch.qint8),
        tensor[:, :1], tensor[:1], torch.nested.nested_tensor([tensor.float(), tensor.float()]),
        tensor.to(torch.bfloat16), tensor.to(torch.uint16), np.arange(4).reshape(2, 2),
    ]  # fmt: skip
    thing = random.choice(strange)
    torch.save(thing, file)
    dense = isinstance(thing, torch.Tensor) and not thing.is_nested
    shape = thing.shape if dense else ""
    return f"{type(thing).__name__} {getattr(thing, 'dtype', '')} {shape}"


CODEBOOK_NAMES = {
    "openonerec": "centroids.{}",
    "torcheasyrec": "model.quantizer.layers.{}.centroids",
    "grid-checkpoint": "quantization_layer_list.{}.centroids",
}


def codebooks(random: Random, bench: Bench, work: Path) -> Case:
    """Codebooks of another program, as arrays or in a file, some of them no codebooks."""
    source = random.choice((None, None, None, *CODEBOOK_NAMES))
    combine = "sum" if source else random.choice(("sum", "mean", "concat"))
    widths = random.choice(((4, 2), (1, 1, 4))) if combine == "concat" else (DIM,) * 2
    books: list[Any] = [rows_of(random, random.choice((2, 5, 40)), width) for width in widths]
    scale = random.choice((1.0, 1.0, 1.0, 1e-20, 1e15, 1e30))
    books = [book * np.float32(scale) for book in books]
    options: dict[str, Any] = {}
    given = {
        "mean": random.choice((np.ones(DIM), np.ones(DIM - 1), np.full(DIM, math.nan), "x")),
        "projection": random.choice((np.eye(DIM)[::-1], np.zeros((DIM, DIM)), np.eye(DIM - 1))),
        "offset": random.choice((np.ones(DIM), np.ones(DIM + 1), np.full(DIM, 1e30))),
        "beam_width": random.choice((2, 50, 0, value(random))),
        "normalize": True,
        "threads": value(random),
    }
    for name in random.sample(sorted(given), random.choice((0, 1, 1, 2))):
        options[name] = given[name]
    if random.random() < 0.3:
        strange = (
            books[0][:, :1], books[0][:1], books[0][None], books[0] * math.nan, books[0].tolist(),
            books[0].astype("f8"), torch.from_numpy(books[0]), books[0].astype(str), value(random),
            books[0].astype(">f8"), np.asfortranarray(books[0]), books[0][::-1], books[0] > 0,
        )  # fmt: skip
        books[0] = random.choice(strange)
    file = work / "books.pt"
    text = f"{source} {combine} {[np.shape(book) for book in books]} x {scale:g}, {options!r:.60}"
    if source is not None:
        options = {"normalize_residuals": random.choice((None, False))}
        named = {
            CODEBOOK_NAMES[source].format(k): torch.as_tensor(book.copy())
            for k, book in enumerate(books)
            if isinstance(book, np.ndarray) and book.dtype in (np.float32, np.float64)
        }
        torch.save(random.choice((named, named, {"state_dict": named}, [named])), file)
        if random.random() < 0.4:
            file.write_bytes(mutate_bytes(random, file.read_bytes()))
            text += ", bytes changed"

    def call() -> Any:
        if source is None:
            return semid.from_codebooks(books, combine=combine, **options)
        return semid.import_codebooks(source, file, **options)

    def check(model: Any) -> None:
        if model.dim != DIM:  # codebooks of one width may be narrower
            return
        ids = model.encode(bench.rows)
        in_range(ids)
        expect(np.isfinite(ids.residual_norms).all(), "a residual norm is not finite")
        expect(np.isfinite(model.decode(ids)).all(), "a decoded vector is not finite")
        if model.beam_width > 1 or model.settings["normalize_residuals"]:
            return
        rest = model.latent(bench.rows).astype(float)
        for level, (book, columns) in enumerate(
            zip(model.codebooks, model.latent_slices, strict=True)
        ):
            distances = ((rest[:, None, columns] - book.astype(float)) ** 2).sum(2)
            chosen = distances[np.arange(len(rest)), ids.codes[:, level]]
            expect(np.allclose(chosen, distances.min(1)), "a code is not the nearest codeword")
            if model.combine == "sum":
                rest = (rest - book[ids.codes[:, level]]).astype(np.float32).astype(float)
        model.save(work / "model")
        loaded = semid.load(work / "model").encode(bench.rows)
        expect(np.array_equal(loaded.codes, ids.codes), "loaded is not saved")

    return Case(text, call, check, outputs=[file])


def export(random: Random, bench: Bench, work: Path) -> Case:
    """Random Semantic IDs, exported and read back."""
    count = random.choice((0, 1, 2, 20))
    levels = random.choice((1, 2, 3, 30))
    top = random.choice((1, 2, 8, 256, 65_536, 65_537))
    sizes = tuple(random.randint(1, top) for _ in range(levels))
    items, texts = arrow_ids(random, count)
    to = random.choice(
        ("lcrec", "grid", "openonerec", "torcheasyrec", "fuxictr", "huggingface", "faiss")
    )
    generator = np.random.default_rng(random.getrandbits(32))
    codes = np.stack([generator.integers(0, s, len(items)) for s in sizes], axis=1)
    info = CodesInfo(
        tokenizer="rqkmeans",
        codebook_sizes=sizes,
        hierarchical=True,
        codebook_fingerprint="f",
        weights_fingerprint="w",
    )
    needs_model = to in ("huggingface", "faiss")
    file, out = work / "in.parquet", work / "out"

    def call() -> Any:
        if needs_model:
            encoded = bench.model("rqkmeans").encode(rows_of(random, len(items), 6), ids=items)
        else:
            norms = np.zeros(len(items), np.float32)
            encoded = SemanticIds(ItemIds(items), codes, norms, info)
        encoded.write(file)
        back = SemanticIds.read(file)
        same = np.array_equal(back.codes, encoded.codes) and back.items == encoded.items
        expect(same, "ids that were written read otherwise")
        flags = ("--model", bench / "rqkmeans") if needs_model else ()
        cli("export", file, "--to", to, "-o", out, *flags)()
        return back

    def check(ids: SemanticIds) -> None:
        rows = ids.codes.tolist()
        if to in IMPORTS and rows:
            back = import_ids(to, out, **({"orientation": "levels-first"} if to == "grid" else {}))
            expect(back.codes.tolist() == rows, "an import gives other codes than the export")
        elif to == "openonerec":
            table, text = (
                pq.read_table(out / "pid_codes.parquet"),
                pq.read_table(out / "sid_text.parquet"),
            )
            expect(table["codes"].to_pylist() == rows, "openonerec holds other codes")
            expect([parse_text(t) for t in text["sid"].to_pylist()] == rows, "openonerec text")
            pids = table["pid"].to_pylist()
            expect(len(set(pids)) == len(rows), "openonerec pids repeat")
            if "item_id" in table.column_names:
                names = [str(v) for v in table["item_id"].to_pylist()]
                expect(names == texts, "openonerec holds other items")
            else:
                expect(
                    [str(p) for p in pids] == texts,
                    "openonerec holds other pids than items",
                    texts[:5],
                )
        elif to == "torcheasyrec":
            table = pq.read_table(out)
            expect(table["codes"].to_pylist() == rows, "torcheasyrec holds other codes")
            expect([str(v) for v in table["item_id"].to_pylist()] == texts, "torcheasyrec items")

    text = f"{to}, {count} items {items.type}, sizes {sizes[:4]}..."
    return Case(text, call, check, outputs=[file, out])


def openonerec_text(random: Random, bench: Bench, work: Path) -> Case:
    """A text of OpenOneRec, changed."""
    text = "<|sid_begin|><s_a_1><s_b_22><s_c_3><|sid_end|>"
    kind = random.random()
    if kind < 0.3:
        text = str(value(random))
    elif kind < 0.9:
        text = mutate_bytes(random, text.encode()).decode("utf8", "replace")

    def check(codes: list[int]) -> None:
        expect(all(isinstance(c, int) and c >= 0 for c in codes) and codes, "codes are no numbers")

    return Case(repr(text), lambda: parse_text(text), check)
