"""Fit and encode a memory map far larger than memory: seconds, peak memory, how both grow.

    python benchmarks out_of_core --rows 1000000 3000000 5000000 15000000
    python benchmarks out_of_core --rows 1000000 --refine-rounds 2

Rows are perturbed copies of the union catalogue's first principal components: a row drawn at
random plus noise of the data's own covariance. The table says how far their relative error at equal
K is from that of the real rows (one level, fitted on as many rows, measured on others): data that
quantize better would flatter every screening trick. Codebooks are fitted on 256 rows a codeword,
then every row is encoded to Parquet. Refinement, if asked for, is joint and of all rows, by a beam
of 8 and without annealing. Every size is a process of its own; memory is what it holds beyond the
files it maps, sampled ten times a second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import save, union_rows

NOISE = 0.22
"""Standard deviation of the noise as a share of the data's, direction by direction."""
BLOCK = 65_536


def perturbed(base: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Draw ``(rows, dim)`` perturbed copies; ``base`` lies on its principal axes, centered."""
    chosen = torch.randint(len(base), (rows,), generator=generator)
    noise = torch.randn(rows, base.shape[1], generator=generator) * (NOISE * base.std(0))
    made: torch.Tensor = (base[chosen] + noise) / (1 + NOISE**2) ** 0.5
    return made


def write(path: Path, rows: int, dim: int) -> None:
    """Write the memory map, float16, block by block."""
    base = union_rows(dim)
    file = np.lib.format.open_memmap(path, "w+", np.float16, (rows, dim))
    generator = torch.Generator().manual_seed(0)
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        file[start : start + count] = perturbed(base, count, generator).half().numpy()
    file.flush()


def error_gap(dim: int, codes: int) -> float:
    """Return how much larger the copies' relative error is than the real rows', as a share."""
    from semid.quantization.blocks import ArrayBlocks
    from semid.quantization.kmeans import KMeansOptions, kmeans
    from semid.quantization.nearest import nearest

    base = union_rows(dim)
    copies = perturbed(base, len(base), torch.Generator().manual_seed(1))
    errors = []
    for rows in (base, copies):
        half = len(rows) // 2
        book = kmeans(
            ArrayBlocks(rows[:half].numpy()), codes, seed=0, options=KMeansOptions(max_iter=5)
        ).centroids
        rest = rows[half:].contiguous()
        spread = float((rest - rest.mean(0)).double().square().sum())
        errors.append(
            float(nearest(rest, torch.from_numpy(book)).distances.double().sum()) / spread
        )
    return errors[1] / errors[0] - 1


class Memory:
    """The most anonymous memory this process held, beyond what it held at the start."""

    def __init__(self) -> None:
        self.start = self.most = self._now()
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text(encoding="utf8").splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        return 0

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self.most = max(self.most, self._now())


class Clock:
    """Progress of a fit, as the seconds of its stages."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self._name, self._since = "start", time.perf_counter()

    def start(self, task: str, *, total: int | None = None) -> None:
        """Begin a stage."""
        now = time.perf_counter()
        self.stages[self._name] = self.stages.get(self._name, 0.0) + now - self._since
        self._name, self._since = task, now

    def step(self, done: int = 1, **fields: Any) -> None:
        """Count nothing."""

    def close(self) -> None:
        """End nothing."""


def one(path: Path, rows: int, given: argparse.Namespace) -> dict[str, Any]:
    """Fit and encode the first ``rows`` rows of the map."""
    import semid
    from semid.tokenizers.encoding import encode_to_parquet

    memory, clock = Memory(), Clock()
    x = np.load(path, mmap_mode="r")[:rows]
    began, cpu = time.perf_counter(), time.process_time()
    tokenizer = semid.RQKMeans(
        levels=3,
        codebook_size=given.codes,
        kmeans={
            "max_iter": given.iterations,
            "sample_per_code": given.sample,
            "full_pass": False,
        },
    )
    tokenizer.fit(x, progress=clock)
    clock.start("end")
    fitted = time.perf_counter()
    target = path.with_name(f"ids-{rows}.parquet")
    encode_to_parquet(tokenizer, x, target, overwrite=True)
    done = time.perf_counter()
    target.unlink()
    peak = memory.most
    spent = time.process_time() - cpu
    report = tokenizer.report
    assert report is not None
    refined = refinement(tokenizer, x, given.refine_rounds) if given.refine_rounds else {}
    training = sum(took for name, took in clock.stages.items() if name.startswith("level"))
    return {
        "rows": rows,
        "read s": clock.stages["read"],
        "train s": training,
        "judge s": clock.stages["evaluate"],
        "encode s": done - fitted,
        "train + encode min": (training + clock.stages["read"] + done - fitted) / 60,
        "all min": (done - began) / 60,
        "CPU min": spent / 60,
        "thousand rows/s encoded": rows / (done - fitted) / 1000,
        "peak GB": peak / 1e9,
        "error held out": report.validation_error,
        **refined,
    }


def refinement(tokenizer: Any, x: Any, rounds: int) -> dict[str, Any]:
    """Refine all levels on all rows; return what the rounds take and bring."""
    import semid

    memory, clock = Memory(), Clock()
    options = semid.RefineOptions(rounds=rounds, annealing_rounds=0, tolerance=0.0)
    report = semid.refine(tokenizer, x, options=options, progress=clock).report
    assert report is not None
    clock.start("end")
    kept = report.details["refine"]
    return {
        "refine s": clock.stages["refine"],
        "rounds kept": len(kept),
        "error lower by": f"{1 - kept[-1]['error'] / kept[0]['before']:.1%}" if kept else "",
        "peak GB of refining": memory.most / 1e9,
    }


def main() -> None:
    """Write the map once, run every size in its own process, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 3_000_000])
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--sample", type=int, default=256, help="training rows a codeword")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--refine-rounds", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the map; default: a temporary one")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(one(given.folder / "rows.npy", given.one, given)))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        path = Path(place) / "rows.npy"
        write(path, max(given.rows), given.dim)
        lines = []
        for rows in given.rows:
            command = [sys.executable, __file__, "--one", str(rows), "--folder", place]
            for name in ("dim", "codes", "sample", "iterations", "refine-rounds"):
                command += [f"--{name}", str(getattr(given, name.replace("-", "_")))]
            found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            lines.append(json.loads(found.stdout.splitlines()[-1]))
            print(json.dumps(lines[-1]), flush=True)
    gap = error_gap(given.dim, given.codes)
    settings = {name: value for name, value in vars(given).items() if name not in ("one", "folder")}
    save(
        "out_of_core-refined" if given.refine_rounds else "out_of_core",
        lines,
        settings=settings,
        packages=(),
        note=(
            f"The copies' relative error at one level is {gap:+.1%} of the real rows'. Every row "
            "is encoded twice: once to judge the fit, once to write the ids."
        ),
    )


if __name__ == "__main__":
    main()
