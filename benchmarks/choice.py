"""BARQ's and DRQ-VAE+CL's settings on the users and items kept for selection.

    python benchmarks/choice.py ../shared/data --sets beauty toys --seeds 1

Nothing is measured on test users, so that the settings chosen here can be measured on them
afterwards (``views.py``). Every row is a line of ``barq-choice.jsonl``; the same command continues
where it was stopped, and the table is written anew.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import semid
from semid.data.ids import held_out_mask
from semid.data.interactions import SELECT, Interactions, split_users
from semid.diagnostics.pairs import ItemPairs, item_pairs
from semid.diagnostics.spaces import reconstruction
from semid.health import usage
from semid.report.behavior import Pool, measure_pairs
from semid.tokenizers.barq import BARQ
from semid.tokenizers.factory import make_tokenizer
from semid.tokenizers.stored import HELD_OUT_SALT

HERE = Path(__file__).parent
SETS = {name: f"amazon2014_{name}" for name in ("beauty", "toys", "sports")}
NO_BEHAVIOR = {"behavior_weight": 0.0}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("barq", {}),
    "weight 1": ("barq", {"behavior_weight": 1.0}),
    "weight 3": ("barq", {"behavior_weight": 3.0}),
    "two levels": ("barq", {"behavior_levels": 2}),
    "size limit .1": ("barq", {"balance_strength": 0.1}),
    "content whole": ("barq", {"content_variance": 1.0}),
    "content .85": ("barq", {"content_variance": 0.85}),
    "content .75": ("barq", {"content_variance": 0.75}),
    "no behavior": ("barq", NO_BEHAVIOR),
    "no behavior, no annealing": ("barq", {**NO_BEHAVIOR, "refine": {"annealing_rounds": 0}}),
    "no behavior, 12 rounds": ("barq", {**NO_BEHAVIOR, "refine": {"annealing_rounds": 12}}),
    "no behavior, 24 rounds at .5": ("barq", {**NO_BEHAVIOR, "refine": {"temperature": 0.5}}),
    "no behavior, 24 rounds at 2": ("barq", {**NO_BEHAVIOR, "refine": {"temperature": 2.0}}),
    "drqvae, lambda 1": ("drqvae", {"contrastive_weight": 1.0}),
}
CANDIDATES = tuple(
    name for name in SETTINGS if name.partition(",")[0] not in ("no behavior", "drqvae")
)
COLUMNS = ("error", "weighted_auc", "hr50", "retention50", "perplexity", "unique", "fit_cpu_s")
Row = dict[str, Any]


def selection_pairs(log: Interactions, ids: Any) -> ItemPairs:
    """Pair consecutive items of the users kept for selection."""
    found = log.sequences(ids).consecutive_pairs(split_users(log.user_ids) == SELECT)
    return item_pairs(found.pairs[:, 0], found.pairs[:, 1], pool=len(ids), users=found.users)


def measure(place: Path, name: str, seed: int) -> Row:
    """Fit one setting and measure it on selection data."""
    items = semid.open_embeddings(place / "embeddings.f16.npy", ids=place / "items.parquet")
    log = semid.read_interactions(place / "interactions.parquet")
    kind, options = SETTINGS[name]
    began = time.process_time()
    if kind == "barq":  # the weight is the setting's, not one that is searched for
        options = {"check_behavior": False, **options}
    tok = make_tokenizer(kind, {"seed": seed, **options})
    tok.fit(items, interactions=log if tok.needs_behavior else None)
    fitted = time.process_time() - began
    rows = items.rows(np.arange(len(items)))
    held = held_out_mask(items.ids, tok.validation_fraction, salt=HELD_OUT_SALT)
    codes = tok.encode(items).codes
    decoded = tok.decode(codes)
    spaces = {"original": rows, "decoder": decoded}
    best = "decoder"
    if isinstance(tok, BARQ) and tok.decodes_behavior:
        best = "behavior"
        spaces[best] = tok.decode_behavior(codes)
    results = measure_pairs(
        selection_pairs(log, items.ids),
        Pool(codes, tok.codebooks, spaces, hierarchical=tok.hierarchical),
        cutoffs=(50,),
        seed=0,
        replicates=20,
        threads=None,
    )
    retained = {r.name: r.above_chance[50] for r in results.retrieval.retention}
    used = usage(codes, tok.codebook_sizes[0])
    return {
        "error": reconstruction(rows[held], decoded[held], name="held out").relative_error,
        "weighted_auc": results.aucs.aucs["weighted"].value,
        "hr50": results.discrete.depths[-1].rates[50].value,
        "retention50": retained[best].value,
        "perplexity": float(np.mean([level.perplexity for level in used])),
        "unique": len(np.unique(codes, axis=0)) / len(codes),
        "fit_cpu_s": round(fitted, 1),
    }


def tables(rows: Sequence[Row]) -> str:
    """Write settings by figures, means over seeds, a table a data set."""
    lines = []
    for data in dict.fromkeys(row["data"] for row in rows):
        lines += ["", f"## {data}", "", "| | seeds | " + " | ".join(COLUMNS) + " |"]
        lines.append("| :-- | --: |" + " --: |" * len(COLUMNS))
        for name in SETTINGS:
            own = [r for r in rows if (r["data"], r["setting"]) == (data, name)]
            if own:
                cells = [f"{np.mean([r[c] for r in own]):.4g}" for c in COLUMNS]
                lines.append(f"| {name} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def left_out(rows: Sequence[Row]) -> str:
    """Write what each data set would have been given by the others alone, and how that does there.

    The score is that of BARQ's own search: hits times the share of variance that codes explain.
    """
    scores: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["setting"] in CANDIDATES:
            score = row["hr50"] * (1.0 - row["error"])
            scores.setdefault(row["data"], {}).setdefault(row["setting"], []).append(score)
    means = {d: {n: float(np.mean(v)) for n, v in own.items()} for d, own in scores.items()}
    lines = ["", "## Chosen on the other data sets", ""]
    lines += ["| left out | chosen there | its score | best here | its score | default's score |"]
    lines += ["| :-- | :-- | --: | :-- | --: | --: |"]
    for data, here in means.items():
        others = [own for name, own in means.items() if name != data]
        shared = [name for name in CANDIDATES if all(name in own for own in [here, *others])]
        if not others or "default" not in shared:
            continue
        # Relative to the default's, since data sets differ in how many pairs can be hit at all.
        chosen = max(shared, key=lambda n: np.mean([own[n] / own["default"] for own in others]))
        best = max(shared, key=here.__getitem__)
        figures = [f"{here[name]:.4f}" for name in (chosen, best, "default")]
        lines.append(f"| {data} | {chosen} | {figures[0]} | {best} | {figures[1]} | {figures[2]} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data sets")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "barq-choice.jsonl")
    given = parser.parse_args()
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = [json.loads(line) for line in lines]
    done = {(r["data"], r["setting"], r["seed"]) for r in rows}
    for seed in range(given.seeds):
        for data in given.sets:
            for name in given.settings:
                if (data, name, seed) in done:
                    continue
                row = {"data": data, "setting": name, "seed": seed}
                row |= measure(given.data / SETS[data], name, seed)
                rows.append(row)
                with given.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    text = f"# Settings on selection users and items\n{tables(rows)}\n{left_out(rows)}\n"
    given.out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
