"""What the golden record measures: small fixed data, and one case per tokenizer and command.

Every case runs one thing and writes what came out into a `Record`. Values are of three kinds:

- ``exact``: equal on every machine, such as the codes of K-means, or the keys of a report;
- ``close``: numbers that depend in their last digits on the CPU, compared with a tolerance;
- ``bits``: SHA-256 of results that are bit-equal on one kind of CPU only, such as trained weights.

Messages, help texts and documentation are left out on purpose.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import platform
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

import semid
from semid.cli import main
from semid.codes import SemanticIds
from semid.exports.formats import EXPORTS

__all__ = ["CASES", "Record", "World", "cpu", "run_case"]

ROOT = Path(__file__).parents[1]
ITEMS, NEW_ITEMS, WIDTH, GROUPS, USERS = 900, 60, 16, 12, 90

VOLATILE = re.compile(
    r"(^|_)(seconds|date|created|versions?|path|folder|host|machine|commit|sha256|bytes)$"
)
"""Keys whose values differ from run to run or from machine to machine."""
VOLATILE_TEXT = re.compile(
    r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d)?)?"  # dates
    r"|\b\d+(\.\d+)? (s|seconds)\b"  # durations
    r"|(?<![\w.<])/([\w.-]+/)+[\w.-]*"  # absolute paths
    r"|\b[0-9a-f]{12}(?=\.parquet)"  # digests of bytes in names of files
    rf"|\bsemid {re.escape(version('semid'))}"
)
"""Dates, durations, absolute paths and the version inside a text."""


def mask(value: Any) -> Any:
    """Replace times, dates, paths, versions and hosts in a JSON document or a text."""
    if isinstance(value, dict):
        return {k: "masked" if VOLATILE.search(k) else mask(part) for k, part in value.items()}
    if isinstance(value, list):
        return [mask(part) for part in value]
    return VOLATILE_TEXT.sub("masked", value) if isinstance(value, str) else value


def cpu() -> str:
    """Name what decides on the last bits of a float32 product: CPU, its instructions, libraries."""
    info, chip = Path("/proc/cpuinfo"), platform.machine()
    if info.exists():  # BLAS picks kernels and block sizes by the model
        told = re.findall(r"^(vendor_id|cpu family|model)\s*:\s*(\S+)", info.read_text(), re.M)
        chip = "-".join(value for _, value in told[:3]) or chip
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    capability = f"{torch.backends.cpu.get_cpu_capability()}{' AMX' if amx else ''}"
    return f"{chip} {capability}, torch {torch.__version__}, numpy {np.__version__}"


def digest(*parts: Any) -> str:
    """Return the first half of the SHA-256 of arrays, texts and JSON values."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            array = np.ascontiguousarray(part)
            total.update(f"{array.dtype.str}{array.shape}".encode())
            total.update(array.tobytes())
        else:
            total.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return total.hexdigest()[:32]


