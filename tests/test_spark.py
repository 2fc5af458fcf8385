"""Arrow batches of Spark: codes as `encode` gives them, ids with their type, and the way back."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from distributed_cases import rows_array
from semid.distributed.arrow import ArrowEncoder, TableEncoder, ids_of_table, import_encoded
from semid.errors import ArtefactError, EmbeddingError, IdsError, UsageError


@pytest.fixture(scope="module")
def model(clustered, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("arrow") / "model"
    semid.RQKMeans(levels=3, codebook_size=16).fit(clustered).save(path)
    return path


def table_of(x: np.ndarray, ids: object = None) -> pa.Table:
    # Spark gives lists of any length.
    lists = rows_array(x).cast(pa.list_(pa.float32()))
    return pa.table({"sku": [f"s{i}" for i in range(len(x))] if ids is None else ids, "v": lists})


def batches(table: pa.Table, size: int) -> Iterator[pa.RecordBatch]:
    yield table.schema.empty_table().to_batches()[0] if size == 0 else table.to_batches()[0][:0]
    yield from table.to_batches(max_chunksize=size)


def encoded(encoder: ArrowEncoder, table: pa.Table, size: int) -> pa.Table:
    return pa.Table.from_batches(list(encoder(batches(table, size))))


def check_equal(ids: semid.SemanticIds, expected: semid.SemanticIds) -> None:
    """Compare all that ids are, whatever the order of the rows."""
    order = ids.items.index_of(expected.items.strings())
    ids = ids.take(order)
    assert ids.to_arrow().equals(expected.to_arrow(), check_metadata=True)


@pytest.mark.parametrize("size", [1, 100, 2000])
def test_batches_of_any_size_give_the_same_codes(model, clustered, size):
    x = clustered[:50] if size == 1 else clustered
    encoder = ArrowEncoder(model, embedding_column="v", id_column="sku", beam_width=3)
    table = table_of(x)
    result = encoded(encoder, table, size)
    assert [batch.num_rows for batch in result.to_batches()[:-1]] == [size] * (len(x) // size - 1)
    assert result.schema.field("codes").type == pa.list_(pa.int64())
    tokenizer = semid.load(model)
    check_equal(ids_of_table(result), tokenizer.encode(x, ids=table["sku"], beam_width=3))


def test_ids_keep_their_type(model, clustered):
    class Frame:
        dtypes = (("sku", "int"), ("v", "array<float>"))

    encoder = ArrowEncoder(model, id_column="sku")
    table = table_of(clustered, pa.array(np.arange(len(clustered)) * 3, pa.int32()))
    assert encoder.schema(Frame()).startswith("item_id int, codes array<bigint>, ")
    assert encoded(encoder, table, 300).schema.field("item_id").type == pa.int32()
    with pytest.raises(UsageError, match=r"no column 'item_id'.*id_column="):
        ArrowEncoder(model).schema(Frame())


def damaged(x: np.ndarray) -> pa.Table:
    """Rows of every kind that cannot be used: 2 (NaN), 5 (null), 6 (null value), 8 (width)."""
    rows: list[object] = [row.tolist() for row in x]
    rows[2] = [float("nan"), *x[2, 1:].tolist()]
    rows[5] = None
    rows[6] = [None, *x[6, 1:].tolist()]
    rows[8] = [1.0]
    lists = pa.array(rows, pa.list_(pa.float32()))
    return pa.table({"item_id": [f"s{i}" for i in range(len(x))], "v": lists})


@pytest.mark.parametrize("size", [1, 4, 300])
def test_rows_that_cannot_be_used_are_treated_as_in_encode(model, clustered, size):
    table = damaged(clustered)
    with pytest.raises(EmbeddingError, match=r"a batch of rows.*'s2'"):
        encoded(ArrowEncoder(model), table, size)
    result = encoded(ArrowEncoder(model, on_invalid="skip"), table, size)
    source = semid.open_embeddings(table, on_invalid="skip")
    assert len(source) == len(clustered) - 4
    check_equal(ids_of_table(result), semid.load(model).encode(source))
    # A batch of which no row is left is empty for Ray Data too, with the columns of the others.
    nothing = TableEncoder(str(model), None, None, "skip")(table[8:9])
    assert nothing.schema.equals(TableEncoder(str(model))(table[:2]).schema, check_metadata=True)
    assert len(nothing) == 0


def test_batches_that_do_not_fit_are_refused(model, clustered):
    table = table_of(clustered[:10])
    with pytest.raises(UsageError, match=r"no column 'item_id'.*id_column="):
        encoded(ArrowEncoder(model, embedding_column="v"), table, 100)
    with pytest.raises(UsageError, match=r"on_invalid='skipp'.*did you mean 'skip'"):
        ArrowEncoder(model, on_invalid="skipp")
    for ids, problem in ((["a", "", "b"], "empty"), (["a", None, "b"], "null"), (["a"] * 3, "a")):
        with pytest.raises(IdsError, match=problem):
            encoded(ArrowEncoder(model, id_column="sku"), table_of(clustered[:3], ids), 3)
    kinds = {"type": pa.int8(), "size": pa.int32(), "indices": pa.list_(pa.int32())}
    vector = pa.struct({**kinds, "values": pa.list_(pa.float64())})
    vectors = pa.table({"item_id": ["a"], "v": pa.nulls(1, vector)})
    for column in (None, "v"):
        with pytest.raises(EmbeddingError, match=r"column 'v'.*vector_to_array\(name, 'float32'\)"):
            encoded(ArrowEncoder(model, embedding_column=column), vectors, 1)


def write_parts(folder: Path, *tables: pa.Table) -> Path:
    folder.mkdir()
    (folder / "_SUCCESS").touch()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / f"part-{number}.snappy.parquet", row_group_size=130)
    return folder


def test_what_was_written_becomes_ids(model, clustered, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("semid.distributed.arrow.BLOCK_ROWS", 100)
    encoder = ArrowEncoder(model, id_column="sku")
    table = table_of(clustered)
    rows = encoded(encoder, table, 50)
    # A file without rows is among those that Spark writes.
    folder = write_parts(tmp_path / "spark", rows[300:], rows[:0], rows[:300])
    assert run("import", folder, "--from", "spark", "-o", tmp_path / "ids", "-q") == 0
    assert capsys.readouterr().out.startswith(f"imported {len(clustered):,} items")
    expected = semid.load(model).encode(clustered, ids=table["sku"])
    check_equal(semid.SemanticIds.read(tmp_path / "ids"), expected)
    assert len(list((tmp_path / "ids").glob("*.parquet"))) == 2


def test_ids_that_repeat_anywhere_and_other_models_are_refused(model, clustered, tmp_path):
    encoder = ArrowEncoder(model, id_column="sku")
    rows = encoded(encoder, table_of(clustered), 50)
    other = tmp_path / "other"
    semid.RQKMeans(levels=2, codebook_size=8).fit(clustered).save(other)
    others = encoded(ArrowEncoder(other, id_column="sku"), table_of(clustered[:9]), 50)
    null = rows[:9].set_column(0, "item_id", pa.array(["", *"abcdefgh"]))
    cases = {
        "repeat": (IdsError, "^1 item ids stand in more than one place", rows[:9], rows[8:20]),
        "empty": (IdsError, r"part-1.*empty", rows[9:20], null),
        "models": (ArtefactError, "another model or beam than", rows[9:20], others),
        "beside": (ArtefactError, "rows of 2 models", pa.concat_tables([rows[9:20], others])),
        "lacking": (ArtefactError, "lacks the columns fingerprint", rows.drop(["fingerprint"])),
        "no rows": (ArtefactError, "holds no rows", rows[:0]),
    }
    for name, (kind, message, *tables) in cases.items():
        folder = write_parts(tmp_path / name, *tables)
        with pytest.raises(kind, match=message):
            import_encoded(folder, tmp_path / "ids")
        assert not (tmp_path / "ids").exists()


# A running Spark --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spark() -> Iterator[object]:
    sql = pytest.importorskip("pyspark.sql", reason="pip install pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    os.environ["PYSPARK_PYTHON"] = sys.executable
    paths = Path(__file__).parent, Path(semid.__file__).parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    builder = sql.SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false")
    # Small batches, so that a task has several.
    session = builder.config("spark.sql.execution.arrow.maxRecordsPerBatch", "70").getOrCreate()
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()
    del os.environ["PYSPARK_PYTHON"], os.environ["PYTHONPATH"]


@pytest.mark.spark
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [pa.string(), pa.int64(), pa.int32()])
def test_spark_encodes_as_one_machine_does(spark, model, clustered, tmp_path, kind):
    ids = pa.array(np.arange(len(clustered)) * 3).cast(kind)
    pq.write_table(table_of(clustered, ids), tmp_path / "items.parquet")
    frame = spark.read.parquet(str(tmp_path / "items.parquet")).repartition(3)
    encode = ArrowEncoder(model, id_column="sku", beam_width=2)
    result = frame.mapInArrow(encode, encode.schema(frame))
    result.write.parquet(str(tmp_path / "spark"))
    import_encoded(tmp_path / "spark", tmp_path / "ids")
    tokenizer = semid.load(model)
    expected = tokenizer.encode(tmp_path / "items.parquet", ids=ids, beam_width=2)
    check_equal(semid.SemanticIds.read(tmp_path / "ids"), expected)


@pytest.mark.spark
@pytest.mark.filterwarnings("ignore")
def test_spark_treats_bad_rows_and_vectors_as_one_machine_does(spark, model, clustered, tmp_path):
    functions = pytest.importorskip("pyspark.ml.functions")
    pq.write_table(damaged(clustered), tmp_path / "items.parquet")
    frame = spark.read.parquet(str(tmp_path / "items.parquet")).repartition(3)
    strict, skips = ArrowEncoder(model), ArrowEncoder(model, on_invalid="skip")
    with pytest.raises(Exception, match="EmbeddingError: embedding column 'v' of a batch"):
        frame.mapInArrow(strict, strict.schema(frame)).collect()
    result = frame.mapInArrow(skips, skips.schema(frame)).toArrow()
    source = semid.open_embeddings(damaged(clustered), on_invalid="skip")
    check_equal(ids_of_table(result), semid.load(model).encode(source))
    # Vectors of Spark ML.
    names = [f"s{row}" for row in range(50)]
    rows = list(zip(names, clustered[:50].tolist(), strict=True))
    vectors = spark.createDataFrame(rows, ["item_id", "v"])
    vectors = vectors.withColumn("v", functions.array_to_vector("v"))
    with pytest.raises(Exception, match=r"pyspark\.ml\.functions\.vector_to_array"):
        vectors.mapInArrow(strict, strict.schema(vectors)).collect()
    lists = vectors.withColumn("v", functions.vector_to_array("v", "float32"))
    result = lists.mapInArrow(strict, strict.schema(lists)).toArrow()
    check_equal(ids_of_table(result), semid.load(model).encode(clustered[:50], ids=names))
