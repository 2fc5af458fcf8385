"""Mutation testing: put single faults into the code and count those that the tests notice.

``make mutation`` draws a seeded sample of mutants, tests each with the tests that reach its line,
and prints the share killed per package with its 95 % interval. The ledger of results lies under
``build/mutation``; a run that was stopped continues from it.

The mutants are those of cosmic-ray, one change in one place, and `RemoveStatement`. Excluded:

- text (f-strings, raised messages, log calls), annotations, decorators, ``__all__``;
- sizes of blocks and tiles, and thresholds of timing (`PERFORMANCE`);
- replacements that fail by type alone, such as ``+`` by ``<<`` (`REPLACEMENTS` lists the others);
- code that needs another chip (`OTHER_CHIPS`: a GPU, AMX, AVX-512).

A mutant that exceeds its CPU time counts as killed. Equivalent mutants are not excluded.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import fcntl
import hashlib
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import coverage
import parso
import pytest
import scipy.stats
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "mutation"
PACKAGES = ("quantization", "diagnostics", "health", "data", "catalogue")
OTHER_CHIPS = re.compile(r"_?(amx|avx512|FusedInt8|FusedBfloat16)|.*engine/(gpu|x86)\.py")
PERFORMANCE = re.compile(
    r"_?(BLOCK(_ROWS)?|CHUNK(_ROWS)?|ROWS|ROW_TILE|TILE|QUERIES|PART|SCORES|PAIRS|PIECES|SCAN"
    r"|GROUP|LINE|PRODUCT_BYTES|THREADED_WORK|HASH_ROWS|PACK_ROWS|PROBE_\w+|REUSED_TABLES"
    r"|MIN_PROBED_QUERIES|DROP_RATIO)"
)
REPLACEMENTS = re.compile(
    "Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_FloorDiv|Pow_Mul|LShift_RShift|RShift_LShift"
    "|BitOr_BitAnd|BitAnd_BitOr|BitXor_BitAnd|Eq_NotEq|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt"
    "|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt|Is_IsNot|IsNot_Is|Delete_USub|Delete_Not|Delete_Invert"
)
# Tests of packages further down and of many processes: slow, and few are twins of what they call.
SKIPPED = "ray|reproduce|rank_|report|docs|training|compare|architecture|vae|export|encode|cli.py"
# Imported once, before the forks.
PRELOADED = ("numpy", "numba", "torch", "pyarrow.parquet", "pandas", "polars", "sklearn.cluster")
PRELOADED += ("hypothesis", "plotly.graph_objects", "typer", "rich.console", "fsspec", "faiss")
TEST_SECONDS = 20.0  # tests per mutant, those that name the module first
CPU_SECONDS = 20  # start and compilation of a mutant; its tests add three times what they take
MEMORY = 3 << 30

Mutant = dict[str, Any]


class RemoveStatement(Operator):
    """Replace a call, or an assignment to something that exists already, by ``pass``."""

    def mutation_positions(self, node):
        """Yield the places of such statements."""
        if node.parent is not None and node.parent.type == "simple_stmt":
            assignment = node.type == "expr_stmt"
            target = node.children[0].type if assignment else node.type
            operator = getattr(node.children[1], "value", "=") if assignment else "="
            if target in ("atom_expr", "power") or (target == "name" and operator != "="):
                yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        """Return ``pass`` in the place of the statement."""
        prefix = node.get_first_leaf().prefix
        return parso.python.tree.Keyword("pass", node.start_pos, prefix=prefix)

    @classmethod
    def examples(cls):
        """Return no examples."""
        return ()


def operators() -> dict[str, Operator]:
    """Return the mutation operators by name."""
    provider = OperatorProvider()
    chosen = {"RemoveStatement": RemoveStatement()}
    for name in provider:
        if name.startswith("Replace") and "Operator_" in name:
            usable = REPLACEMENTS.fullmatch(name.split("_", 1)[1])
        else:
            usable = not provider[name].arguments() and name != "RemoveDecorator"
        if usable:
            chosen[name] = provider[name]()
    return chosen


OPERATORS = operators()


def excluded_spans(tree: ast.Module) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return start and end of everything that the rules exclude."""
    nodes: list[Any] = []
    for node in ast.walk(tree):
        nodes += getattr(node, "decorator_list", [])
        nodes += filter(None, (getattr(node, name, None) for name in ("annotation", "returns")))
        text = isinstance(node, (ast.JoinedStr, ast.Raise))
        if isinstance(node, ast.Expr):
            text = re.match(r"(logger|warnings)\.", ast.unparse(node)) is not None
        typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        other = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and OTHER_CHIPS.match(node.name)
        if text or typing or other:
            nodes.append(node)
    for node in tree.body:
        if isinstance(node, ast.Assign):
            name = ast.unparse(node.targets[0])
            union = isinstance(node.value, ast.BinOp) and isinstance(node.value.op, ast.BitOr)
            if union or name == "__all__" or PERFORMANCE.fullmatch(name):
                nodes.append(node)
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def key(mutant: Mutant) -> tuple[str, int, str, int]:
    """Return what tells a mutant from every other."""
    return (mutant["path"], mutant["line"], mutant["operator"], mutant["occurrence"])


