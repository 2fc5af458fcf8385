"""Recommending from a large catalogue: CPU time per user and peak memory of each model.

    python benchmarks/recommend.py --items 10000000 --models parallel generative composed

Codes are random, of as many levels and codewords as asked for, and the models are not trained:
their time does not depend on what they have learned. Histories have 20 items. No peer has these
models for catalogues of this size, so there is no ratio.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from common import save
from semid.data.ids import ItemIds
from semid.data.sequences import Sequences
from semid.recommenders.retrieval import MODELS
from semid.recommenders.retrieval.data import RetrievalItems
from semid.recommenders.retrieval.networks import make_model
from semid.recommenders.retrieval.retriever import Retriever


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--codes", type=int, default=2048)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["parallel", "generative", "composed"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = np.random.default_rng(0)
    sizes = (options.codes,) * options.levels
    codes = generator.integers(0, options.codes, (options.items, options.levels))
    counts = generator.integers(1, 100, options.items)
    items = RetrievalItems(ItemIds.range(options.items), counts, codes, sizes)
    histories = list(generator.integers(0, options.items, (options.users, 20)))
    nobody = Sequences(ItemIds([]).strings(), np.zeros(1, np.int64), np.zeros(0, np.int32))
    rows = []
    for name in options.models:
        began = time.process_time()
        chosen = MODELS.load(name).options.of(None)
        network = make_model(name, items, chosen, seed=0)
        model = Retriever(
            model=name, options=chosen, network=network, items=items, sequences=nobody
        )
        list(model.recommend_rows(histories[:2], options.k))  # what is made once
        ready = time.process_time()
        list(model.recommend_rows(histories, options.k))
        seconds = time.process_time() - ready
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(
            {
                "model": name,
                "ms_per_user": 1000 * seconds / options.users,
                "setup_s": ready - began,
                "peak_gib": peak,
            }
        )
        print(rows[-1], flush=True)
        del network, model
    note = (
        "CPU time per history of 20 items; peak memory of the process so far, other models "
        "before it."
    )
    save("recommend", rows, settings=vars(options), packages=["pyarrow"], note=note)


if __name__ == "__main__":
    main()
