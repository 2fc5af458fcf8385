"""Kill every command that writes at random moments, and start two at once: nothing may be lost.

    python tests/faults.py --kills 200 --pairs 50 --seed 0

After each kill the former output or the new one must be under its name, the inputs untouched; the
same command run again must end with what an uninterrupted run writes, and leave nothing else
behind. Of two runs that start together, one writes its own result and the other is refused, or
both are done one after the other; the result is never a mixture. Prints counts, and every failure
with the command that repeats it; ends with 1 if there is one.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import rank_cases
import semid
from semid.catalogue.bundle import CatalogueBundle
from semid.cli import main
from semid.codes import SemanticIds
from test_texts import WORDS, make_encoder


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        text: the command, ``{model}`` being one of two models and ``{out}`` the output.
        out: name of the output.
        resumes: whether ``--resume`` continues it.
        grows: whether the output is an input that gets one more version.
    """

    text: str
    out: str
    resumes: bool = False
    grows: bool = False


COMMANDS = {
    "fit": Command(
        "fit {x} --levels 2 --codebook-size 64 --seed {seed} -q -o {out}", "new", resumes=True
    ),
    "fit network": Command(
        "fit {x} --tokenizer rqvae --levels 2 --codebook-size 8 --latent 8 --epochs 3 "
        "--seed {seed} -q -o {out}",
        "new",
        resumes=True,
    ),
    "embed": Command(
        "embed texts.parquet --model encoder{version} --batch-size 64 -q -o {out}",
        "new.parquet",
        resumes=True,
    ),
    "encode": Command("encode {model} {x} -q -o {out}", "new.parquet", resumes=True),
    "encode folder": Command(
        "encode {model} parts --processes 1 -q -o {out}", "newids", resumes=True
    ),
    "unique": Command("unique {ids} -q -o {out}", "new.parquet"),
    "unique folder": Command("unique {idsfolder} -q -o {out}", "newids"),
    "refresh": Command("refresh {model} {x} --catalogue {ids} -q -o {out}", "new"),
    "refine": Command("refine {model} {x} --rounds 2 --annealing-rounds 2 -q -o {out}", "new"),
    "rank": Command(
        "rank log.parquet --hidden 8 --epochs 3 --batch-size 64 --seed {seed} -q -o {out}",
        "new",
        resumes=True,
    ),
    "retrieve": Command(
        "retrieve walks.parquet --ids {ids} --width 8 --epochs 3 --batch-size 64 --seed {seed} "
        "-q -o {out}",
        "new",
        resumes=True,
    ),
    "recommend": Command("recommend retriever{version} -q -o {out}", "new.parquet"),
    "bundle": Command("encode model1 x.npy --catalogue pub -q -o {out}", "pub", grows=True),
    "compact": Command("compact bundle{version} -o {out}", "newpub"),
    "export": Command("export {ids} --to lcrec -o {out}", "new.json"),
    "export folder": Command("export {ids} --to openonerec -o {out}", "newopen"),
}
COMPARED = {".parquet", ".safetensors", ".pt"}