def mutants_of(path: Path) -> list[Mutant]:
    """List the mutants of a file, without their code."""
    text = path.read_text(encoding="utf8")
    spans = excluded_spans(ast.parse(text))
    nodes = list(ast_nodes(get_ast(text)))
    mutants = []
    for name, operator in OPERATORS.items():
        places = ((node, start) for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, (node, place) in enumerate(places):
            marker = node.parent is not None and node.parent.type == "parameters"  # f(*, x)
            if not marker and not any(start <= place < end for start, end in spans):
                where = {"path": str(path.relative_to(ROOT)), "line": place[0]}
                mutants.append({**where, "operator": name, "occurrence": occurrence})
    return mutants


def draw(package: str, size: int, seed: int) -> list[Mutant]:
    """Draw about ``size`` mutants that compile, from each file in proportion to its mutants.

    Each mutant has a random number of its own, so a change to one file redraws nothing elsewhere.
    """
    paths = sorted((ROOT / "src/semid" / package).rglob("*.py"))
    by_path = {path: mutants_of(path) for path in paths if not OTHER_CHIPS.match(str(path))}
    total = sum(map(len, by_path.values()))
    sample = []
    for path, mutants in by_path.items():
        text = path.read_text(encoding="utf8")
        chance = random.Random(f"{seed} {path.name}").random()
        count = round(size * len(mutants) / total + chance - 0.5)
        for mutant in sorted(mutants, key=lambda m: random.Random(f"{seed} {key(m)}").random()):
            if count <= 0:
                break
            # Not every change is valid Python, and cosmic-ray does not know `except (a.B, C)`.
            with contextlib.suppress(SyntaxError, AttributeError):
                code = mutate_code(text, OPERATORS[mutant["operator"]], mutant["occurrence"])
                compile(code, "", "exec")
                lines = zip(text.splitlines(), code.splitlines(), strict=False)
                change = next([a.strip(), b.strip()] for a, b in lines if a != b)
                sample.append({**mutant, "change": change, "code": code})
                count -= 1
    return sample


def measure_coverage() -> None:
    """Run the tests under coverage, unless the last run was over the same files."""
    files = sorted(p for name in ("src", "tests") for p in (ROOT / name).rglob("*.py"))
    state = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    stamp, report = WORK / "state.sha256", WORK / "junit.xml"
    if stamp.exists() and stamp.read_text() == state:
        return
    tests = [str(p) for p in sorted(ROOT.glob("tests/test_*.py")) if not re.search(SKIPPED, p.name)]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--cov", "--cov-context=test"]
    command += ["--cov-report=", f"--junitxml={report}", *tests]
    environment = {"COVERAGE_FILE": str(WORK / "coverage"), "COVERAGE_CORE": "ctrace"}
    environment["PYTHONPATH"] = str(ROOT / "src")
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)
    stamp.write_text(state)


