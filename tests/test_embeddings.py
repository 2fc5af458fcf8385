"""One matrix, every container, every way of reading it: always the same rows."""

import itertools
import logging

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.data.embeddings import open_embeddings
from semid.data.files import ParquetFiles
from semid.data.source import EmbeddingSource
from semid.errors import EmbeddingError, IdsError, OutputExistsError, UsageError

ROWS, DIM = 37, 5
IDS = [f"item-{i}" for i in range(ROWS)]


def matrix(dtype="float32", rows=ROWS, dim=DIM):
    x = np.random.default_rng(0).normal(size=(rows, dim))
    return x.astype(np.float16).astype(dtype)  # exact in every float type


def list_array(x, layout, value_type=None):
    values = pa.array(x.reshape(-1), type=value_type)
    offsets = np.arange(0, x.size + 1, x.shape[1])
    if layout == "fixed":
        return pa.FixedSizeListArray.from_arrays(values, x.shape[1])
    if layout == "large":
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), values)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def table(x, layout="fixed", ids=None):
    ids = [f"item-{i}" for i in range(len(x))] if ids is None else ids
    return pa.table({"item_id": ids, "embedding": list_array(x, layout)})


def in_container(name, x, folder):
    """Put a matrix in one of the containers; return the source and whether it carries ids."""
    kind, _, detail = name.partition(":")
    if kind == "array":
        return {"C": x, "F": np.asfortranarray(x), "strided": np.repeat(x, 2, 0)[::2]}[detail], 0
    if kind == "npy":
        value = {"F": np.asfortranarray(x), "big": x.astype(x.dtype.newbyteorder(">"))}
        np.save(folder / "x.npy", value.get(detail, x))
        return folder / "x.npy", 0
    if kind == "torch":
        return torch.from_numpy(x.copy()).to(getattr(torch, detail)), 0
    if kind == "arrow":
        whole = table(x, detail)
        return pa.concat_tables([whole.slice(0, 10), whole.slice(10, 1), whole.slice(11)]), 1
    if kind == "pandas":
        return pd.DataFrame({"item_id": IDS, "embedding": list(x)}), 1
    if kind == "polars":
        frame = pl.DataFrame({"item_id": IDS, "embedding": x})
        return pl.concat([frame[:20], frame[20:]], rechunk=False), 1
    if kind == "parquet":
        path = folder / "x.parquet"
        pq.write_table(table(x, detail), path, row_group_size=8)
        return path, 1
    for i, start in enumerate(range(0, ROWS, 15)):
        (folder / "part").mkdir(exist_ok=True)
        part = table(x, "fixed").slice(start, 15)
        pq.write_table(part, folder / "part" / f"{i}.parquet", row_group_size=4)
    (folder / "part" / "_SUCCESS").touch()
    return (folder / "part" if kind == "folder" else f"{folder}/part/*.parquet"), 1


