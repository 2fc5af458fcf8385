"""What evens out BARQ's usage, and what its behavior head retains, on selection users and items.

    python benchmarks/evenness.py ../shared/data --sets beauty toys sports --seeds 3

Each data set and seed has one fit without refinement, from which every setting is refined, so that
all have the same encoder and K-means codebooks. The settings are those of annealing: its rounds,
and below which share of the mean size a codeword moves beside a frequent one. Plain and balanced
RQ-KMeans and RQP-VAE stand beside them. Errors are on held-out items, and on all items before and
after ``semid unique --method reassign`` has given each an id of its own; hits are on users kept for
selection, flips on a third of the items. Every row is a line of ``evenness.jsonl``; the same
command continues where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

import semid
from choice import SETS, selection_pairs
from semid.data.ids import held_out_mask
from semid.diagnostics.discrete import discrete_ranks
from semid.diagnostics.flips import flip_rates, latent_std
from semid.diagnostics.retrieval import neighbor_ranks
from semid.diagnostics.spaces import reconstruction
from semid.health import usage
from semid.quantization import refine
from semid.quantization.residual import dequantize
from semid.tokenizers.barq_head import train_tables
from semid.tokenizers.behavior import read_behavior
from semid.tokenizers.factory import make_tokenizer
from semid.tokenizers.stored import HELD_OUT_SALT

HERE = Path(__file__).parent
CUTOFF = 50
SETTINGS = {
    f"BARQ, {rounds} rounds, below {share:g}": (share, rounds)
    for share, rounds in ((0.0, 12), (0.0, 24), (0.2, 24), (0.3, 24))
}
"""Share of the mean size below which codewords move, and rounds of annealing."""
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "RQ-KMeans": ("rqkmeans", {}),
    "RQ-KMeans, balanced softly": ("rqkmeans", {"balance": {"mode": "soft", "strength": 0.3}}),
    "RQ-KMeans, balanced hard": ("rqkmeans", {"balance": {"mode": "hard"}}),
    "RQP-VAE": ("rqpvae", {}),
}
COLUMNS = (
    *("error", "perplexity", "unique", "flips", "all_error", "unique_error"),
    *("hr50", "head", "trained_head", "encoder"),
)
Row = dict[str, Any]


class Catalogue:
    """A data set with what its ids are measured on."""

    def __init__(self, place: Path) -> None:
        self.items = semid.open_embeddings(
            place / "embeddings.f16.npy", ids=place / "items.parquet"
        )
        self.log = semid.read_interactions(place / "interactions.parquet")
        self.rows = self.items.rows(np.arange(len(self.items)))
        self.held_out = held_out_mask(self.items.ids, 0.05, salt=HELD_OUT_SALT)
        self.pairs = selection_pairs(self.log, self.items.ids)
        self.behavior = read_behavior(
            self.log, None, ids=self.items.ids, train=~self.held_out, threads=None
        )
        self.hits = self._hits(self.rows)

    def _hits(self, vectors: np.ndarray) -> float:
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        chance = CUTOFF / (len(self.rows) - 1)
        return float((neighbor_ranks(vectors, self.pairs, depth=CUTOFF) < CUTOFF).mean()) - chance

    def retention(self, vectors: np.ndarray) -> float:
        """Return hits above chance over those of the embeddings."""
        return self._hits(vectors) / self.hits

    def measure(self, tok: Any) -> Row:
        """Measure ids."""
        ids = tok.encode(self.items)
        codes = ids.codes
        decoded = tok.decode(codes)
        own = semid.make_unique(ids, method="reassign", tokenizer=tok, embeddings=self.items).ids
        flips = flip_rates(
            self.rows[::3],
            lambda x: tok.encode(x).codes,
            space="input",
            scales=(0.2,),
            unit=latent_std(self.rows),
        )
        held_out = self.held_out
        error = reconstruction(self.rows[held_out], decoded[held_out], name="held out")
        levels = usage(codes, tok.codebook_sizes[0])
        ranks = discrete_ranks(codes, self.pairs, hierarchical=True)
        return {
            "error": error.relative_error,
            "perplexity": fmean(level.perplexity for level in levels),
            "unique": len(np.unique(codes, axis=0)) / len(codes),
            "flips": flips.points[0].prefix[-1].value,
            "all_error": reconstruction(self.rows, decoded, name="all").relative_error,
            "unique_error": reconstruction(
                self.rows, tok.decode(own.codes), name="unique"
            ).relative_error,
            "hr50": float(ranks.expected_hits(CUTOFF).mean()),
        }

    def measure_heads(self, tok: semid.BARQ, seed: int) -> Row:
        """Measure the head of least squares, one trained from it, and the encoder as it is."""
        codes = tok.encode(self.items).codes.astype(np.int64)
        assert self.behavior is not None
        tables, losses = train_tables(
            tok._tables["behavior"],
            codes[~self.held_out],
            self.behavior,
            temperature=tok._objective().temperature,
            seed=seed,
        )
        directions = tok._blend.directions(tok._preprocess.apply(self.rows))
        return {
            "head": self.retention(tok.decode_behavior(codes)),
            "trained_head": self.retention(dequantize(codes, tables)),
            "encoder": self.retention(directions),
        } | losses


def run(catalogue: Catalogue, seed: int, done: set[str]) -> Any:
    """Yield the rows that are missing of one data set and seed."""
    for name, (kind, options) in PEERS.items():
        if name not in done:
            tok = make_tokenizer(kind, {"seed": seed, **options}).fit(catalogue.items)
            yield {"setting": name, **catalogue.measure(tok)}
    missing = [name for name in SETTINGS if name not in done]
    if not missing:
        return
    plain = semid.BARQ(seed=seed, check_behavior=False, refine={"rounds": 0})
    plain.fit(catalogue.items, interactions=catalogue.log)
    for name in missing:
        refine.MOVE_BELOW, rounds = SETTINGS[name]
        began = time.process_time()
        tok = semid.refine(
            plain, catalogue.items, options=semid.RefineOptions(annealing_rounds=rounds)
        )
        cost = {"refine_cpu_s": round(time.process_time() - began, 1)}
        yield (
            {"setting": name} | catalogue.measure(tok) | catalogue.measure_heads(tok, seed) | cost
        )


def table(rows: list[Row]) -> str:
    """Write settings by figures, means over seeds, a table a data set."""
    lines = ["# Even usage, and heads into behavior, on selection users and held-out items"]
    for data in dict.fromkeys(row["data"] for row in rows):
        lines += ["", f"## {data}", "", "| | seeds | " + " | ".join(COLUMNS) + " |"]
        lines.append("| :-- | --: |" + " --: |" * len(COLUMNS))
        for name in (*PEERS, *SETTINGS):
            own = [r for r in rows if (r["data"], r["setting"]) == (data, name)]
            cells = [
                f"{fmean(r[c] for r in own):.4g}" if own and c in own[0] else "" for c in COLUMNS
            ]
            if own:
                lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "evenness.jsonl")
    given = parser.parse_args()
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = [json.loads(line) for line in lines]
    for seed in range(given.seeds):
        for data in given.sets:
            done = {r["setting"] for r in rows if (r["data"], r["seed"]) == (data, seed)}
            if done >= {*PEERS, *SETTINGS}:
                continue
            for row in run(Catalogue(given.data / SETS[data]), seed, done):
                rows.append({"data": data, "seed": seed, **row})
                with given.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), flush=True)
    text = table(rows)
    given.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