def make_inputs(folder: Path) -> None:
    """Write everything that the commands read."""
    os.chdir(folder)
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(200, 16))
    x = (centers[generator.integers(0, 200, 20_000)] + generator.normal(size=(20_000, 16))).astype(
        "f4"
    )
    np.save("x.npy", x)
    Path("parts").mkdir()
    for start in range(0, 20_000, 5_000):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x[start : start + 5_000].ravel()), 16)
        table = pa.table({"item_id": np.arange(start, start + 5_000), "embedding": vectors})
        pq.write_table(table, f"parts/part-{start:06d}.parquet")
    for seed in (1, 2):
        model = semid.RQKMeans(levels=2, codebook_size=32, seed=seed).fit(x)
        model.save(f"model{seed}")
        ids = model.encode(x)
        ids.write(f"ids{seed}.parquet")
        Path(f"idsfolder{seed}").mkdir()
        for start in (0, 10_000):
            part = ids.take(np.arange(start, start + 10_000))
            part.write(f"idsfolder{seed}/part-{start:06d}.parquet")
    for seed in (1, 2):
        ids = SemanticIds.read(f"ids{seed}.parquet")
        bundle = CatalogueBundle.create(f"bundle{seed}", ids.take(np.arange(15_000)))
        bundle.append(ids)
    CatalogueBundle.create("pub", SemanticIds.read("ids1.parquet").take(np.arange(5_000)))
    pq.write_table(rank_cases.log_table(), "log.parquet")
    words = np.array(WORDS)[generator.integers(0, len(WORDS), (20_000, 5))]
    texts = {"item_id": np.arange(20_000), "text": [" ".join(row) for row in words]}
    pq.write_table(pa.table(texts), "texts.parquet")
    for seed in (1, 2):
        make_encoder(Path(f"encoder{seed}"), seed)
    users = np.repeat(np.arange(300), 8)
    walks = {"user_id": users, "item_id": generator.integers(0, 20_000, len(users))}
    pq.write_table(pa.table({**walks, "timestamp": np.arange(len(users))}), "walks.parquet")
    for seed in (1, 2):
        retriever = semid.train_retriever(
            "walks.parquet",
            ids=SemanticIds.read(f"ids{seed}.parquet"),
            options={"width": 8},
            training={"epochs": 1},
            seed=seed,
        )
        retriever.save(f"retriever{seed}")


def arguments(command: Command, version: int, *more: str) -> list[str]:
    """Return the command for one of two versions of its result."""
    text = command.text.format(
        x="x.npy",
        out=command.out,
        seed=version,
        version=version,
        model=f"model{version}",
        ids=f"ids{version}.parquet",
        idsfolder=f"idsfolder{version}",
    )
    return [*text.split(), *more]