CONTAINERS = [
    *("array:C", "array:F", "array:strided", "npy:C", "npy:F", "npy:big", "torch:float32"),
    *("arrow:fixed", "arrow:list", "arrow:large", "pandas", "polars", "folder", "glob"),
    *("parquet:fixed", "parquet:list", "parquet:large"),
]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_rows(container, dtype, tmp_path):
    x = matrix(dtype)
    if container == "torch:float32":
        container = f"torch:{dtype}"
    source, has_ids = in_container(container, x, tmp_path)
    opened = open_embeddings(source)
    assert isinstance(opened, EmbeddingSource)
    assert (len(opened), opened.dim) == (ROWS, DIM)
    assert opened.describe()["items"] == ROWS
    if has_ids:
        assert opened.ids.strings().to_pylist() == IDS
    else:
        assert opened.ids[3] == "3"
    expected = matrix("float32")
    for size in (1, 8, 16, 37, 100):
        blocks = list(opened.blocks(size))
        assert [start for start, _ in blocks] == list(range(0, ROWS, size))
        for _, block in blocks:
            assert block.dtype == np.float32
            assert block.flags.c_contiguous
            assert block.flags.writeable
        np.testing.assert_array_equal(np.concatenate([b for _, b in blocks]), expected)
        for first in range(0, ROWS + size, size):
            later = list(opened.blocks(size, first=first))
            assert [start for start, _ in later] == list(range(first, ROWS, size))
            for (_, block), (_, before) in zip(later, blocks[first // size :], strict=True):
                np.testing.assert_array_equal(block, before)
    with pytest.raises(UsageError, match="not a multiple of the block size 8"):
        next(opened.blocks(8, first=9))
    wanted = np.array([36, 0, 9, 10, 11, 0, 20])
    np.testing.assert_array_equal(opened.rows(wanted), expected[wanted])
    assert opened.rows([]).shape == (0, DIM)
    opened.validate()


def test_bfloat16_tensor_and_tensor_with_gradient():
    x = torch.randn(6, 3, requires_grad=True)
    np.testing.assert_array_equal(open_embeddings(x).rows([2, 1]), x.detach().numpy()[[2, 1]])
    half = x.detach().bfloat16()
    np.testing.assert_array_equal(open_embeddings(half).rows([5]), half[[5]].float().numpy())


def test_blocks_are_the_callers_own_unless_asked():
    x = matrix()
    for source in (x, torch.from_numpy(x), table(x)):
        for _, block in open_embeddings(source).blocks():
            block[:] = 0
    np.testing.assert_array_equal(x, matrix())
    [(_, view)] = open_embeddings(x).blocks(copy=False)
    assert np.shares_memory(view, x)


def test_arrow_and_memory_maps_are_viewed_not_copied(tmp_path):
    x = matrix()
    column = table(x)["embedding"]
    memory = column.chunk(0).values.to_numpy()
    [(_, view)] = open_embeddings(pa.table({"embedding": column})).blocks(copy=False)
    assert np.shares_memory(view, memory)
    np.save(tmp_path / "x.npy", x)
    [(_, view)] = open_embeddings(tmp_path / "x.npy").blocks(copy=False)
    assert not view.flags.writeable


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_arrow_slices_and_block_sizes(data):
    """Slices with offsets, any chunking, any block size, any drawn rows, nulls elsewhere."""
    rows = data.draw(st.integers(1, 30))
    x = matrix(rows=rows, dim=3)
    layout = data.draw(st.sampled_from(["fixed", "list", "large"]))
    array = list_array(x, layout)
    low = data.draw(st.integers(0, rows - 1))
    high = data.draw(st.integers(low + 1, rows))
    cuts = sorted(data.draw(st.lists(st.integers(low, high), max_size=3)))
    edges = [low, *cuts, high]
    chunked = pa.chunked_array(
        [array.slice(a, b - a) for a, b in itertools.pairwise(edges)], type=array.type
    )
    source = open_embeddings(pa.table({"embedding": chunked}))
    size = data.draw(st.integers(1, 32))
    got = np.concatenate([block for _, block in source.blocks(size)])
    np.testing.assert_array_equal(got, x[low:high])
    wanted = data.draw(st.lists(st.integers(0, high - low - 1), max_size=8))
    np.testing.assert_array_equal(source.rows(np.array(wanted, int)), x[low:high][wanted])


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_subsets_equal_indexing(data, tmp_path_factory):
    x = matrix()
    path = tmp_path_factory.mktemp("subset") / "x.parquet"
    pq.write_table(table(x), path, row_group_size=7)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)))
    order = np.array(data.draw(st.permutations(range(ROWS)))[:9])
    size = data.draw(st.integers(1, 40))
    for base in (open_embeddings(x), open_embeddings(path)):
        for chosen in (mask, order):
            subset = base.subset(chosen)
            assert len(subset) == len(x[chosen])
            blocks = [block for _, block in subset.blocks(size)]
            got = np.concatenate(blocks) if blocks else np.empty((0, DIM))
            np.testing.assert_array_equal(got, x[chosen])
            for number in range(len(blocks) + 1):
                later = [block for _, block in subset.blocks(size, first=number * size)]
                for block, before in zip(later, blocks[number:], strict=True):
                    np.testing.assert_array_equal(block, before)
            np.testing.assert_array_equal(
                subset.ids.strings().to_pylist(),
                np.array([base.ids[i] for i in range(ROWS)])[chosen],
            )
    nested = open_embeddings(path).subset(order).subset([3, 1])
    np.testing.assert_array_equal(nested.rows([1, 0]), x[order][[1, 3]])
    assert nested.ids[0] == f"item-{order[3]}"
    renamed = open_embeddings(x, ids=[f"x{i}" for i in range(ROWS)])
    for base in (renamed, open_embeddings(renamed.subset(order), ids=list("abcdefghi"))):
        ids = base.ids.strings().to_pylist()
        assert base.subset([4, 2]).ids.strings().to_pylist() == [ids[4], ids[2]]