def leaves(document: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of every leaf; list positions and numeric keys are one path."""
    if isinstance(document, dict) and document:
        for key, part in document.items():
            name = "*" if re.fullmatch(r"[\d.]+", key) else key
            yield from leaves(part, f"{path}.{name}" if path else name)
    elif isinstance(document, list) and document:
        for part in document:
            yield from leaves(part, f"{path}[]")
    else:
        yield path, document


def structure(document: Any) -> list[str]:
    """Return the sorted ``path: type`` of a JSON document."""
    return sorted({f"{path}: {type(value).__name__}" for path, value in leaves(document)})


class Record:
    """Fingerprints of one case.

    Attributes:
        exact: values that are equal on every machine.
        close: numbers that are compared with a tolerance.
        bits: digests that are equal on one kind of machine.
        threaded: whether the bits depend on the number of threads, too.
    """

    def __init__(self) -> None:
        self.exact: dict[str, Any] = {}
        self.close: dict[str, float] = {}
        self.bits: dict[str, str] = {}
        self.threaded = False

    @property
    def machine(self) -> str:
        """The machines that give these bits: what `cpu` says, and threads where they matter."""
        return f"{cpu()}, {torch.get_num_threads()} threads" if self.threaded else cpu()

    def array(self, name: str, *arrays: np.ndarray, exact: bool) -> None:
        """Record arrays, bit by bit."""
        (self.exact if exact else self.bits)[name] = digest(*arrays)
        if not exact:
            self.exact[f"{name}: shapes"] = [list(array.shape) for array in arrays]

    def number(self, name: str, value: float) -> None:
        """Record a number with six significant digits."""
        self.close[name] = float(f"{value:.6g}")

    def document(self, name: str, document: Any, *, only: str = "", exact: bool = False) -> None:
        """Record the structure of a JSON document, and its numbers.

        Args:
            name: in the record.
            document: parsed JSON.
            only: regular expression; numbers whose path does not match it are left out of
                ``close``. They are in the digest all the same.
            exact: whether all numbers are equal on every machine.
        """
        document = mask(document)
        parts = document if isinstance(document, dict) else {}
        parts = {key: part for key, part in parts.items() if isinstance(part, dict | list)}
        for key, part in parts.items():
            self.exact[f"{name}: structure of {key}"] = structure(part)
        flat = {k: v for k, v in document.items() if k not in parts} if parts else document
        self.exact[f"{name}: structure"] = structure(flat)
        numbers = [(p, v) for p, v in leaves(document) if isinstance(v, bool | int | float)]
        (self.exact if exact else self.bits)[f"{name}: all numbers"] = digest(numbers)
        sums: dict[str, float] = {}
        for path, value in numbers:
            if re.search(only, path) and not isinstance(value, bool):
                sums[path] = sums.get(path, 0.0) + abs(value)
        for path, total in sums.items():
            self.number(f"{name}: {path}", total)

    def table_numbers(self, name: str, text: str) -> None:
        """Record the numbers in the table cells of a Markdown or HTML page."""
        text = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        cells = re.findall(r"<td[^>]*>(.*?)</td>", text, re.DOTALL)
        cells += [line for line in text.splitlines() if line.startswith("|")]
        numbers = re.findall(r"-?\d+(?:[.,]\d+)*%?", mask(" ".join(cells)))
        self.exact[f"{name}: tables"] = text.count("<table") + len(
            re.findall(r"^\|[ |:-]+$", text, re.MULTILINE)
        )
        self.bits[f"{name}: numbers in tables"] = digest(numbers)

    def files(self, name: str, path: Path, *, exact: bool = True) -> None:
        """Record the names and contents of a file or of a folder's files."""
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        files = [file for file in files if file == path or not file.name.startswith(".")]
        for file in files:
            short = name if file == path else f"{name}/{file.relative_to(path)}"
            short = re.sub(r"-[0-9a-f]{12}\b", "-DIGEST", short)  # of the bytes, by version
            kind, content = contents(file)
            self.exact[f"{short}: format"] = kind
            (self.exact if exact else self.bits)[short] = content


def contents(file: Path) -> tuple[Any, str]:
    """Return the format of a file and the digest of what it holds.

    Containers whose bytes depend on the version of the library that writes them are read.
    """
    if file.suffix == ".parquet":
        table = pq.read_table(file)
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        notes = {k: json.loads(v) if v.startswith("{") else v for k, v in metadata.items()}
        notes.pop("ARROW:schema", None)
        kind = [f"{f.name}: {f.type}{'' if f.nullable else ' not null'}" for f in table.schema]
        kind = [re.sub(r"<(item|element): ", "<", text) for text in kind]  # names by version
        return kind + structure(notes), digest(table.to_pydict(), mask(notes))
    if file.suffix == ".safetensors":
        tensors = load_file(file)
        return (
            {name: [array.dtype.name, *array.shape] for name, array in sorted(tensors.items())},
            digest(*(tensors[name] for name in sorted(tensors))),
        )
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            kinds = {name: [a.dtype.name, *a.shape] for name, a in sorted(arrays.items())}
            return kinds, digest(*(arrays[name] for name in sorted(arrays)))
    if file.suffix == ".npy":
        array = np.load(file)
        return [array.dtype.name, *array.shape], digest(array)
    if file.suffix == ".json":
        document = json.loads(file.read_text(encoding="utf8"))
        rows = len(document) == ITEMS if isinstance(document, dict | list) else False
        return "rows" if rows else structure(document), digest(mask(document))
    return "bytes", digest(mask(file.read_text(encoding="utf8")).encode())


# Fixed data ----------------------------------------------------------------------------------


def draw(seed: int, count: int, below: int) -> np.ndarray:
    """Return ``(count,)`` int64 below ``below`` (SplitMix64): equal on every platform, for ever."""
    with np.errstate(over="ignore"):
        state = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)
        z = state * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int64) % below


def vectors(count: int = ITEMS + NEW_ITEMS, *, width: int = WIDTH, seed: int = 1) -> np.ndarray:
    """Return ``(count, width)`` float32 in groups and subgroups; every value is a whole 64th."""
    rows = np.arange(count)
    centers = draw(seed, GROUPS * width, 257).reshape(GROUPS, width) - 128
    offsets = draw(seed + 1, 7 * width, 97).reshape(7, width) - 48
    noise = sum(draw(seed + n, count * width, 33).reshape(count, width) - 16 for n in (2, 3))
    whole = centers[rows % GROUPS] + offsets[draw(seed + 4, count, 7)] + noise
    return (whole / 64).astype(np.float32)