class Reach:
    """Which tests reach a line, and what imports what."""

    def __init__(self) -> None:
        data = coverage.CoverageData(str(WORK / "coverage"))
        data.read()
        self.lines: dict[str, dict[int, set[str]]] = {}
        for path in data.measured_files():
            contexts = data.contexts_by_lineno(path).items()
            self.lines[str(Path(path).relative_to(ROOT))] = {
                line: {name.removesuffix("|run") for name in names if name.endswith("|run")}
                for line, names in contexts
            }
        self.seconds: dict[str, float] = defaultdict(lambda: 1.0)
        for case in ElementTree.parse(WORK / "junit.xml").iter("testcase"):
            file = f"{case.attrib['classname'].replace('.', '/')}.py"
            self.seconds[f"{file}::{case.attrib['name']}"] = float(case.attrib["time"])
        self.texts = {p.name: p.read_text(encoding="utf8") for p in ROOT.glob("tests/test_*.py")}
        self.imports = {path: self._imported(path) for path in self.lines}

    @staticmethod
    def _imported(path: str) -> set[str]:
        names = set()
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom):
                names |= {f"{node.module}", *(f"{node.module}.{name.name}" for name in node.names)}
        return {f"src/{name.replace('.', '/')}.py" for name in names}

    def importers(self, path: str) -> set[str]:
        """Return the files that import ``path``, itself included, however indirectly."""
        reached, new = set(), {path}
        while new:
            reached |= new
            new = {p for p, imported in self.imports.items() if imported & new} - reached
        return reached

    def tests(self, path: str, line: int) -> list[str]:
        """Return the tests of a line, then others of its module, up to `TEST_SECONDS`.

        Coverage does not tell the tests of code that numba compiles, and of what runs once: at the
        import, in a fixture, or behind a cache.
        """
        bodies = [
            node.body[0] if isinstance(node.body, list) else node.body
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf8")))
            if isinstance(node, (ast.FunctionDef, ast.Lambda))
            and node.lineno <= line <= (node.end_lineno or 0)
        ]
        inside = any(first.lineno <= line for first in bodies)
        line_tests = self.lines.get(path, {}).get(line, set()) if inside else set()
        module_tests: set[str] = set()
        paths = {path}
        for _ in range(2):  # the module and what imports it
            paths |= {p for p, imported in self.imports.items() if imported & paths}
            module_tests = module_tests.union(
                *(t for p in paths for t in self.lines.get(p, {}).values())
            )
            if module_tests:
                break
        parts = path.removeprefix("src/").removesuffix(".py").split("/")
        names = [".".join(parts[:depth]) for depth in range(2, len(parts) + 1)]

        def rank(test: str) -> tuple[bool, int, float, str]:
            text = self.texts[Path(test.split("::")[0]).name]
            named = sum(name in text for name in names)
            return (test not in line_tests, -named, self.seconds[test], test)

        chosen, total = [], 0.0
        for test in sorted(line_tests | module_tests, key=rank):
            total += self.seconds[test]
            if chosen and total > TEST_SECONDS:
                break
            chosen.append(test)
        return chosen