def test_subset_refuses_what_does_not_fit():
    source = open_embeddings(matrix())
    with pytest.raises(UsageError, match="one value per row"):
        source.subset(np.ones(3, bool))
    with pytest.raises(UsageError, match="repeat"):
        source.subset([1, 1])
    with pytest.raises(UsageError, match="0 to 36"):
        source.subset([37])
    with pytest.raises(UsageError, match="0 to 36"):
        source.rows([-1])
    with pytest.raises(UsageError, match="integers"):
        source.rows([0.5])
    with pytest.raises(UsageError, match="not positive"):
        next(source.blocks(0))


def test_source_passes_through_and_takes_new_ids():
    source = open_embeddings(matrix())
    assert open_embeddings(source) is source
    renamed = open_embeddings(source, ids=IDS)
    assert renamed.ids[2] == "item-2"
    assert source.ids[2] == "2"
    with pytest.raises(IdsError, match="37 rows and there are 2 ids"):
        open_embeddings(source, ids=["a", "b"])


def test_to_npy_is_a_memory_map_with_the_same_ids(tmp_path):
    pq.write_table(table(matrix("float16")), tmp_path / "x.parquet")
    source = open_embeddings(tmp_path / "x.parquet")
    assert not source.cheap_rows
    cached = source.to_npy(tmp_path / "x.npy")
    assert cached.cheap_rows
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), matrix())
    assert cached.ids == source.ids
    with pytest.raises(OutputExistsError):
        source.to_npy(tmp_path / "x.npy")
    assert len(source.to_npy(tmp_path / "x.npy", overwrite=True)) == ROWS


def test_failed_cache_leaves_no_file(tmp_path):
    x = matrix()
    x[20] = np.nan
    with pytest.raises(EmbeddingError):
        open_embeddings(x).to_npy(tmp_path / "x.npy")
    assert list(tmp_path.iterdir()) == []


def spoiled():
    """Rows 2 (null), 5 (null value), 9 (NaN), 11 (infinite) of an Arrow column cannot be used."""
    rows = matrix("float64").tolist()
    rows[2] = None
    rows[5][1] = None
    rows[9][0] = float("nan")
    rows[11][4] = float("inf")
    return rows


@pytest.mark.parametrize("layout", [pa.list_(pa.float64(), DIM), pa.list_(pa.float32())])
@pytest.mark.parametrize("container", ["arrow", "parquet", "pandas", "polars"])
def test_skip_drops_the_same_rows_everywhere(container, layout, tmp_path, caplog):
    column = pa.array(spoiled(), type=layout)
    source = pa.table({"item_id": IDS, "embedding": column})
    if container == "parquet":
        if pa.types.is_fixed_size_list(layout) and int(pa.__version__.split(".")[0]) < 26:
            pytest.skip("pyarrow before 26 cannot store null rows in lists of a fixed size")
        pq.write_table(source, tmp_path / "x.parquet", row_group_size=4)
        source = tmp_path / "x.parquet"
    elif container == "pandas":
        source = pd.DataFrame({"item_id": IDS, "embedding": spoiled()})
    elif container == "polars":
        source = pl.from_arrow(source)
    with caplog.at_level(logging.WARNING):
        opened = open_embeddings(source, on_invalid="skip")
    keep = [i for i in range(ROWS) if i not in (2, 5, 9, 11)]
    assert opened.ids.strings().to_pylist() == [IDS[i] for i in keep]
    got = np.concatenate([block for _, block in opened.blocks(10)])
    np.testing.assert_array_equal(got, matrix()[keep])
    assert "dropped 4 of 37 rows" in caplog.text
    assert "item 'item-2', row 2" in caplog.text
    with pytest.raises(EmbeddingError) as refused:
        open_embeddings(source).validate()
    assert len(refused.value.problems) in (3, 4)  # pandas cannot tell null from NaN in a list
    assert "first: item 'item-2', row 2" in refused.value.problems[0]