def embedding_table(x: np.ndarray, first: int = 0) -> pa.Table:
    """Return rows with their item ids."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    return pa.table({"item_id": [f"i{first + n}" for n in range(len(x))], "embedding": vectors})


def item_table() -> pa.Table:
    """Return title, brand and categories of every item."""
    rows = range(ITEMS)
    return pa.table(
        {
            "item_id": [f"i{n}" for n in rows],
            "title": [f"Thing {n} of group {n % GROUPS}" for n in rows],
            "brand": [None if n % 17 == 0 else f"b{n % GROUPS // 2}" for n in rows],
            "categories": [f"top > c{n % GROUPS // 3}" if n % 3 else "top" for n in rows],
        }
    )


def log_table() -> pa.Table:
    """Return sequences of users who stay with two groups and like one of them."""
    length = 14
    user = np.repeat(np.arange(USERS), length)
    group = (user + 5 * draw(20, len(user), 2)) % GROUPS
    popular = np.minimum(draw(21, len(user), ITEMS // GROUPS), draw(22, len(user), ITEMS // GROUPS))
    item = popular * GROUPS + group
    _, first = np.unique(user * ITEMS + item, return_index=True)
    first.sort()
    user, item, group = user[first], item[first], group[first]
    liked = (group == user % GROUPS) ^ (draw(23, len(user), 10) == 0)
    return pa.table(
        {
            "user_id": [f"u{n}" for n in user],
            "item_id": [f"i{n}" for n in item],
            "timestamp": 1_700_000_000 + 60 * np.arange(len(user)),
            "rating": np.where(liked, 5.0, 2.0),
            "device": [["web", "app", "tv"][n] for n in draw(24, len(user), 3)],
            "price": draw(25, len(user), 160) / 8,
        }
    )


class World:
    """The files that cases read, written once, and models that are fitted when first needed.

    Args:
        root: folder for the files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.x = vectors()
        self.source = embedding_table(self.x[:ITEMS])
        self.log = log_table()
        (root / "parts").mkdir()
        pq.write_table(self.source, root / "items.parquet")
        pq.write_table(embedding_table(self.x), root / "all.parquet")
        pq.write_table(embedding_table(self.x[ITEMS:], ITEMS), root / "new.parquet")
        for start in range(0, ITEMS, 300):
            part = self.source.slice(start, 300)
            pq.write_table(part, root / "parts" / f"part-{start}.parquet", row_group_size=100)
        pq.write_table(self.log, root / "log.parquet")
        pq.write_table(item_table(), root / "table.parquet")

    @cached_property
    def kmeans(self) -> semid.RQKMeans:
        """K-means with three levels, saved under ``kmeans``."""
        model = semid.RQKMeans(levels=3, codebook_size=16).fit(self.source)
        model.save(self.root / "kmeans")
        return model

    @cached_property
    def network(self) -> semid.RQPVAE:
        """A small network, saved under ``network``."""
        model = semid.RQPVAE(levels=3, codebook_size=16, **SMALL).fit(self.source)
        model.save(self.root / "network")
        return model

    @cached_property
    def ids(self) -> SemanticIds:
        """Codes of K-means, written to ``ids.parquet``."""
        ids = self.kmeans.encode(self.source)
        ids.write(self.root / "ids.parquet")
        return ids

    def run(self, *arguments: object, needs: str = "") -> None:
        """Run a command; names of files in this folder are replaced by their paths."""
        for name in needs.split():
            getattr(self, name)
        words = [re.sub(r"^@", f"{self.root}/", str(argument)) for argument in arguments]
        said = io.StringIO()
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            pytest.raises(SystemExit) as end,
        ):
            main(words)
        assert end.value.code in (0, None), f"semid {' '.join(words)}\n{said.getvalue()}"


