"""FuxiCTR: an item table with a column a level and a column a prefix, and its ``feature_cols``."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from semid.catalogue.placement import group_numbers
from semid.codes import SemanticIds
from semid.output import atomic_folder

__all__ = ["feature_columns", "write_fuxictr"]


def feature_columns(ids: SemanticIds) -> dict[str, npt.NDArray[np.int64]]:
    """Return the columns by name, each ``(items,)`` int64.

    ``sid_1`` to ``sid_L`` are the codes; ``sid_prefix_2`` to ``sid_prefix_L`` number the distinct
    prefixes of that many codes, injectively (``sid_1`` is the prefix of one). Parallel codes have
    no prefixes.
    """
    columns = {f"sid_{n + 1}": ids.codes[:, n].astype(np.int64) for n in range(ids.levels)}
    if ids.info.hierarchical:
        for depth in range(2, ids.levels + 1):
            columns[f"sid_prefix_{depth}"] = group_numbers(ids.codes[:, :depth])
    return columns


def write_fuxictr(
    ids: SemanticIds, path: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write a folder with ``items.parquet`` and ``feature_cols.yaml``.

    Join the table to the samples on ``item_id``, and put the YAML's entries into the
    ``dataset_config``.

    Raises:
        OutputExistsError: if ``path`` exists and ``overwrite`` is false.
    """
    columns = feature_columns(ids)
    table: dict[str, Any] = {"item_id": ids.items.to_arrow(), **columns}
    with atomic_folder(path, overwrite=overwrite) as folder:
        pq.write_table(pa.table(table), folder / "items.parquet")
        (folder / "feature_cols.yaml").write_text(_yaml(columns), encoding="utf8")


def _yaml(columns: dict[str, npt.NDArray[np.int64]]) -> str:
    lines = [
        "# Entries for feature_cols of a FuxiCTR dataset_config; join items.parquet on item_id."
    ]
    lines.append("feature_cols:")
    for name, values in columns.items():
        distinct = len(np.unique(values))
        lines.append(
            f"  - {{name: {name}, active: True, dtype: int, type: categorical}}"
            f"  # {distinct} distinct values"
        )
    return "\n".join(lines) + "\n"