class Slot:
    """A copy of the tree in which one mutant at a time is tested, by a forked process."""

    def __init__(self, number: int, reach: Reach) -> None:
        self.root, self.reach = WORK / f"tree-{number}", reach
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir(parents=True)
        for path in ROOT.iterdir():
            if path.name in ("src", "tests"):
                shutil.copytree(path, self.root / path.name)
            elif path.name[0] != "." and path.name not in ("build", "dist"):
                (self.root / path.name).symlink_to(path)
        compileall.compile_dir(self.root, quiet=1)
        # Compiled kernels of the code as it is, and those of the mutant.
        self.cache, self.kernels = WORK / f"kernels-{number}", WORK / f"kernels-{number}-mutant"
        self.cache.mkdir(exist_ok=True)
        self.pid = 0

    def start(self, mutant: Mutant) -> None:
        """Write the mutant and test it in a new process."""
        tests = self.reach.tests(mutant["path"], mutant["line"])
        self.mutant, self.source = mutant, self.root / mutant["path"]
        self.original, self.times = self.source.read_bytes(), self.source.stat()
        self.source.write_text(mutant["code"], encoding="utf8")
        # numba looks at the file of a kernel and not at what it calls: every importer is stale.
        stale = {Path(path).stem for path in self.reach.importers(mutant["path"])}
        self.ignore = lambda _, names: [n for n in names if "." in n and n.split(".")[0] in stale]
        shutil.rmtree(self.kernels, ignore_errors=True)
        shutil.copytree(self.cache, self.kernels, ignore=self.ignore)
        self.began = time.monotonic()
        self.limit = CPU_SECONDS + 3 * int(sum(self.reach.seconds[test] for test in tests))
        self.pid = os.fork()
        if not self.pid:
            try:
                os._exit(self._test(tests))
            except BaseException:  # noqa: BLE001 - whatever the mutant raises
                os._exit(99)

    def _test(self, tests: list[str]) -> int:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (self.limit, self.limit))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        output = os.open(self.root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(self.root)
        sources = str(self.root / "src")
        os.environ |= {"PYTHONPATH": sources, "NUMBA_CACHE_DIR": str(self.kernels)}
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # changes within a second look alike to Python
        os.environ.setdefault("SEMID_DATA", str(ROOT.parent / "shared" / "data"))
        sys.dont_write_bytecode = True
        importlib.import_module("numba").config.CACHE_DIR = str(self.kernels)
        sys.path[0] = sources
        options = "-xq --tb=no --assert=plain --hypothesis-seed=0 -p no:cacheprovider -p no:xdist "
        options += f"-p no:cov --rootdir={self.root}"
        return int(pytest.main([*options.split(), *tests]))

    def result(self) -> Mutant | None:
        """Return the mutant with its outcome once there is one; the file is as it was."""
        pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        if not pid and time.monotonic() - self.began < 10 * self.limit:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if not pid:
            _, status, usage = os.wait4(self.pid, 0)
        self.pid = 0
        self.source.write_bytes(self.original)
        os.utime(self.source, ns=(self.times.st_atime_ns, self.times.st_mtime_ns))
        shutil.copytree(self.kernels, self.cache, ignore=self.ignore, dirs_exist_ok=True)
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
        outcome = "timeout" if late else "killed" if status else "survived"
        output = (self.root / "output.txt").read_text(errors="replace")
        by = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)[:1]
        seconds = round(usage.ru_utime + usage.ru_stime, 1)
        mutant = {name: value for name, value in self.mutant.items() if name != "code"}
        return {**mutant, "outcome": outcome, "by": by, "cpu_seconds": seconds}


def show(results: list[Mutant]) -> None:
    """Print the survivors, and the share killed per package."""
    for result in sorted(results, key=key):
        if result["outcome"] == "survived":
            place = f"{result['path']}:{result['line']} {result['operator']}"
            print(place, *result["change"], sep="\n    ")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        for name in (result["path"].split("/")[2], "all"):
            counts[name][result["outcome"]] += 1
    print(f"\n{'package':12} mutants killed timeout survived  share  95 % interval")
    for name in (*PACKAGES, "all"):
        if total := counts[name].total():
            killed, late = counts[name]["killed"], counts[name]["timeout"]
            share = scipy.stats.binomtest(killed + late, total).proportion_ci(method="wilson")
            numbers = f"{total:7} {killed:6} {late:7} {total - killed - late:8}"
            numbers += f"  {(killed + late) / total:5.1%}"
            print(f"{name:12} {numbers}  {share.low:.1%} to {share.high:.1%}")


def main() -> None:
    """Draw, test and count."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=60, help="Number of mutants per package.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the draw.")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="Mutants tested at once.")
    parser.add_argument("--again", action="store_true", help="Test the survivors again.")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    lock = (WORK / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # a second run waits: both would write to the same trees
    measure_coverage()
    sample = [m for name in PACKAGES for m in draw(name, arguments.size, arguments.seed)]
    random.Random(arguments.seed).shuffle(sample)
    ledger = WORK / f"ledger-{arguments.seed}.jsonl"
    lines = ledger.read_text(encoding="utf8").splitlines() if ledger.exists() else []
    results = {(key(r), *r["change"]): r for r in map(json.loads, lines)}
    if arguments.again:
        results = {k: r for k, r in results.items() if r["outcome"] != "survived"}
    waiting = [m for m in sample if (key(m), *m["change"]) not in results]
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    reach = Reach()
    slots = [Slot(number, reach) for number in range(arguments.jobs)]
    while waiting or any(slot.pid for slot in slots):
        time.sleep(0.3)
        for slot in slots:
            if slot.pid and (result := slot.result()):
                results[(key(result), *result["change"])] = result
                with ledger.open("a", encoding="utf8") as file:
                    file.write(json.dumps(result) + "\n")
                print(f"{len(waiting)} left:", result["outcome"], *key(result), flush=True)
            if not slot.pid and waiting:
                slot.start(waiting.pop(0))
    show([results[key(mutant), *mutant["change"]] for mutant in sample])


if __name__ == "__main__":
    main()