Case = Callable[[World, Path, Record], None]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Register a case under a name."""

    def register(function: Case) -> Case:
        assert name not in CASES
        CASES[name] = function
        return function

    return register


def run_case(name: str, world: World, folder: Path) -> Record:
    """Run one case with an empty folder of its own."""
    record = Record()
    CASES[name](world, folder, record)
    return record


# Tokenizers ----------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "network": {"latent": 8, "hidden": (24,), "pretrain_epochs": 1},
    "training": {"epochs": 3, "batch_size": 128, "precision": "fp32"},
    "device": "cpu",
}
GRID: dict[str, Any] = {**SMALL, "network": {"hidden": (24,)}}
BEHAVIOR: dict[str, Any] = {
    "objective": {"pairs_per_step": 64},
    "refine": {"rounds": 2, "annealing_rounds": 2},
}
LEVELS: dict[str, Any] = {"levels": 3, "codebook_size": 16}
FIT_NUMBERS = r"error|perplexity|score|inertia|collision_rate$|unique_ids"


def record_tokenizer(
    tokenizer: Any, source: Any, folder: Path, record: Record, *, exact: bool
) -> None:
    """Record codes, codebooks, report and artefact of a fitted tokenizer."""
    ids = tokenizer.encode(source)
    record.array("codes", ids.codes, exact=exact)
    record.array("codebooks", *tokenizer.codebooks, exact=exact)
    record.array("residual norms", ids.residual_norms, exact=exact)
    record.number("mean residual norm", float(ids.residual_norms.mean(dtype=np.float64)))
    decoded = tokenizer.decode(ids.codes)
    record.array("decoded", decoded, exact=exact)
    record.number("mean square of decoded", float(np.square(decoded, dtype=np.float64).mean()))
    if tokenizer.report is not None:
        record.document("report", tokenizer.report.to_dict(), only=FIT_NUMBERS)
    tokenizer.save(folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    for noise in ("fit_report", "tensors"):
        config.pop(noise, None)
    record.exact["config: structure"] = structure(config)
    record.exact["tensors: format"] = contents(folder / "model" / "model.safetensors")[0]
    loaded = semid.load(folder / "model").encode(source)
    record.exact["the loaded model gives equal codes"] = bool(
        np.array_equal(ids.codes, loaded.codes)
    )


def pairs() -> np.ndarray:
    """Return ``(300, 2)`` rows of one group each."""
    first = draw(30, 300, ITEMS)
    return np.stack([first, (first + GROUPS * (1 + draw(31, 300, 9))) % ITEMS], axis=1)


def fused() -> Any:
    """Return two embeddings and a category side by side."""
    return semid.fuse(
        {"text": vectors(ITEMS), "image": vectors(ITEMS, width=8, seed=40)},
        categories={"brand": item_table()["brand"].to_pylist()},
        category_width=8,
    )


EXACT = ("rqkmeans", "pq", "codebooks")
"""Tokenizers whose results are equal on every machine."""

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "rqkmeans greedy": lambda: semid.RQKMeans(**LEVELS),
    "rqkmeans sizes per level": lambda: semid.RQKMeans(levels=3, codebook_size=(8, 16, 20)),
    "rqkmeans beam": lambda: semid.RQKMeans(**LEVELS, beam_width=5),
    "rqkmeans normalize": lambda: semid.RQKMeans(**LEVELS, normalize=True),
    "rqkmeans center": lambda: semid.RQKMeans(**LEVELS, center=True),
    "rqkmeans normalize and center": lambda: semid.RQKMeans(**LEVELS, normalize=True, center=True),
    "rqkmeans restarts": lambda: semid.RQKMeans(
        **LEVELS, seed=3, kmeans={"n_init": 3, "max_iter": 5}
    ),
    "rqkmeans sample per code": lambda: semid.RQKMeans(
        **LEVELS, kmeans={"sample_per_code": 20, "full_pass": True}
    ),
    "rqkmeans weights": lambda: semid.RQKMeans(**LEVELS),
    "rqkmeans fused": lambda: semid.RQKMeans(**LEVELS),
    "vqvae ema": lambda: semid.VQVAE(codebook_size=16, **SMALL),
    "vqvae gradient": lambda: semid.VQVAE(codebook_size=16, rule="gradient", **SMALL),
    "rqvae": lambda: semid.RQVAE(**LEVELS, **SMALL),
    "rqvae beam, normalize and center": lambda: semid.RQVAE(
        **LEVELS, beam_width=4, normalize=True, center=True, **SMALL
    ),
    "rqvae fused, weights": lambda: semid.RQVAE(**LEVELS, **SMALL),
    "rqpvae": lambda: semid.RQPVAE(**LEVELS, revive_below=0.3, **SMALL),
    "rqgmm": lambda: semid.RQGMM(**LEVELS, max_em_iter=4, center=True),
    "rqgmm spherical, weights": lambda: semid.RQGMM(
        **LEVELS, max_em_iter=4, covariance="spherical"
    ),
    "rqkmeans balanced": lambda: semid.RQKMeans(
        **LEVELS, center=True, balance={"mode": "soft", "rounds": 8}
    ),
    "rqkmeans balanced hard": lambda: semid.RQKMeans(
        **LEVELS, balance={"mode": "hard", "rounds": 8}
    ),
    "rqkmeans trained with a beam": lambda: semid.RQKMeans(
        **LEVELS, beam_width=3, train_with_beam=True
    ),
    "pq": lambda: semid.PQ(n_codebooks=5, codebook_size=16, kmeans={"n_init": 2}),
    "opq": lambda: semid.OPQ(n_codebooks=4, codebook_size=16, center=True, rotation_iter=3),
    "codebooks of levels": lambda: semid.Codebooks(**LEVELS, beam_width=3, center=True),
    "codebooks, parallel": lambda: semid.Codebooks(**LEVELS, combine="mean"),
    "codebooks, side by side": lambda: semid.Codebooks(**LEVELS, combine="concat", normalize=True),
    "pipeline of drqvae and opq": lambda: semid.Pipeline(
        encoder=semid.DRQVAE(
            levels=1, codebook_size=16, contrastive_weight=0.1, pairs_per_step=64, **SMALL
        ),
        quantizer=semid.OPQ(n_codebooks=3, codebook_size=16, rotation_iter=2),
    ),
    "pipeline of rqvae and rqgmm": lambda: semid.Pipeline(
        encoder={"tokenizer": "rqvae", "levels": 1, "codebook_size": 16, **SMALL},
        quantizer={"tokenizer": "rqgmm", "codebook_size": 16, "max_em_iter": 3},
    ),
    "fsq": lambda: semid.FSQ(dimension_levels=(4, 5), groups=2, **GRID),
    "fsq stages, dimensions": lambda: semid.FSQ(
        dimension_levels=(4, 5), groups=1, stages=2, codes_per="dimension", **GRID
    ),
    "drqvae": lambda: semid.DRQVAE(**LEVELS, **SMALL),
    "drqvae interactions": lambda: semid.DRQVAE(
        **LEVELS, contrastive_weight=0.1, pairs_per_step=64, **SMALL
    ),
    "drqvae pairs, uniformity and kl": lambda: semid.DRQVAE(
        **LEVELS,
        contrastive_weight=0.1,
        uniformity_weight=0.05,
        kl_weight=0.01,
        pairs_per_step=64,
        **SMALL,
    ),
    "drqvae neighbors": lambda: semid.DRQVAE(
        **LEVELS, contrastive_weight=0.1, pairs_per_step=64, **SMALL
    ),
    "mocvae ema": lambda: semid.MoCVAE(n_codebooks=3, codebook_size=16, **SMALL),
    "mocvae gradient": lambda: semid.MoCVAE(
        n_codebooks=3, codebook_size=16, rule="gradient", **SMALL
    ),
    "mocvae projection ema": lambda: semid.MoCVAE(
        n_codebooks=3, codebook_size=16, projection=True, **SMALL
    ),
    "mocvae projection gradient": lambda: semid.MoCVAE(
        n_codebooks=2, codebook_size=(8, 16), projection=True, rule="gradient", **SMALL
    ),
    "barq": lambda: semid.BARQ(**LEVELS, check_behavior=False, **BEHAVIOR, **SMALL),
    "barq balanced": lambda: semid.BARQ(
        **LEVELS,
        balance_strength=0.5,
        behavior_levels=2,
        content_variance=1.0,
        **BEHAVIOR,
        **SMALL,
    ),
    "barq without behavior": lambda: semid.BARQ(**LEVELS, behavior_weight=0.0, **BEHAVIOR, **SMALL),
}
FIT_OPTIONS: dict[str, dict[str, Any]] = {
    "rqkmeans weights": {"weights": draw(32, ITEMS, 5).astype(np.float64)},
    "rqkmeans fused": {"source": "fused"},
    "rqvae fused, weights": {"source": "fused", "weights": 1.0 + draw(32, ITEMS, 5)},
    "rqgmm spherical, weights": {"weights": 1.0 + draw(32, ITEMS, 5)},
    "rqkmeans balanced": {"weights": 1.0 + draw(32, ITEMS, 5)},
    "pq": {"weights": draw(32, ITEMS, 5).astype(np.float64)},
    "pipeline of drqvae and opq": {"interactions": "log"},
    "drqvae interactions": {"interactions": "log"},
    "drqvae pairs, uniformity and kl": {"pairs": "pairs"},
    "drqvae neighbors": {"pairs": "neighbors"},
    "barq": {"interactions": "log"},
    "barq balanced": {"pairs": "pairs"},
}
"""What `fit` gets; text names an input."""


def tokenizer_case(name: str) -> None:
    """Register the case of a tokenizer."""

    @case(f"tokenizer {name}")
    def run(world: World, folder: Path, record: Record) -> None:
        inputs = {
            "fused": fused,
            "log": lambda: world.log,
            "pairs": pairs,
            "neighbors": lambda: semid.Neighbors(
                embedding_table(vectors(ITEMS, width=8, seed=40)), k=3
            ),
        }
        fit = FIT_OPTIONS.get(name, {})
        given = {k: inputs[v]() if isinstance(v, str) else v for k, v in fit.items()}
        source = given.pop("source", world.source)
        tokenizer = TOKENIZERS[name]().fit(source, **given)
        record_tokenizer(tokenizer, source, folder, record, exact=name.startswith(EXACT))


for _name in TOKENIZERS:
    tokenizer_case(_name)


@case("given codebooks")
def given_codebooks(world: World, folder: Path, record: Record) -> None:
    """Make a tokenizer of arrays, with a map before them."""
    x = world.x[:ITEMS]
    tokenizer = semid.from_codebooks(
        [x[:16, :5], x[20:44, 3:7], x[50:58, 7:14]],
        combine="concat",
        mean=x[0],
        projection=np.eye(WIDTH, dtype=np.float32)[::-1],
        offset=x[1],
    )
    record_tokenizer(tokenizer, world.source, folder, record, exact=False)


def refine_case(name: str) -> None:
    """Register the case of refining one of the world's models."""

    @case(f"refine {name}")
    def run(world: World, folder: Path, record: Record) -> None:
        options = semid.RefineOptions(rounds=2, annealing_rounds=2, beam_width=4)
        refined = semid.refine(getattr(world, name), world.source, options=options)
        record_tokenizer(refined, world.source, folder, record, exact=False)