def odd_rows(first, odd=()):
    """37 rows, of which the first and those numbered ``odd`` have another width."""
    rows = matrix("float64").tolist()
    rows[0] = first
    for row in odd:
        rows[row] = rows[row][:2]
    return rows


LISTS = [
    ("arrow", pa.list_(pa.float32())),
    ("arrow", pa.large_list(pa.float64())),
    ("parquet", pa.list_(pa.float32())),
    ("parquet", pa.large_list(pa.float16())),
    ("folder", pa.list_(pa.float32())),
    ("pandas", pa.list_(pa.float64())),
    ("arrays", pa.list_(pa.float64())),
    ("polars", pa.list_(pa.float32())),
]


@pytest.mark.parametrize("first", [[], [1.0], [1.0] * 9, None], ids=["empty", "1", "9", "null"])
@pytest.mark.parametrize(("container", "kind"), LISTS)
def test_width_is_the_most_frequent_and_skip_drops_the_others(
    container, kind, first, tmp_path, caplog
):
    rows = odd_rows(first, odd=(7, 30))
    if kind.value_type == pa.float16():
        # pyarrow before 21 makes no half floats of Python's floats.
        column = pa.array([r and [np.float16(v) for v in r] for r in rows], kind)
    else:
        column = pa.array(rows, kind)
    source = pa.table({"item_id": IDS, "embedding": column})
    if container == "parquet":
        pq.write_table(source, tmp_path / "x.parquet", row_group_size=10)
        source = tmp_path / "x.parquet"
    elif container == "folder":
        (tmp_path / "x").mkdir()
        # The first file holds odd rows alone.
        for number, (a, b) in enumerate([(0, 1), (1, 20), (20, ROWS)]):
            pq.write_table(source.slice(a, b - a), tmp_path / "x" / f"{number}.parquet")
        source = tmp_path / "x"
    elif container in ("pandas", "arrays"):
        values = [r and np.array(r) for r in rows] if container == "arrays" else rows
        source = pd.DataFrame({"item_id": IDS, "embedding": values})
    elif container == "polars":
        source = pl.from_arrow(source)
    opened = open_embeddings(source)
    assert opened.dim == DIM
    with pytest.raises(EmbeddingError, match=r"width than 5, .*--on-invalid skip") as refused:
        opened.validate()
    count, row = ("2 rows", 7) if first is None else ("3 rows", 0)
    expected = f"{count} with another width than 5, which is the most frequent"
    assert f"{expected} (first: item 'item-{row}', row {row})" in str(refused.value)
    with caplog.at_level(logging.WARNING):
        opened = open_embeddings(source, on_invalid="skip")
    assert "dropped 3 of 37 rows with null, NaN or infinite values or of another width" in (
        caplog.text
    )
    keep = [i for i in range(ROWS) if i not in (0, 7, 30)]
    assert opened.ids.strings().to_pylist() == [IDS[i] for i in keep]
    for size in (10, 100):
        got = np.concatenate([block for _, block in opened.blocks(size)])
        np.testing.assert_array_equal(got, matrix()[keep])
    np.testing.assert_array_equal(opened.rows([3]), matrix()[keep[3:4]])


