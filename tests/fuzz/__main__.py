"""The long fuzz run: ``python tests/fuzz --examples 20000 --processes 2``, or one case by name.

The cases run in worker processes that name each case before they begin it, so that a case that
ends or stops its process is known, and the run goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from fuzzing import FAILURES, HANG, OUTCOMES, RAW, Outcome

SECONDS = 20.0  # of CPU time
SILENCE = 120.0  # of wall time, after which a process that waits for ever is stopped
CASES_PER_PROCESS = 1500  # a fresh process now and then: memory that leaks is given back


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("case", nargs="*", help="cases to run alone, as npy:0:17")
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--generators", help="only these, with commas")
    parser.add_argument("--output", type=Path, help="JSON file for the failures")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(*options.worker)
        return
    with tempfile.TemporaryDirectory(prefix="semid-fuzz-") as folder:
        base = Path(folder)
        from bench import make_bench

        made = make_bench(base / "bench")
        if options.case:
            show(options.case, made, base)
            return
        from generators import case_names

        names = case_names(options.examples, options.seed)
        if options.generators:
            chosen = options.generators.split(",")
            names = [name for name in names if name.partition(":")[0] in chosen]
        began = time.monotonic()
        outcomes = run_all(names, base, options.processes)
        seconds = time.monotonic() - began
    say(table(outcomes))
    say(f"{len(outcomes)} cases in {seconds:.0f} s")
    failures = [o for o in outcomes if o.verdict in FAILURES]
    say(kinds(failures))
    if options.output:
        options.output.write_text(json.dumps([asdict(o) for o in failures], indent=1) + "\n")
    sys.exit(bool(failures))


def say(text: str) -> None:
    """Write a line to standard output."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show(names: list[str], bench: Any, base: Path) -> None:
    """Run single cases and print everything about them."""
    from fuzzing import run_case
    from generators import GENERATORS

    for name in names:
        outcome = run_case(GENERATORS, name, bench, base, seconds=SECONDS)
        say(f"{name}: {outcome.verdict} {outcome.kind}\n{outcome.text}\n{outcome.detail}")


def work(plan: Path, bench: Path) -> None:
    """Run the cases that a file names, and report each before and after on standard output."""
    out = os.fdopen(os.dup(1), "w", encoding="utf8")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    from bench import Bench, warm_up
    from fuzzing import run_case
    from generators import GENERATORS

    made = Bench(bench)
    warm_up(made, plan.with_suffix(""))
    for name in json.loads(plan.read_text(encoding="utf8")):
        out.write(json.dumps({"name": name}) + "\n")
        out.flush()
        began = time.monotonic()
        outcome = run_case(GENERATORS, name, made, plan.with_suffix(""), seconds=SECONDS)
        done = {**asdict(outcome), "seconds": time.monotonic() - began}
        out.write(json.dumps(done) + "\n")
        out.flush()


class Worker:
    """One process and the cases it has left."""

    def __init__(self, number: int, names: list[str], base: Path) -> None:
        self.number, self.names, self.base = number, names, base
        self.process: subprocess.Popen[bytes] | None = None
        self.current: str | None = None
        self.since = time.monotonic()
        self.buffer = b""
        self.start()

    def start(self) -> None:
        """Begin a process with the next cases."""
        plan = self.base / f"worker-{self.number}.json"
        plan.write_text(json.dumps(self.names[:CASES_PER_PROCESS]), encoding="utf8")
        command = [sys.executable, str(Path(__file__).parent), "--worker", str(plan)]
        import semid

        here = {**os.environ, "PYTHONPATH": str(Path(semid.__file__).parents[1])}
        self.process = subprocess.Popen(
            [*command, str(self.base / "bench")], stdout=subprocess.PIPE, cwd=self.base, env=here
        )
        self.current, self.since, self.buffer = None, time.monotonic(), b""

    def lines(self) -> list[dict[str, Any]] | None:
        """Return what the process said, or None when it has ended."""
        assert self.process is not None
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 20)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None


def run_all(names: list[str], base: Path, processes: int) -> list[Outcome]:
    """Run all cases; one that takes its process with it is counted, and the next one begun."""
    outcomes: list[Outcome] = []
    slow: Counter[str] = Counter()
    selector = selectors.DefaultSelector()
    workers = [Worker(n, names[n::processes], base) for n in range(processes)]

    def watch(worker: Worker) -> None:
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore

    def ended(worker: Worker, why: str = "") -> None:
        assert worker.process is not None
        assert worker.process.stdout is not None
        selector.unregister(worker.process.stdout)
        worker.process.stdout.close()
        code = worker.process.wait()
        if worker.current is not None:
            name, verdict = worker.current, HANG if why else RAW
            kind = why or f"the process ended with code {code}"
            outcomes.append(Outcome(name, verdict, kind, "", ""))
            worker.names = worker.names[worker.names.index(name) + 1 :]
        elif code:
            sys.exit(f"a fuzz process ended with code {code} between two cases")
        if worker.names:
            worker.start()
            watch(worker)

    for worker in workers:
        watch(worker)
    said = time.monotonic()
    while selector.get_map():
        for key, _ in selector.select(timeout=1.0):
            worker = key.data
            lines = worker.lines()
            if lines is None:
                ended(worker)
                continue
            for line in lines:
                worker.since = time.monotonic()
                if "verdict" not in line:
                    worker.current = line["name"]
                    continue
                slow[line["name"].partition(":")[0]] += int(1000 * line.pop("seconds"))
                outcomes.append(Outcome(**line))
                if outcomes[-1].verdict in FAILURES:
                    say(f"{outcomes[-1].name}: {outcomes[-1].verdict}: {outcomes[-1].kind}")
                worker.names = worker.names[1:]
                worker.current = None
        for key in list(selector.get_map().values()):
            worker = key.data
            if worker.current and time.monotonic() - worker.since > SILENCE:
                worker.process.kill()
                ended(worker, "the process does not answer")
        if time.monotonic() - said > 30:
            said = time.monotonic()
            bad = sum(o.verdict in FAILURES for o in outcomes)
            say(f"{len(outcomes)} of {len(names)} cases, {bad} failures")
    say(
        "milliseconds per case: "
        + ", ".join(
            f"{name} {ms // max(1, sum(o.name.startswith(name + ':') for o in outcomes))}"
            for name, ms in slow.most_common()
        )
    )
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Return the counts of verdicts by generator."""
    counts = Counter((o.name.partition(":")[0], o.verdict) for o in outcomes)
    names = sorted({name for name, _ in counts})
    lines = ["".join([f"{'generator':18}", *(f"{v:>18}" for v in OUTCOMES)])]
    for name in names:
        lines.append("".join([f"{name:18}", *(f"{counts[name, v]:18}" for v in OUTCOMES)]))
    totals = [sum(counts[name, v] for name in names) for v in OUTCOMES]
    return "\n".join([*lines, "".join([f"{'all':18}", *(f"{t:18}" for t in totals)])])


def kinds(failures: list[Outcome]) -> str:
    """Return each kind of failure once, the most frequent first, with its first case."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in failures:
        groups.setdefault((outcome.verdict, outcome.kind), []).append(outcome)
    lines = []
    for (verdict, kind), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        first = members[0]
        lines.append(f"{len(members):5} {verdict}: {kind}")
        lines.append(f"      python tests/fuzz {first.name}   {first.text[:150]!r}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