refine_case("kmeans")
refine_case("network")


@case("decode head")
def decode_head(world: World, folder: Path, record: Record) -> None:
    """Fit, save and load a decode head."""
    head = semid.DecodeHead.fit(world.ids, vectors(ITEMS, width=8, seed=40))
    predicted = head.predict(world.ids)
    record.array("predicted", predicted, exact=False)
    record.number("mean square of predicted", float(np.square(predicted, dtype=float).mean()))
    record.number("error", head.error or 0.0)
    record.exact["ridge"] = head.ridge
    head.save(folder / "head")
    record.exact["tensors: format"] = contents(folder / "head" / "model.safetensors")[0]
    record.exact["config: structure"] = structure(
        json.loads((folder / "head" / "config.json").read_text())
    )
    loaded = semid.load(folder / "head").predict(world.ids)
    record.exact["the loaded head predicts the same"] = bool(np.array_equal(loaded, predicted))


# Commands ------------------------------------------------------------------------------------


RESULT_NUMBERS = rf"^(?!slices|training).*({FIT_NUMBERS}|auc$|loss$)|^training.*(score|loss)"


def record_model(folder: Path, record: Record, *, exact: bool) -> None:
    """Record the weights and the report of a model that a command wrote."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    record.exact["tensors: names"] = names
    (record.exact if exact else record.bits)["tensors"] = digest(*(tensors[n] for n in names))
    report = config.get("fit_report", config.get("report"))
    record.document("report", report, only=RESULT_NUMBERS)
    record.exact["files"] = sorted(path.name for path in folder.iterdir())


@case("fit")
def fit(world: World, folder: Path, record: Record) -> None:
    """Fit K-means from the command line."""
    world.run("fit", "@items.parquet", "--codebook-size", 16, "-q", "-o", folder / "model")
    record_model(folder / "model", record, exact=True)


@case("fit with a network")
def fit_network(world: World, folder: Path, record: Record) -> None:
    """Fit a recipe's network from the command line, with an .npy and its table of ids."""
    np.save(folder / "x.npy", world.x[:ITEMS])
    world.run(
        "fit", folder / "x.npy", "--ids", "@table.parquet", "--recipe", "drqvae-contrastive",
        "--interactions", "@log.parquet", "--codebook-size", 16, "--latent", 8, "--epochs", 2,
        "--batch-size", 128, "--precision", "fp32", "--device", "cpu", "-q",
        "-o", folder / "model",
    )  # fmt: skip
    record_model(folder / "model", record, exact=False)


