"""A small catalogue behind the service: a drawn model, a bundle and titles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import semid
from catalogue_cases import drawn_tokenizer, rows
from semid.catalogue.bundle import CatalogueBundle

PUBLISHED, ALL = 300, 400


class Shop(NamedTuple):
    """Files of a shop: the first 300 of 400 items are published."""

    bundle: Path
    model: Path
    items: Path
    tokenizer: Any
    x: np.ndarray
    names: list[str]


def make_shop(folder: Path, *, method: str = "append") -> Shop:
    """Write model, bundle and titles."""
    tokenizer, x = drawn_tokenizer(sizes=(8, 16)), rows(ALL)
    names = [f"item-{n}" for n in range(ALL)]
    ids = tokenizer.encode(x[:PUBLISHED], ids=names[:PUBLISHED])
    ids = semid.make_unique(
        ids, method=method, tokenizer=tokenizer, embeddings=x[:PUBLISHED],
        embedding_ids=names[:PUBLISHED],
    ).ids  # fmt: skip
    CatalogueBundle.create(folder / "bundle", ids)
    tokenizer.save(folder / "model")
    titles = [f"{('Blue', 'Red')[n % 2]} <b>chair</b> number {n}" for n in range(ALL)]
    pq.write_table(pa.table({"item_id": names, "title": titles}), folder / "items.parquet")
    files = folder / "bundle", folder / "model", folder / "items.parquet"
    return Shop(*files, tokenizer, x, names)
