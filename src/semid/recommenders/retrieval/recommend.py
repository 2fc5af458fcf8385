"""Recommendations for every user of a log, written to Parquet."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from semid.data.interactions import read_interactions
from semid.output import atomic_file
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.recommenders.retrieval.retriever import Retriever

USERS = 8192
"""Users whose recommendations are written at once."""


@with_progress
def write_recommendations(
    retriever: Retriever,
    path: str | os.PathLike[str],
    interactions: Any = None,
    *,
    k: int = 10,
    exclude_history: bool = True,
    within_ids: str = "popularity",
    cold_slots: int = 0,
    overwrite: bool = False,
    progress: ProgressArgument = None,
) -> int:
    """Write recommendations for every user of a log to Parquet, and return the number of users.

    Columns: ``user_id``, ``items`` (list of item ids, best first) and ``scores``. Memory does not
    grow with the number of users beyond their histories.

    Args:
        retriever: the model.
        path: file to write.
        interactions: the users' histories, as `semid.read_interactions` reads them; None takes
            those of the training log.
        k: items per user.
        exclude_history: leave out what is in a user's history.
        within_ids: order of the items of one id, as for `Retriever.recommend`.
        cold_slots: places for items that training never saw, as for `Retriever.recommend`.
        overwrite: replace a file that exists.
        progress: callback that receives progress events.
    """
    # Users of a log of their own need no target, so a single item is a history.
    sequences = retriever.sequences
    if interactions is not None:
        log = read_interactions(interactions, rating_column="")
        sequences = log.sequences(retriever.items.ids)
    users, options = len(sequences), (k, exclude_history, within_ids, cold_slots)
    schema = pa.schema(
        {
            "user_id": pa.large_string(),
            "items": pa.list_(pa.large_string()),
            "scores": pa.list_(pa.float32()),
        }
    )
    steps = progress or QuietProgress()
    steps.start("recommend", total=users)
    with atomic_file(path, overwrite=overwrite) as work, pq.ParquetWriter(work, schema) as writer:
        for start in range(0, users, USERS):
            stop = min(start + USERS, users)
            rows = [sequences[user].astype(np.int64) for user in range(start, stop)]
            rows = [items[items >= 0] for items in rows]
            best = list(retriever.recommend_rows(rows, *options))
            columns = [
                sequences.user_ids.slice(start, stop - start),
                pa.array([each.items for each in best], schema.field("items").type),
                pa.array([each.scores for each in best], schema.field("scores").type),
            ]
            writer.write_table(pa.table(columns, schema=schema))
            steps.step(stop - start)
    return users
