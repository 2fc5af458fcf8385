"""A small log with a known structure: users like the items of their own group."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from catalogue_cases import codes_info
from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.recommenders.ranking.builder import RankingData, RankingDataConfig
from semid.recommenders.ranking.data import prepare_ranking_data

USERS, ITEMS, GROUPS = 80, 48, 4
SMALL = {"hidden": (8,), "dropout": 0.0}
QUICK = {"epochs": 4, "batch_size": 256, "learning_rate": 0.02, "precision": "fp32"}


def item_table(items: int = ITEMS) -> pa.Table:
    """Items whose brand and first category tell half of their group."""
    group = np.arange(items) % GROUPS
    return pa.table(
        {
            "item_id": [f"i{n}" for n in range(items)],
            "brand": [f"b{g % 2}" for g in group],
            "categories": [
                f"top > c{g // 2}" if n % 3 else f"c{g // 2}"
                for n, g in zip(range(items), group, strict=True)
            ],
            "title": [f"item {n}" for n in range(items)],
        }
    )


def log_table(
    rows: int = 1200, *, seed: int = 0, users: int = USERS, items: int = ITEMS
) -> pa.Table:
    """Distinct pairs; a user takes items of the own group three times out of four."""
    generator = np.random.default_rng(seed)
    user = generator.integers(0, users, 4 * rows)
    item = generator.integers(0, items // GROUPS, 4 * rows) * GROUPS
    item += (
        np.where(generator.random(4 * rows) < 0.75, user, generator.integers(0, 9, 4 * rows))
        % GROUPS
    )
    pairs = np.unique(user * items + item)
    pairs = generator.permutation(pairs)[:rows]
    user, item = pairs // items, pairs % items
    liked = (user % GROUPS == item % GROUPS) ^ (generator.random(len(pairs)) < 0.1)
    return pa.table(
        {
            "user_id": [f"u{n}" for n in user],
            "item_id": [f"i{n}" for n in item],
            "timestamp": generator.permutation(len(pairs)).astype(np.int64),
            "rating": np.where(liked, 5.0, 2.0),
            "device": [["web", "app", "tv"][n % 3] for n in user],
            "price": generator.normal(10.0, 4.0, len(pairs)),
        }
    )


def codes(
    levels: int = 3,
    size: int = 8,
    *,
    hierarchical: bool = True,
    items: int = ITEMS,
    fingerprint: str = "a" * 64,
    skip: int = 0,
) -> SemanticIds:
    """Codes whose first level is the item's group; the first ``skip`` items have none."""
    rows = np.arange(skip, items)
    generator = np.random.default_rng(3)
    found = generator.integers(0, size, (64, levels))[rows]  # an item keeps its codes
    found[:, 0] = rows % GROUPS
    about = {"tokenizer": "rqvae" if hierarchical else "mocvae", "hierarchical": hierarchical}
    info = codes_info((size,) * levels, codebook_fingerprint=fingerprint, **about)
    ids = ItemIds([f"i{n}" for n in rows])
    return SemanticIds(ids, found.astype(np.uint16), np.zeros(len(rows), np.float32), info)


def data(**options: object) -> RankingData:
    """The log, prepared."""
    settings = {"label": "rating>=4", **options}
    return prepare_ranking_data(
        log_table(), items=item_table(), config=RankingDataConfig(**settings)
    )