def test_width_when_footers_or_first_rows_mislead(tmp_path):
    def width(rows, **options):
        column = pa.array(rows, pa.list_(pa.float32()))
        pq.write_table(pa.table({"embedding": column}), tmp_path / "x.parquet", **options)
        parquet, arrow = (
            open_embeddings(source, ids=range(len(rows))).dim
            for source in (tmp_path / "x.parquet", pa.table({"embedding": column}))
        )
        assert parquet == arrow
        return parquet

    two, four = [1.0] * 2, [1.0] * 4
    assert width([two, four, four, two, four]) == 4
    assert width([two] * 3 + [[]] * 4 + [None] * 9) == 2  # an empty list is no width
    # Mean length 3, which no row has; of equally frequent lengths the first counts.
    assert width([two, four] * 5) == 2
    # The first row group has one width, all others another.
    assert width([two] * 2000 + [four] * 2001, row_group_size=1000) == 4
    assert width([None] * 1500 + [four] * 3, row_group_size=500) == 4


def test_valid_lists_are_not_read_to_learn_their_width(tmp_path, monkeypatch):
    pq.write_table(table(matrix(rows=5000), "list"), tmp_path / "x.parquet", row_group_size=500)
    sizes = []
    batches = ParquetFiles.batches

    def count(self, *args, **options):
        for batch in batches(self, *args, **options):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(ParquetFiles, "batches", count)
    assert open_embeddings(tmp_path / "x.parquet").dim == DIM
    assert sum(sizes) <= 1024


def test_skip_keeps_a_clean_source_as_it_is():
    assert "subset_of" not in open_embeddings(matrix(), on_invalid="skip").describe()


def test_extension_tensor_column():
    storage = list_array(matrix(), "fixed")
    kind = pa.fixed_shape_tensor(pa.float32(), [DIM])
    column = pa.ExtensionArray.from_storage(kind, storage).slice(3)
    source = open_embeddings(pa.table({"embedding": column}))
    np.testing.assert_array_equal(source.rows(range(3)), matrix()[3:6])


def test_tensors_of_more_dimensions_are_refused_as_arrays_are(tmp_path):
    cube = matrix(dim=8).reshape(ROWS, 2, 4)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(cube))
    source = pa.table({"item_id": IDS, "embedding": column})
    pq.write_table(source, tmp_path / "x.parquet")
    np.save(tmp_path / "x.npy", cube)
    for place in (source, tmp_path / "x.parquet", tmp_path / "x.npy"):
        with pytest.raises(EmbeddingError, match=r"shape \((37, )?2, 4\).* one vector"):
            open_embeddings(place)
    with pytest.raises(EmbeddingError, match="flat lists of 8"):
        open_embeddings(source, embedding_column="embedding")
    flat = pa.FixedShapeTensorArray.from_numpy_ndarray(matrix(dim=8))
    pq.write_table(pa.table({"embedding": flat}), tmp_path / "flat.parquet")
    np.testing.assert_array_equal(
        open_embeddings(tmp_path / "flat.parquet").rows([3]), matrix(dim=8)[[3]]
    )


def test_columns_of_one_name_are_refused(tmp_path):
    x = list_array(matrix(), "fixed")
    ids = pa.array(IDS)
    for names in (["item_id", "embedding", "embedding"], ["item_id", "embedding", "item_id"]):
        repeated = max(names, key=names.count)
        arrow = pa.table([ids, x, x if repeated == "embedding" else ids], names=names)
        pandas = pd.concat(
            [pd.DataFrame({"item_id": IDS}), pd.DataFrame({"embedding": list(matrix())})], axis=1
        )
        pandas = pd.concat([pandas, pandas[[repeated]]], axis=1)
        pq.write_table(arrow, tmp_path / "x.parquet")
        for source in (arrow, pandas, tmp_path / "x.parquet"):
            message = f"several columns called '{repeated}'; rename all but one"
            with pytest.raises(UsageError, match=message):
                open_embeddings(source)
            with pytest.raises(UsageError, match=message):
                open_embeddings(source, embedding_column="embedding", id_column="item_id")
    # A repeated column that is not read does no harm.
    extra = pd.concat(
        [pandas.iloc[:, :2], pd.DataFrame(0, range(ROWS), ["price", "price"])], axis=1
    )
    assert open_embeddings(extra).ids[1] == "item-1"