def start(argv: list[str], log: Path) -> int:
    """Run the program in a forked process, which has imported everything already."""
    process = os.fork()
    if process:
        return process
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    code = 70
    try:
        main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, limit: float = 120.0) -> int:
    """Return the exit code; a run that hangs is killed and counts as 124."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 124


def digest(path: Path) -> str | None:
    """Identify what a command wrote, without what differs from run to run (times, names)."""
    if not path.exists():
        return None
    seen = hashlib.sha256()
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    for file in files:
        single = file == path or file.suffix in COMPARED
        if file.is_file() and single and not file.name.startswith("."):
            seen.update(str(file.relative_to(path.parent)).encode())
            seen.update(hashlib.sha256(file.read_bytes()).digest())
    return seen.hexdigest()


def names(folder: Path) -> set[str]:
    """List a folder; marks that belong to a visible file are no leftovers."""
    listed = {path.name for path in folder.iterdir()}
    return {n for n in listed if not (n.endswith(".semid") and n[1:-6] in listed)}


class Failures(list[str]):
    """What went wrong."""

    def check(self, holds: bool, what: str, log: Path | None = None) -> None:
        """Note a failure."""
        if not holds:
            words = log.read_text(errors="replace")[-300:] if log is not None else ""
            self.append(f"{what} {words}".strip())


class Bench:
    """A folder of inputs, copied for every trial, and what uninterrupted runs write."""

    def __init__(self, root: Path) -> None:
        self.inputs = root / "inputs"
        self.inputs.mkdir()
        make_inputs(self.inputs)
        self.root = root
        self.results: dict[tuple[str, int], str | None] = {}
        self.seconds: dict[str, float] = {}
        for name, command in COMMANDS.items():
            for version in (1,) if command.grows else (1, 2):
                place = self.fresh()
                began = time.monotonic()
                code = wait(start(arguments(command, version), root / "log"))
                assert code == 0, (name, (root / "log").read_text())
                self.seconds[name] = time.monotonic() - began
                self.results[name, version] = digest(place / command.out)

    def fresh(self) -> Path:
        """Return a new folder with the inputs and go there."""
        place = self.root / "place"
        os.chdir(self.root)
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.inputs, place)
        os.chdir(place)
        return place

    def kill(self, name: str, draw: random.Random, failures: Failures) -> str:
        """Kill one run at a random moment and see what is left; return what happened."""
        command, log = COMMANDS[name], self.root / "log"
        place = self.fresh()
        before = digest(place / command.out) if command.grows else None
        replace = not command.grows and draw.random() < 0.5
        new = self.results[name, 1]
        if replace:
            assert wait(start(arguments(command, 2), log)) == 0
            before = digest(place / command.out)
        inputs = {n: digest(place / n) for n in names(self.inputs) if n != command.out}
        more = ["--overwrite"] if replace else []
        process = start(arguments(command, 1, *more), log)
        time.sleep(draw.uniform(0, 1.1 * self.seconds[name]))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        time.sleep(0.02)
        after = digest(place / command.out)
        if command.grows:
            failures.check(
                CatalogueBundle("pub").read(1).items
                == SemanticIds.read("ids1.parquet").take(np.arange(5_000)).items,
                f"{name}: version 1 is not what it was",
            )
        else:
            failures.check(after in (before, new), f"{name}: neither the old nor the new output")
        partial = any(path.name.endswith(".partial") for path in place.iterdir())
        again = [*more]
        if partial and command.resumes:
            again += ["--resume"]
        if after == new and not replace and not command.grows:
            again += ["--overwrite"]
        failures.check(
            wait(start(arguments(command, 1, *again), log)) == 0, f"{name}: cannot be repeated", log
        )
        failures.check(digest(place / command.out) == new, f"{name}: another result after a kill")
        extra = names(place) - names(self.inputs) - {command.out}
        failures.check(not extra, f"{name}: left behind {sorted(extra)}")
        for n, value in inputs.items():
            failures.check(digest(place / n) == value, f"{name}: the input {n} has changed")
        if after == before:
            return "resumed" if partial else "nothing written yet"
        return "complete"

    def pair(self, name: str, draw: random.Random, failures: Failures) -> str:
        """Start two runs towards one output."""
        command = COMMANDS[name]
        place = self.fresh()
        versions = (1, 1) if command.grows else (1, 2)
        logs = [self.root / f"log{n}" for n in (0, 1)]
        processes = []
        for version, log in zip(versions, logs, strict=True):
            processes.append(start(arguments(command, version), log))
            time.sleep(draw.uniform(0, 0.3 * self.seconds[name]))
        codes = [wait(process) for process in processes]
        failures.check(0 in codes, f"{name}: neither of two runs ended well: {codes}", logs[0])
        for code, log in zip(codes, logs, strict=True):
            words = log.read_text(errors="replace")
            refused = code == 2 and "Traceback" not in words and words.count("error:") == 1
            failures.check(code == 0 or refused, f"{name}: one of two runs ended with {code}", log)
        allowed = {
            self.results[name, version]
            for version, code in zip(versions, codes, strict=True)
            if code == 0
        }
        failures.check(digest(place / command.out) in allowed, f"{name}: a mixture of two runs")
        extra = names(place) - names(self.inputs) - {command.out}
        failures.check(not extra, f"{name}: two runs left behind {sorted(extra)}")
        return "one after the other" if codes == [0, 0] else "the second refused"


def run() -> int:
    """Run the trials and print what happened."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory(prefix="semid-faults-") as root:
        bench = Bench(Path(root))
        chosen = [options.only] if options.only else list(COMMANDS)
        for kind, count in (("kill", options.kills), ("pair", options.pairs)):
            counts: Counter[str] = Counter()
            for trial in range(count):
                name = chosen[trial % len(chosen)]
                draw = random.Random(f"{options.seed} {kind} {trial}")
                failures = Failures()
                counts[getattr(bench, kind)(name, draw, failures)] += 1
                failed += bool(failures)
                for failure in failures:
                    print(f"FAILED {kind} {trial}: {failure}", flush=True)
            shown = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
            print(f"{count} {kind}s: {shown}", flush=True)
        os.chdir("/")
    print(f"{failed} trials failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run())