@case("demo")
def demo(world: World, folder: Path, record: Record) -> None:
    """Make the synthetic catalogue and what follows from it."""
    record.threaded = True
    world.run("demo", "--items", 1000, "--codebook-size", 16, "-q", "-o", folder / "demo")
    files = [path for path in (folder / "demo").rglob("*") if path.is_file()]
    record.exact["files"] = sorted(str(path.relative_to(folder / "demo")) for path in files)
    for path in sorted(files):
        if path.suffix == ".parquet":
            record.exact[f"{path.name}: format"] = contents(path)[0]
            record.bits[path.name] = contents(path)[1]
    record.table_numbers("report.html", (folder / "demo" / "report.html").read_text())


@case("encode")
def encode(world: World, folder: Path, record: Record) -> None:
    """Encode a table, greedily and with a beam."""
    for name, more in (("greedy", ()), ("beam", ("--beam-width", 4))):
        out = folder / f"{name}.parquet"
        world.run("encode", "@kmeans", "@all.parquet", *more, "-q", "-o", out, needs="kmeans")
        record.files(name, out)


@case("encode a folder")
def encode_folder(world: World, folder: Path, record: Record) -> None:
    """Encode a folder of Parquet files into a folder."""
    world.run(
        "encode", "@kmeans", "@parts", "--processes", 1, "-q", "-o", folder / "ids",
        needs="kmeans",
    )  # fmt: skip
    record.files("ids", folder / "ids")


@case("encode into a catalogue")
def encode_catalogue(world: World, folder: Path, record: Record) -> None:
    """Add new items to published ids: a file, then two versions of a bundle."""
    world.run("unique", "@ids.parquet", "-q", "-o", folder / "unique.parquet", needs="ids")
    add = ("encode", "@kmeans", "@new.parquet", "-q", "--catalogue", folder / "unique.parquet")
    world.run(*add, "-o", folder / "two.parquet", "--novelty", folder / "novelty.parquet")
    record.files("catalogue", folder / "two.parquet")
    kind, content = contents(folder / "novelty.parquet")
    record.exact["novelty: format"], record.bits["novelty"] = kind, content
    world.run(*add, "-o", folder / "bundle")
    record.files("bundle", folder / "bundle")


@case("unique")
def unique(world: World, folder: Path, record: Record) -> None:
    """Make ids unique by every method, and take it back."""
    model = ("--model", "@kmeans", "--embeddings", "@items.parquet")
    for name, more in (
        ("append", ()),
        ("reassign", model),
        ("reassign with room for two", (*model, "--capacity", 2)),
    ):
        out, method = folder / f"{name}.parquet", name.split()[0]
        world.run("unique", "@ids.parquet", "--method", method, *more, "-q", "-o", out, needs="ids")
        record.files(name, out)
        world.run("unique", out, "--method", "none", "-q", "-o", folder / f"{name} none.parquet")
        record.files(f"{name}, then none", folder / f"{name} none.parquet")


@case("refine command")
def refine_command(world: World, folder: Path, record: Record) -> None:
    """Refine from the command line."""
    world.run(
        "refine", "@kmeans", "@items.parquet", "--rounds", 2, "--annealing-rounds", 1,
        "--beam-width", 4, "-q", "-o", folder / "model", needs="kmeans",
    )  # fmt: skip
    record_model(folder / "model", record, exact=False)


@case("report")
def report(world: World, folder: Path, record: Record) -> None:
    """Diagnose K-means in all three formats."""
    for suffix in ("json", "html", "md"):
        out = folder / f"report.{suffix}"
        world.run(
            "report", "@kmeans", "@items.parquet", "--interactions", "@log.parquet", "--items",
            "@table.parquet", "-q", "-o", out, needs="kmeans",
        )  # fmt: skip
        if suffix == "json":
            record.document("report", json.loads(out.read_text()))
        else:
            record.table_numbers(suffix, out.read_text(encoding="utf8"))


@case("compare")
def compare(world: World, folder: Path, record: Record) -> None:
    """Compare two models."""
    for suffix in ("json", "md"):
        out = folder / f"compare.{suffix}"
        world.run(
            "compare", "@kmeans", "@network", "@items.parquet", "--interactions", "@log.parquet",
            "-q", "-o", out, needs="kmeans network",
        )  # fmt: skip
        if suffix == "json":
            document = json.loads(out.read_text())
            diagnoses = document.pop("diagnoses")
            record.document("comparison", document)
            for name, diagnosis in diagnoses.items():
                record.document(f"diagnosis of {name}", diagnosis, only="^$")
        else:
            record.table_numbers(suffix, out.read_text(encoding="utf8"))


@case("drift")
def drift(world: World, folder: Path, record: Record) -> None:
    """Compare two snapshots of a catalogue."""
    world.run(
        "drift", "@kmeans", "@items.parquet", "@all.parquet", "-q", "-o", folder / "drift.json",
        needs="kmeans",
    )  # fmt: skip
    record.document("drift", json.loads((folder / "drift.json").read_text()))


