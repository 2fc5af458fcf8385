"""Datasets, streams, queries and Arrow files: the same rows, ids and types as a table in memory."""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from semid.data.embeddings import open_embeddings
from semid.data.interactions import read_interactions
from semid.data.items import load_ids
from semid.errors import EmbeddingError

ROWS = 50
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
IDS = [f"i{n}" for n in range(ROWS)]
TABLE = pa.table(
    {
        "item_id": IDS,
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(X.ravel()), 4),
        "user_id": ["u", "v"] * (ROWS // 2),
        "position": np.arange(ROWS)[::-1],
    }
)


def parquet(path):
    pq.write_table(TABLE, path / "t.parquet", row_group_size=7)
    return path / "t.parquet"


def stream_file(path):
    with pa.ipc.new_stream(path / "t.arrow", TABLE.schema) as out:
        out.write_table(TABLE, max_chunksize=7)
    return path / "t.arrow"


def feather_file(path, **options):
    feather.write_feather(TABLE, path / "t.feather", chunksize=7, **options)
    return path / "t.feather"


def saved(path, **options):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset(TABLE).save_to_disk(path / "saved", **options)
    return path / "saved"


def dask_frame():
    dask = pytest.importorskip("dask")
    frames = pytest.importorskip("dask.dataframe")
    with dask.config.set({"dataframe.convert-string": False}):  # which makes text of vectors
        return frames.from_pandas(TABLE.to_pandas(), npartitions=3)


SOURCES = {
    "pyarrow dataset": lambda path: ds.dataset(parquet(path)),
    "pyarrow scanner": lambda path: ds.dataset(parquet(path)).scanner(),
    "pyarrow stream": lambda path: TABLE.to_reader(7),
    "polars query": lambda path: pl.scan_parquet(parquet(path)),
    "duckdb": lambda path: pytest.importorskip("duckdb").from_arrow(TABLE),
    "dask": lambda path: dask_frame(),
    "datasets": lambda path: pytest.importorskip("datasets").Dataset(TABLE),
    "datasets, chosen rows": lambda path: (
        pytest.importorskip("datasets").Dataset(TABLE).select(range(ROWS))
    ),
    "datasets, a stream": lambda path: (
        pytest.importorskip("datasets").Dataset(TABLE).to_iterable_dataset(3)
    ),
    "folder of datasets": saved,
    "folder of datasets, parts": lambda path: saved(path, num_shards=12),
    "feather": feather_file,
    "feather, not compressed": lambda path: feather_file(path, compression="uncompressed"),
    "arrow stream": stream_file,
    "a name that says nothing": lambda path: stream_file(path).rename(path / "data.bin"),
}


@pytest.mark.parametrize("name", SOURCES)
def test_tables_of_other_libraries(name, tmp_path):
    opened = open_embeddings(SOURCES[name](tmp_path))
    np.testing.assert_array_equal(opened.rows(np.arange(ROWS)), X)
    assert opened.ids.strings().to_pylist() == IDS
    assert load_ids(SOURCES[name](tmp_path)).strings().to_pylist() == IDS
    log = read_interactions(SOURCES[name](tmp_path))
    assert log.item_ids.take(pa.array(log.items)).to_pylist() == IDS
    assert log.order.tolist() == list(range(ROWS))[::-1]


def test_arrow_files_that_are_broken(tmp_path):
    file = feather_file(tmp_path)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(EmbeddingError, match="could not be read as Arrow"):
        open_embeddings(file)
    (tmp_path / "saved").mkdir()
    # A folder names only files inside it.
    state = '{"_data_files": [{"filename": "../t.feather"}]}'
    feather_file(tmp_path)
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(EmbeddingError, match="could not be read as Arrow"):
        open_embeddings(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("[]")
    with pytest.raises(EmbeddingError, match="could not be read as Arrow"):
        open_embeddings(tmp_path / "saved")
