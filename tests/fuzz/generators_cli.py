"""Cases of the command line and of constructors: flags, resumed runs, existing outputs."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bench import DIM, ITEMS, LEVELS, SIZE, Bench
from fuzzing import Case, cli, expect
from generators_files import in_range
from values import OBJECTS, SLOW, TEXTS, mutate_file, pick, rows_of, value

import semid
from semid.codes import SemanticIds
from semid.progress import QuietProgress

FLAGS = (
    "-1", "0", "1", "2", "nan", "inf", "-inf", "1e30", "1e-30", "1.5", "-0", "", " ", "é", "💥",
    "x" * 5000, "auto", "none", "None", "error", "skip", "true", "1,2", ",", "1,,2", "8,8",
    "9" * 30,
    "65537", "4294967296", "1000000000", "0.999", "cpu", "fp32", "\x1b[31m", "a\nb", "%s", "[x]",
    "--",
    "../x", "missing.parquet", "items.parquet:nothing", "*", "[", "nope://x", ".", "item_id",
    "embedding",
    "brand", "title", "user_id", "rating>=3", "rating>=nan", "sampled(uniform,0)", "sampled(x,1)",
    "0.5,0.5,0", "1,0,0", "nan,1,1", "time", "leave-last-out", "device", "price", "all", "append",
)  # fmt: skip
MINE = ("notes.txt", "../beside.txt")  # files of the user
LEAVE_OUT = {
    "help",
    "output",
    "debug",
    "ray_address",
    "processes",
    "store_bytes",
    "wait_seconds",
    "publish",
    "embed",
}
# Text that is a legitimate request for hours of work is no finding.
SHORT_FLAGS = tuple(v for v in FLAGS if not re.fullmatch(r"\d{3,}", v))


def base_commands(random: Random, bench: Bench, work: Path) -> tuple[list[Any], Path]:
    """Return a command that works, and its output."""
    model = bench / random.choice(("rqkmeans", "rqvae"))
    table, ids, log = bench / "items.parquet", bench / "ids.parquet", bench / "log.parquet"
    small = ["--levels", LEVELS, "--codebook-size", SIZE]
    name = pick(
        random,
        {"fit": 5, "encode": 5, "unique": 3, "export": 3, "import": 3, "rank": 4, "drift": 2,
         "refine": 2, "refresh": 2, "report": 1, "compare": 1, "add": 2, "grid": 1, "fit-net": 3,
         "grid-ids": 1, "prepare": 1, "histories": 2, "retrieve": 4, "recommend": 2},
    )  # fmt: skip
    out = work / "out"
    ranker = ["--epochs", 1, "--hidden", "8", "--width", 4]
    commands: dict[str, list[Any]] = {
        "fit": ["fit", table, *small],
        "fit-net": [
            *("fit", table, *small, "--epochs", 1, "--latent", 4, "--tokenizer"),
            random.choice(("rqvae", "vqvae", "rqpvae", "drqvae", "mocvae")),
        ],
        "encode": ["encode", model, random.choice((table, bench / "items.npy"))],
        "add": ["encode", bench / "rqkmeans", table, "--catalogue", bench / "first-ids.parquet"],
        "unique": ["unique", ids, "--method", random.choice(("append", "none", "reassign"))],
        "export": ["export", ids, "--to", random.choice(("lcrec", "grid", "openonerec", "fuxictr",
                   "torcheasyrec", "huggingface", "faiss"))],
        "histories": [
            *("export", ids, "--interactions", log),
            *("--to", random.choice(("lcrec-sequences", "grid-sequences"))),
        ],
        "import": ["import", bench / "lcrec.json", "--from", "lcrec"],
        "rank": ["rank", log, "--items", table, "--ids", ids, *ranker],
        "retrieve": [
            *("retrieve", log, "--ids", ids, "--epochs", 1, "--width", 4, "--batch-size", 64),
            *("--model", random.choice(("composed", "parallel", "generative", "sasrec"))),
        ],
        "recommend": ["recommend", bench / "retriever", "--histories", log],
        "grid": [
            *("rank-grid", log, "--items", table, "--embeddings", table, *ranker),
            *("--methods", "none", "--scales", "1", "--models", "deepfm", "--seeds", 1),
            *("--codebook-size", 4),
        ],
        "grid-ids": [
            *("rank-grid", log, "--ids", ids, "--methods", "none,ids", *ranker),
            *("--models", "deepfm", "--seeds", 1),
        ],
        "drift": ["drift", model, table, bench / "first.parquet"],
        "refine": ["refine", bench / "rqkmeans", table, "--rounds", 1, "--annealing-rounds", 1],
        "refresh": ["refresh", bench / "rqkmeans", table, "--catalogue", ids],
        "report": ["report", model, table],
        "compare": ["compare", bench / "rqkmeans", bench / "other", table],
        "prepare": ["prepare", random.choice(("amazon", "movielens")), random.choice((log,
        bench.path))],
    }  # fmt: skip
    command = commands[name]
    if name == "unique" and "reassign" in command:
        command += ["--model", bench / "rqkmeans", "--embeddings", table]
    if command[0] == "export" and command[-1] in ("huggingface", "faiss"):
        command += ["--model", bench / "rqkmeans"]
    suffix = {
        "report": random.choice((".html", ".json", ".md")),
        "compare": ".html",
        "drift": ".json",
    }
    if command[0] in ("encode", "unique", "import", "recommend"):
        out = out.with_suffix(".parquet")
    out = out.with_suffix(suffix.get(name, out.suffix))
    return [*command, "-o", out], out


def flags(random: Random, bench: Bench, work: Path) -> Case:
    """A command that works, with options of any value."""
    import typer

    from semid.cli.app import app

    command, out = base_commands(random, bench, work)
    options = typer.main.get_command(app).commands[command[0]].params  # type: ignore[attr-defined]
    options = [p for p in options if p.param_type_name == "option" and p.name not in LEAVE_OUT]
    extra: list[Any] = []
    for option in random.sample(options, random.choice((1, 1, 2, 3))):
        name = random.choice([*option.opts, *option.secondary_opts])
        if option.is_flag:
            extra.append(name)
            continue
        long = option.name in SLOW
        text = random.choice(SHORT_FLAGS if long else (*FLAGS, *MINE))
        if option.name == "engine" and text == "ray":
            continue
        inputs = ("items", "ids", "embeddings", "interactions", "relations", "model", "catalogue")
        if option.name in inputs and random.random() < 0.6:
            names = ("items.parquet", "items.npy", "ids.parquet", "log.parquet", "log.csv", "rqvae",
                     "ids.txt", "ranker", "bundle", "lcrec.json", "grid.pt", "recipe.toml",
                     "")  # fmt: skip
            text = str(bench / random.choice(names))
        extra += random.choice(([name, text], [f"{name}={text}"]))
    if random.random() < 0.1:
        command[random.randrange(1, min(3, len(command)))] = random.choice(FLAGS)
    if "-q" not in extra and command[0] not in ("export", "import", "prepare"):
        extra.append("-q")
    call = cli(*command, *extra)

    def check(_: str) -> None:
        if command[0] in ("encode", "unique", "import") and out.is_file():
            in_range(SemanticIds.read(out))
        elif command[0] in ("fit", "refine") and "--resume" not in extra:
            ids = semid.load(out).encode(bench.rows)
            in_range(ids)
            expect(np.isfinite(ids.residual_norms).all(), "a residual norm is not finite")
        elif command[0] == "rank" or (command[0] == "retrieve" and (out / "config.json").exists()):
            semid.load(out)
        elif command[0] == "refresh":
            semid.load(out / "model")
            in_range(SemanticIds.read(out / "ids.parquet"))
        elif out.suffix == ".json" and out.exists():
            json.loads(out.read_text(encoding="utf8"), parse_constant=_refuse)

    paths = str(bench.path), f"{work}/"
    words = [f"{a}".replace(paths[0], "BENCH").replace(paths[1], "") for a in (*command, *extra)]
    shown = [word[:60] for word in words]
    partial = out.with_name(out.name + ".partial")
    return Case(" ".join(shown), call, check, outputs=[out, partial])


def _refuse(text: str) -> None:
    expect(False, "JSON with NaN or Infinity", text)


# Outputs that exist --------------------------------------------------------------------------


def overwrite(random: Random, bench: Bench, work: Path) -> Case:
    """A command onto something that exists, with ``--overwrite`` or without."""
    command, out = base_commands(random, bench, work)
    what = random.choice(
        ("folder", "own folder", "file", "mixed", "empty", "link", "broken link", "dot", "parent",
         "same input", "inside file", "partial file", "partial folder", "hidden")
    )  # fmt: skip
    replaceable: list[Path] = []
    place = out
    mine = work / "mine"
    if what == "folder":  # the user's, nothing of semid in it
        out.mkdir()
        (out / "thesis.txt").write_text("years of work", encoding="utf8")
        (out / "sub").mkdir()
        (out / "sub" / "config.json").write_text("{}", encoding="utf8")
    elif what == "own folder":
        bench.copy(random.choice(("rqkmeans", "bundle", "ranker")), out)
        replaceable = [out]
    elif what == "mixed":  # semid's, and a file of the user in it
        bench.copy("rqkmeans", out)
        (out / "thesis.txt").write_text("years of work", encoding="utf8")
    elif what == "file":
        out.write_bytes(b"a file by this name")
        replaceable = [] if _writes_folder(command) else [out]
    elif what == "empty":
        random.choice((out.mkdir, out.touch))()
        replaceable = [out]
    elif what in ("link", "broken link"):
        if what == "link":
            mine.mkdir()
            (mine / "thesis.txt").write_text("years of work", encoding="utf8")
        out.symlink_to(mine)
        replaceable = [out]  # the link, not what it leads to
    elif what in ("dot", "parent"):
        place = Path("." if what == "dot" else "..")
        (work / "thesis.txt").write_text("years of work", encoding="utf8")
    elif what == "same input":
        source = (
            "rqkmeans"
            if command[0] in ("fit", "refine", "rank", "refresh", "retrieve")
            else "ids.parquet"
        )
        place = bench.copy(source, work / "input")
        command = [place if str(a) == str(bench / source) else a for a in command]
        replaceable = [place]
    elif what == "inside file":
        mine.write_text("years of work", encoding="utf8")
        place = mine / "out"
    elif what == "partial file":
        out.with_name(out.name + ".partial").write_text("years of work", encoding="utf8")
    elif what == "partial folder":
        partial = out.with_name(out.name + ".partial")
        partial.mkdir()
        (partial / "thesis.txt").write_text("years of work", encoding="utf8")
    else:
        (work / f".{out.name}.tmp").write_text("years of work", encoding="utf8")
    command[command.index("-o") + 1] = place
    extra = random.choice((["--overwrite"], ["--overwrite"], [], ["--overwrite", "--resume"]))
    if command[0] not in ("fit", "encode", "rank", "rank-grid", "retrieve"):
        extra = [e for e in extra if e != "--resume"]
    if "--overwrite" not in extra:
        replaceable = []
    if command[0] == "encode" and place.is_dir() and "--catalogue" in command:
        replaceable = [place]  # a bundle grows
    text = " ".join(map(str, (*command, *extra)))
    return Case(f"{what}: {text}", cli(*command, *extra), outputs=replaceable)


def _writes_folder(command: list[Any]) -> bool:
    if command[0] == "export":
        return command[command.index("--to") + 1] in ("openonerec", "huggingface", "fuxictr")
    folders = ("fit", "refine", "rank", "rank-grid", "refresh", "prepare", "retrieve")
    return command[0] in folders


# Runs that were stopped ----------------------------------------------------------------------


class _Stop(QuietProgress):
    """Interrupts at the n-th report."""

    def __init__(self, after: int) -> None:
        self.reports = after

    def start(self, task: str, *, total: int | None = None) -> None:
        """Count."""
        self.step()

    def step(self, done: int = 1, **fields: Any) -> None:
        """Count."""
        self.reports -= 1
        if self.reports < 0:
            raise KeyboardInterrupt


def resume(random: Random, bench: Bench, work: Path) -> Case:
    """A run that was stopped, its inputs or state changed, continued."""
    kind = random.choice(("encode", "fit", "fit-net", "rank"))
    rows = rows_of(random, 5000 if kind == "encode" else 60, DIM)
    names = [f"i{n}" for n in range(len(rows))]
    table = work / "x.parquet"
    _write(table, rows, names)
    out, again = work / "out", work / "again"
    flags: list[Any] = ["-q"]
    if kind == "encode":
        command: list[Any] = ["encode", bench / "rqkmeans", table]
        out, again = out.with_suffix(".parquet"), again.with_suffix(".parquet")
    elif kind == "rank":
        command = [
            "rank",
            bench.copy("log.parquet", work / "log.parquet"),
            "--ids",
            bench / "ids.parquet",
        ]
        flags += ["--epochs", 2, "--hidden", "8", "--width", 4, "--batch-size", 32]
    else:
        command = ["fit", table, "--levels", 2, "--codebook-size", 8]
        if kind == "fit-net":
            command += ["--tokenizer", "rqvae", "--epochs", 3, "--latent", 4, "--batch-size", 16]
    partial = out.with_name(out.name + ".partial")
    _interrupt(random, [*command, "-o", out, *flags])
    begun = "stopped" if partial.exists() else "not begun or complete"
    change = random.choice(
        ("nothing", "row", "last row", "ids", "order", "fewer", "seed", "state", "state")
    )
    if kind == "rank" and change in ("row", "last row", "ids", "order", "fewer"):
        log = pq.read_table(work / "log.parquet")
        log = log.slice(0, 200) if change == "fewer" else log.take(np.arange(len(log))[::-1])
        pq.write_table(log, work / "log.parquet")
    elif change in ("row", "last row"):
        rows[-1 if change == "last row" else 0] += 3.0
        _write(table, rows, names)
    elif change == "ids":
        at = random.choice((0, len(names) - 1))
        names[at] = "changed"
        _write(table, rows, names)
    elif change == "order":
        _write(table, rows[::-1], names)
    elif change == "fewer":
        _write(table, rows[:-1], names[:-1])
    elif change == "seed" and kind != "encode":
        flags += ["--seed", 3]
    elif change == "state" and partial.is_dir():
        states = [f for f in sorted(partial.rglob("*")) if f.is_file()]
        if states:
            change += f": {mutate_file(random, random.choice(states))}"

    def call() -> None:
        cli(*command, "-o", out, *flags, "--resume")()

    def check(_: Any) -> None:
        cli(*command, "-o", again, *flags)()
        if kind == "encode":
            a, b = SemanticIds.read(out), SemanticIds.read(again)
            expect(a.items == b.items, f"a resumed {kind} gives other items than a fresh one")
            expect(np.array_equal(a.codes, b.codes), f"a resumed {kind} gives other codes")
        else:
            a, b = (p / "model.safetensors" for p in (out, again))
            expect(a.read_bytes() == b.read_bytes(), f"a resumed {kind} gives another model")

    return Case(f"{kind} {begun}, {change}", call, check, outputs=[out, partial, again])


def _write(path: Path, rows: np.ndarray, names: list[str]) -> None:
    column = pa.array(list(rows), pa.list_(pa.float32()))
    pq.write_table(pa.table({"item_id": names, "embedding": column}), path)


def _interrupt(random: Random, command: list[Any]) -> None:
    """Run a command and interrupt it on the way; it may also end before that."""
    import contextlib
    from unittest import mock

    import semid.progress
    import semid.tokenizers.encoding as encoding

    stop = _Stop(random.choice((1, 3, 4, 6, 9, 14)))

    @contextlib.contextmanager
    def stopping(**_: Any) -> Any:
        yield stop

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    join = random.choice((interrupted, encoding.PartFolder._join))
    with (
        mock.patch.object(semid.progress, "make_progress", stopping),
        mock.patch.object(encoding.PartFolder, "_join", join),
        contextlib.suppress(Exception),
    ):
        cli(*command)()


# Constructors --------------------------------------------------------------------------------


TOKENIZERS = ("RQKMeans", "RQVAE", "VQVAE", "RQPVAE", "DRQVAE", "MoCVAE", "PQ", "OPQ", "FSQ",
              "RQGMM", "Codebooks", "Pipeline")  # fmt: skip
SMALL: dict[str, Any] = {
    "levels": 2,
    "n_codebooks": 2,
    "codebook_size": 8,
    "rotation_iter": 2,
    "dimension_levels": (2, 4),
    "training": {"epochs": 1, "batch_size": 16},
    "network": {"hidden": (8,), "latent": 4},
    "kmeans": {"max_iter": 3},
    "encoder": {"tokenizer": "drqvae", "levels": 1, "codebook_size": 8,
                "training": {"epochs": 1, "batch_size": 16}, "network": {"latent": 4}},
    "quantizer": {"tokenizer": "pq", "n_codebooks": 2, "codebook_size": 8},
}  # fmt: skip
NESTED = {"training": semid.TrainOptions, "network": semid.AutoencoderConfig,
          "kmeans": semid.KMeansOptions, "encoder": semid.DRQVAE,
          "quantizer": semid.PQ}  # fmt: skip


def constructor(random: Random, bench: Bench, work: Path) -> Case:
    """A public class or function with an argument of any value, and the use of what it makes."""
    name = random.choice(
        (*TOKENIZERS, "KMeansOptions", "TrainOptions", "AutoencoderConfig", "RankerConfig",
         "RankingDataConfig", "CodeFeatures", "RefineOptions")
    )  # fmt: skip
    made = getattr(semid, name)
    known = _parameters(made)
    arguments: dict[str, Any] = {}
    tokenizer = name in TOKENIZERS
    if tokenizer:
        arguments = {key: argument for key, argument in SMALL.items() if key in known}
        if name == "FSQ":
            arguments["network"] = {"hidden": (8,)}
    for key in random.sample(sorted(known), min(len(known), random.choice((1, 1, 2)))):
        if isinstance(arguments.get(key), dict) and random.random() < 0.8:
            options = _parameters(NESTED[key])
            inner = random.choice([*sorted(options), "bogus"])
            arguments[key] = {**arguments[key], inner: _argument(random, inner)}
        else:
            arguments[key] = _argument(random, key)
    fit = tokenizer and random.random() < 0.7

    def call() -> Any:
        result = made(**arguments)
        repr(result)
        if fit:
            result.fit(bench.rows)
            out = result.save(work / "model")
            ids = semid.load(out).encode(bench.rows)
            expect(
                np.array_equal(ids.codes, result.encode(bench.rows).codes), "loaded is not saved"
            )
            return ids
        return None

    def check(ids: Any) -> None:
        if ids is not None:
            in_range(ids)
            expect(len(ids) == ITEMS, "another number of items than rows")
            expect(np.isfinite(ids.residual_norms).all(), "a residual norm is not finite")

    shown = ", ".join(f"{k}={v!r:.50}" for k, v in arguments.items())
    return Case(f"{name}({shown}){'.fit' if fit else ''}", call, check, outputs=[work / "model"])


def _argument(random: Random, name: str) -> Any:
    """Return a value; no huge one for what only takes long."""
    if name in SLOW:
        return random.choice((*OBJECTS, 0, -1, 1, 2, 0.5, "1", float("nan")))
    return value(random)


def _parameters(made: Any) -> set[str]:
    names: set[str] = set()
    for parameter in inspect.signature(made.__init__).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            (options,) = get_type_hints(made.__init__)[parameter.name].__args__
            names |= set(options.__annotations__)
        elif parameter.name != "self":
            names.add(parameter.name)
    return names - {"logger"}


# Pages ---------------------------------------------------------------------------------------


def report(random: Random, bench: Bench, work: Path) -> Case:
    """A report on items with odd names: what a title says is never code on the page."""
    odd = list(TEXTS)
    random.shuffle(odd)
    names = [*odd[:20], *(f"i{n}" for n in range(ITEMS - 20))]
    random.shuffle(odd)
    titles = [odd[n % len(odd)] + "<b>bold</b>" for n in range(ITEMS)]
    table = pa.table({"item_id": names, "title": titles, "brand": titles, "categories": titles})
    out = work / random.choice(("r.html", "r.json", "r.md"))

    def call() -> str:
        model = bench.model("rqkmeans")
        source = semid.open_embeddings(bench.rows, ids=names)
        semid.diagnose(model, source, items=table).write(out)
        return out.read_text(encoding="utf8")

    def check(text: str) -> None:
        if out.suffix == ".json":
            json.loads(text, parse_constant=_refuse)
        else:
            expect("<script>alert(1)" not in text, "a title is code on the page")
            expect("<b>bold</b>" not in text, "a title is markup on the page")

    return Case(out.name, call, check, outputs=[out])