@case("refresh")
def refresh(world: World, folder: Path, record: Record) -> None:
    """Fit again on a changed catalogue, warm with a limit and cold without one."""
    for name, more in (
        ("warm", ("--max-churn", 0.1, "--interactions", "@log.parquet", "--compare")),
        ("cold", ("--cold",)),
    ):
        world.run(
            "refresh", "@kmeans", "@all.parquet", "--catalogue", "@ids.parquet", *more, "-q",
            "-o", folder / name, needs="ids",
        )  # fmt: skip
        record.files(f"{name} ids", folder / name / "ids.parquet")
        document = json.loads((folder / name / "refresh.json").read_text())
        record.document(f"{name} report", document)
        record.files(f"{name} weights", folder / name / "model" / "model.safetensors")


# Ranking -------------------------------------------------------------------------------------

RANK = ("--label", "rating>=4", "--items", "@table.parquet", "--categorical", "device", "--dense",
        "price", "--epochs", 2, "--hidden", "8", "--width", 4, "--batch-size", 128,
        "--learning-rate", 0.02, "--precision", "fp32", "--device", "cpu", "-q")  # fmt: skip

RANKINGS: dict[str, tuple[Any, ...]] = {
    "deepfm without codes": ("--model", "deepfm", "--history", 5),
    "deepfm": ("--model", "deepfm", "--ids", "@ids.parquet"),
    "deepim": ("--model", "deepim", "--ids", "@ids.parquet", "--code-mode", "prefix"),
    "autoint": ("--model", "autoint", "--ids", "@ids.parquet", "--code-mode", "ngram",
                "--split", "leave-last-out"),
    "dcnv2": ("--model", "dcnv2", "--ids", "@ids.parquet", "--cold-items", 0.2, "--no-item-id",
              "--control", "shuffled"),
    "fusion": ("--model", "dcnv2", "--ids", "@ids.parquet", "--fusion", "on", "--fusion-rank", 4,
               "--code-mode", "levels", "--split", "time"),
    "sampled negatives": ("--model", "deepfm", "--ids", "@ids.parquet", "--label",
                          "sampled(popularity,2)", "--dense", "", "--categorical", ""),
    "streamed": ("--model", "deepfm", "--ids", "@ids.parquet", "--stream"),
}  # fmt: skip


def rank_case(name: str, more: tuple[Any, ...]) -> None:
    """Register the case of a ranking model."""

    @case(f"rank {name}")
    def run(world: World, folder: Path, record: Record) -> None:
        record.threaded = True
        analysis = ("--analyze", folder / "analysis.json") if name == "fusion" else ()
        alone = ("--no-baseline",) if "--ids" in more else ()
        world.run(
            "rank", "@log.parquet", *RANK, *more, *analysis, *alone, "-o", folder / "ranker",
            needs="ids",
        )  # fmt: skip
        record_model(folder / "ranker", record, exact=False)
        ranker = semid.load(folder / "ranker")
        report = json.loads((folder / "ranker" / "config.json").read_text())["report"]
        record.exact["rows"] = {part: report[part]["rows"] for part in ("validation", "test")}
        record.exact["parameters"] = report["parameters"]
        scores = ranker.predict(world.log.slice(0, 200)).probability
        record.array("scores", scores, exact=False)
        record.number("mean score", float(scores.mean()))
        if analysis:
            record.document("analysis", json.loads((folder / "analysis.json").read_text()))


for _name, _more in RANKINGS.items():
    rank_case(_name, _more)


@case("rank a grid")
def rank_grid(world: World, folder: Path, record: Record) -> None:
    """Rank with several methods, one of which fits a tokenizer."""
    record.threaded = True
    world.run(
        "rank-grid", "@log.parquet", *RANK, "--embeddings", "@items.parquet", "--methods",
        "none,random,rqkmeans", "--scales", 2, "--models", "deepfm", "--fusion", "on,off",
        "--seeds", 1, "--codebook-size", 8, "-o", folder / "grid",
    )  # fmt: skip
    lines = (folder / "grid" / "results.jsonl").read_text().splitlines()
    # Where a run comes from differs between machines.
    origin = {"commit", "dirty", "versions", "machine", "threads", "finished"}
    rows = [{k: v for k, v in json.loads(line).items() if k not in origin} for line in lines]
    record.document("results", rows, only="auc|log_loss")
    record.exact["runs"] = [
        [row[key] for key in ("run", "model", "method", "scale", "fusion", "seed")] for row in rows
    ]
    record.table_numbers("tables.md", (folder / "grid" / "tables.md").read_text())
    record.exact["files"] = sorted(path.name for path in (folder / "grid").iterdir())


# Exchange with other programs ----------------------------------------------------------------


def export_case(to: str) -> None:
    """Register the case of an export."""

    @case(f"export {to}")
    def run(world: World, folder: Path, record: Record) -> None:
        for package in {"faiss": ["faiss"], "onnx": ["onnxscript", "onnxruntime"]}.get(to, []):
            pytest.importorskip(package)
        world.ids  # noqa: B018 - it writes the files that the command reads
        shared = "@ids.parquet"
        if EXPORTS[to].distinct:
            shared = str(folder / "unique.parquet")
            world.run("unique", "@ids.parquet", "-q", "-o", shared)
        ids = (shared,) if EXPORTS[to].ids else ()
        model = ("--model", "@kmeans")
        if to == "torcheasyrec":
            model = (*model, "--embeddings", "@items.parquet", "--candidates", 3)
        if to == "atlas":
            model = (*model, "--embeddings", "@items.parquet", "--set", "projection=pca")
        if EXPORTS[to].interactions != "unused":
            model = (*model, "--interactions", "@log.parquet")
        suffixes = {
            "lcrec": ".json", "lcrec-sequences": ".json", "torcheasyrec": ".parquet",
            "torch-export": ".pt2", "atlas": ".parquet", "flashrec": ".json",
            "static": ".npz", "sid2pid": ".json", "sid-gr": ".jsonl",
        }  # fmt: skip
        suffix = suffixes.get(to, "")
        out = folder / f"out{suffix}"
        world.run("export", *ids, "--to", to, *model, "-o", out)
        EXPORTED.get(to, _files)(out, world, record)


def _files(out: Path, world: World, record: Record) -> None:
    record.files("out", out)


def _grid(out: Path, world: World, record: Record) -> None:
    tensor = torch.load(out, weights_only=True)
    record.exact["tensor"] = [str(tensor.dtype), *tensor.shape]
    record.array("values", tensor.numpy(), exact=True)


def _faiss(out: Path, world: World, record: Record) -> None:
    import faiss

    index = faiss.read_index(str(out))
    record.exact["index"] = [type(index).__name__, index.ntotal, index.d, index.rq.max_beam_size]
    codes = faiss.vector_to_array(index.codes)
    record.array("codes", codes, exact=True)
    books = faiss.vector_to_array(index.rq.codebooks)
    record.array("codebooks", books.reshape(-1, WIDTH), exact=True)


def _onnx(out: Path, world: World, record: Record) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    record.exact["inputs and outputs"] = [
        [place.name, place.type, place.shape]
        for place in (*session.get_inputs(), *session.get_outputs())
    ]
    results = session.run(None, {session.get_inputs()[0].name: world.x[:ITEMS]})
    record.array("codes", np.asarray(results[0]), exact=True)
    record.exact["codes are those of encode"] = bool(np.array_equal(results[0], world.ids.codes))


def _torch_export(out: Path, world: World, record: Record) -> None:
    program = torch.export.load(str(out)).module()
    codes = program(torch.from_numpy(world.x[:ITEMS])).numpy()
    record.array("codes", codes, exact=True)
    record.exact["codes are those of encode"] = bool(np.array_equal(codes, world.ids.codes))


def _lcrec_sequences(out: Path, world: World, record: Record) -> None:
    histories = json.loads(out.read_text(encoding="utf8"))
    record.exact["histories"] = [len(histories), digest(histories)]


def _grid_sequences(out: Path, world: World, record: Record) -> None:
    """Record what the files hold: their compressed bytes depend on the version of zlib."""
    for split in sorted(path for path in out.iterdir() if path.is_dir()):
        contents = [gzip.decompress(file.read_bytes()).hex() for file in sorted(split.iterdir())]
        record.exact[split.name] = [len(contents), digest(contents)]
    record.files("users", out / "users.parquet")


EXPORTED = {
    "lcrec-sequences": _lcrec_sequences,
    "grid": _grid,
    "grid-sequences": _grid_sequences,
    "faiss": _faiss,
    "onnx": _onnx,
    "torch-export": _torch_export,
}
for _name in EXPORTS:
    export_case(_name)


@case("import")
def import_(world: World, folder: Path, record: Record) -> None:
    """Read back what the exports wrote."""
    world.run("unique", "@ids.parquet", "-q", "-o", folder / "unique.parquet", needs="ids")
    for source, suffix in (("lcrec", ".json"), ("grid", ".pt")):
        file = folder / f"{source}{suffix}"
        world.run("export", folder / "unique.parquet", "--to", source, "-o", file)
        for name, more in (("plain", ()), ("model", ("--model", "@kmeans"))):
            out = folder / f"{source}-{name}.parquet"
            world.run("import", file, "--from", source, "--ids", "@table.parquet", *more, "-o", out)
            record.files(f"{source} {name}", out)


# Releases and papers -------------------------------------------------------------------------


@case("prepare")
def prepare(world: World, folder: Path, record: Record) -> None:
    """Read a small release in each layout."""
    users, items, stars = draw(50, 400, 20), draw(51, 400, 12), draw(52, 400, 5) + 1
    log = list(zip(users.tolist(), items.tolist(), stars.tolist(), strict=True))
    with gzip.open(folder / "reviews.json.gz", "wt") as file:
        for n, (u, i, r) in enumerate(log):
            row = {"reviewerID": f"u{u}", "asin": f"i{i}", "overall": float(r)}
            print(json.dumps({**row, "unixReviewTime": 1_400_000_000 - 60 * n}), file=file)
    with gzip.open(folder / "meta.json.gz", "wt") as file:
        for n in range(12):
            print(json.dumps({"asin": f"i{n}", "title": f"T {n}", "brand": f"b{n % 3}"}), file=file)
    movielens = folder / "ml-latest-small"
    movielens.mkdir()
    titles = "".join(f"{n},Film {n} (19{50 + n}),Drama|War\n" for n in range(12))
    (movielens / "movies.csv").write_text(f"movieId,title,genres\n{titles}")
    ratings = "".join(f"{u},{i},{r}.0,{1_000 + n}\n" for n, (u, i, r) in enumerate(log))
    (movielens / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n{ratings}")
    world.run(
        "prepare", "amazon", folder / "reviews.json.gz", "--items", folder / "meta.json.gz",
        "-o", folder / "amazon",
    )  # fmt: skip
    world.run("prepare", "movielens", movielens, "-o", folder / "movielens")
    for name in ("amazon", "movielens"):
        for table in ("items", "interactions"):
            record.files(f"{name} {table}", folder / name / f"{table}.parquet")
