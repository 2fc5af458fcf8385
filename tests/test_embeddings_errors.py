"""Bad embeddings: each is refused with what was given, what is allowed and what to do."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from semid.data.embeddings import open_embeddings
from semid.errors import EmbeddingError, IdsError, UsageError

X = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)


def column(rows, kind):
    if pa.types.is_float16(kind.value_type):  # pyarrow before 21 makes no half floats of floats
        rows = [row and [None if v is None else np.float16(v) for v in row] for row in rows]
    return pa.array(rows, type=kind)


def write(path, **columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def spoil(value, row=3):
    x = X.copy()
    x[row, 1] = value
    return x


@pytest.mark.parametrize(
    ("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")]
)
@pytest.mark.parametrize("to", [np.asarray, torch.from_numpy])
def test_values_that_are_not_finite(value, word, to):
    ids = [f"B{i}" for i in range(9)]
    source = open_embeddings(to(spoil(value)), ids=ids)
    expected = rf"1 row with {word}.*first: item 'B3', row 3.*--on-invalid skip"
    with pytest.raises(EmbeddingError, match=expected):
        source.validate()
    with pytest.raises(EmbeddingError, match=expected):
        list(source.blocks(2))
    with pytest.raises(EmbeddingError, match="item 'B3', row 3"):
        source.rows([0, 3])
    np.testing.assert_array_equal(source.rows([0, 4]), X[[0, 4]])


def test_every_problem_is_listed_with_its_count():
    x = X.copy()
    x[[2, 7], 0] = np.nan
    x[5, 3] = np.inf
    with pytest.raises(EmbeddingError) as refused:
        list(open_embeddings(x).blocks(4))
    nan, infinite = refused.value.problems
    assert "2 rows with NaN (first: item '2', row 2)" in nan
    assert "1 row with infinite" in infinite


def test_rows_too_long_for_squared_distances_are_named():
    x = np.full((4, 3), 5e14, dtype=np.float32)  # together longer than the limit, one by one not
    [(_, block)] = open_embeddings(x).blocks()
    np.testing.assert_array_equal(block, x)
    x[2] = 1e20
    with pytest.raises(EmbeddingError, match=r"1 row with values too large.*row 2"):
        list(open_embeddings(x).blocks())
    assert len(open_embeddings(x, on_invalid="skip")) == 3


def test_float64_beyond_float32():
    for source in (spoil(0).astype(np.float64), torch.from_numpy(X).double()):
        source[6, 0] = 1e300
        with pytest.raises(EmbeddingError, match=r"beyond the range of float32.*row 6"):
            list(open_embeddings(source).blocks())
    rows = pa.table({"embedding": column([[1e300, 0.0]], pa.list_(pa.float64()))})
    with pytest.raises(EmbeddingError, match="beyond the range of float32"):
        open_embeddings(rows).validate()


def test_nothing_usable_left_to_keep():
    with pytest.raises(EmbeddingError, match="nothing would be left"):
        open_embeddings(np.full((3, 2), np.nan, np.float32), on_invalid="skip")


@pytest.mark.parametrize("single", [np.ones((), np.float32), torch.tensor(1.0)])
def test_a_single_number_is_no_matrix(single):
    with pytest.raises(EmbeddingError, match=r"shape \(\); embeddings are a matrix"):
        open_embeddings(single)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.empty((0, 4), np.float32), "no rows"),
        (np.empty((4, 0), np.float32), "rows of width 0"),
        (np.ones(4, np.float32), r"matrix \(items, width\); for one item, x\[None, :\]"),
        (np.ones((2, 3, 4), np.float32), r"shape \(2, 3, 4\).*reshape"),
        (np.ones((2, 3), np.int64), r"holds int64.*x.astype\('float32'\)"),
        (np.ones((2, 3), bool), "holds bool"),
        (np.ones((2, 3), complex), "holds complex128"),
        (np.array([["a", "b"]]), "holds <U1"),
        (np.array([[1.0, None]], object), "holds object"),
        (np.ma.masked_invalid(np.ones((2, 3))), "masked"),
    ],
)
def test_arrays_that_are_no_float_matrix(array, message, tmp_path):
    with pytest.raises(EmbeddingError, match=message):
        open_embeddings(array)
    if array.dtype.kind in "fibc" and not isinstance(array, np.ma.MaskedArray):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(EmbeddingError, match=message):
            open_embeddings(tmp_path / "x.npy")
    if array.dtype.kind in "fi" and not isinstance(array, np.ma.MaskedArray):
        with pytest.raises(EmbeddingError, match=message.replace("holds int64", "holds torch")):
            open_embeddings(torch.from_numpy(array))


def test_sparse_tensor():
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0], [0]]), torch.ones(1), (2, 2), check_invariants=True
    )
    with pytest.raises(EmbeddingError, match="to_dense"):
        open_embeddings(sparse)


@pytest.mark.parametrize("cut", [3, 30, 100, 200])
def test_truncated_npy(cut, tmp_path):
    np.save(tmp_path / "x.npy", X)
    data = (tmp_path / "x.npy").read_bytes()
    (tmp_path / "x.npy").write_bytes(data[:cut])
    message = r"truncated: .* 9 rows of 4 float32 \(272 bytes\) and the file has 200"
    with pytest.raises(EmbeddingError, match=message if cut == 200 else "not an .npy file"):
        open_embeddings(tmp_path / "x.npy")


def test_npy_of_objects_is_never_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[1.0, None]], object), allow_pickle=True)
    with pytest.raises(EmbeddingError, match=r"pickled Python objects, which are never loaded"):
        open_embeddings(tmp_path / "x.npy")


def test_npy_that_is_something_else(tmp_path):
    (tmp_path / "x.npy").write_text("hello, this is text")
    with pytest.raises(EmbeddingError, match=r"not an \.npy file"):
        open_embeddings(tmp_path / "x.npy")
    np.savez(tmp_path / "x.npz", X)
    with pytest.raises(EmbeddingError, match=r"archive.*numpy.save"):
        open_embeddings(tmp_path / "x.npz")


LAYOUTS = [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16())]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_ragged_lists(kind, tmp_path):
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0], [], [6.0, 7.0, 8.0]]
    path = write(tmp_path / "x.parquet", item_id=list("abcde"), embedding=column(rows, kind))
    expected = (
        "3 rows with another width than 2, which is the most frequent .first: item 'c', row 2.; "
        "drop them or pass --on-invalid skip"
    )
    with pytest.raises(EmbeddingError, match=expected):
        open_embeddings(path).validate()
    with pytest.raises(EmbeddingError, match="item 'e', row 4"):
        open_embeddings(path).rows([4])


@pytest.mark.parametrize("kind", [*LAYOUTS, pa.list_(pa.float32(), 2), pa.list_(pa.float16(), 2)])
def test_nulls_in_the_column(kind):
    rows = pa.table({"embedding": column([[1.0, 2.0], None, [None, 4.0]], kind)})
    with pytest.raises(EmbeddingError) as refused:
        open_embeddings(rows).validate()
    null_row, null_value = refused.value.problems
    assert "1 row with null instead of an embedding (first: item '1', row 1)" in null_row
    assert "1 row with null values inside the embedding (first: item '2', row 2)" in null_value


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float32(), 2)])
def test_nothing_but_nulls_and_nothing_at_all(kind, tmp_path):
    nulls = write(tmp_path / "n.parquet", embedding=column([None, None], kind))
    with pytest.raises(EmbeddingError, match=r"nothing but nulls|null instead|null rows"):
        open_embeddings(nulls).validate()
    none = write(tmp_path / "e.parquet", embedding=column([], kind))
    for source in (none, pq.read_table(none), pl.read_parquet(none)):
        with pytest.raises(EmbeddingError, match="no rows"):
            open_embeddings(source)


def test_lists_of_width_zero():
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float32(), 0)):
        with pytest.raises(EmbeddingError, match="width 0"):
            open_embeddings(pa.table({"embedding": column([[], []], kind)}))


def test_files_of_a_folder_that_do_not_agree(tmp_path):
    fixed = {w: pa.list_(pa.float32(), w) for w in (2, 3)}
    write(tmp_path / "w/0.parquet", embedding=column([[1.0, 2.0]], fixed[2]))
    write(tmp_path / "w/1.parquet", embedding=column([[1.0, 2.0, 3.0]], fixed[3]))
    with pytest.raises(EmbeddingError, match=r"several widths: 2 in '.*0.parquet', 3 in"):
        open_embeddings(tmp_path / "w")
    write(tmp_path / "l/0.parquet", embedding=[[1.0, 2.0]])
    write(tmp_path / "l/1.parquet", embedding=[[1.0, 2.0, 3.0]])
    with pytest.raises(EmbeddingError, match=r"another width than 2, .* \(first: item '1'"):
        open_embeddings(tmp_path / "l").validate()
    write(tmp_path / "t/0.parquet", embedding=[[1.0, 2.0]])
    write(tmp_path / "t/1.parquet", embedding=["text"])
    write(tmp_path / "t/2.parquet", other=["text"])
    with pytest.raises(EmbeddingError) as refused:
        open_embeddings(tmp_path / "t")
    assert "1.parquet' holds string; embeddings are lists" in refused.value.problems[0]
    assert "2.parquet' has no column 'embedding'" in refused.value.problems[1]


def test_float_widths_may_differ_between_files(tmp_path):
    write(tmp_path / "f/0.parquet", embedding=column([[1.0, 2.0]], pa.list_(pa.float16(), 2)))
    write(tmp_path / "f/1.parquet", embedding=column([[3.0, 4.0]], pa.list_(pa.float64())))
    np.testing.assert_array_equal(open_embeddings(tmp_path / "f").rows([1, 0]), [[3, 4], [1, 2]])


def test_unknown_column_offers_the_nearest(tmp_path):
    path = write(tmp_path / "x.parquet", item_id=["a"], embeddings=[[1.0]], price=[2.0])
    for source in (path, pq.read_table(path), pd.read_parquet(path), pl.read_parquet(path)):
        message = r"no column 'embeding'; did you mean 'embeddings'\?.*--embedding-column"
        with pytest.raises(UsageError, match=message):
            open_embeddings(source, embedding_column="embeding")
        with pytest.raises(UsageError, match=r"no column 'item'; did you mean 'item_id'"):
            open_embeddings(source, id_column="item")
        with pytest.raises(EmbeddingError, match=r"'price' .* holds double.*'embeddings' would do"):
            open_embeddings(source, embedding_column="price")
        assert open_embeddings(source).ids[0] == "a"


def test_no_column_or_several(tmp_path):
    none = write(tmp_path / "n.parquet", item_id=["a"], f0=[1.0], codes=[[1, 2]])
    for source in (none, pq.read_table(none), pl.read_parquet(none)):
        with pytest.raises(
            EmbeddingError, match=r"no column of float lists.*'codes' \((large_)?list"
        ):
            open_embeddings(source)
    several = pa.table({"text": [[1.0]], "image": [[1.0, 2.0]]})
    with pytest.raises(UsageError, match=r"2 columns of float lists, 'text', 'image'.*choose one"):
        open_embeddings(several)
    assert open_embeddings(several, embedding_column="image").dim == 2
    assert open_embeddings(several.rename_columns(["embedding", "image"])).dim == 1


def test_integer_lists_are_refused():
    with pytest.raises(EmbeddingError, match=r"holds list<.*int64>; embeddings are lists of float"):
        open_embeddings(pa.table({"embedding": [[1, 2]]}))


@pytest.mark.parametrize("cut", [0.5, 0.98])
def test_truncated_parquet(cut, tmp_path):
    path = write(tmp_path / "x.parquet", embedding=list(X))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(EmbeddingError, match="truncated, damaged or another format"):
        open_embeddings(path)


def test_null_rows_that_an_old_pyarrow_cannot_read(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", embedding=column([[1.0, 2.0]], pa.list_(pa.float32(), 2)))

    def refuse(*args, **options):
        raise pa.ArrowInvalid("Expected all lists to be of size=2 but index 2 had size=0")

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", refuse)
    with pytest.raises(EmbeddingError, match=r"null rows in a column of fixed-size lists, .*>=26'"):
        open_embeddings(path).validate()


def test_damage_inside_a_parquet_file(tmp_path):
    path = tmp_path / "x.parquet"
    rows = np.random.default_rng(0).normal(size=(3000, 8)).tolist()
    pq.write_table(pa.table({"embedding": rows}), path, row_group_size=1000)
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data[at : at + 5000] = bytes(5000)
    path.write_bytes(data)
    with pytest.raises(EmbeddingError, match="truncated, damaged or another format"):
        open_embeddings(path, ids=range(3000)).validate()


def test_paths_with_nothing_there(tmp_path):
    with pytest.raises(UsageError, match=r"x.npy' does not exist"):
        open_embeddings(tmp_path / "x.npy")
    with pytest.raises(UsageError, match="does not exist"):
        open_embeddings(str(tmp_path / "x.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no files"):
        open_embeddings(tmp_path / "empty")
    with pytest.raises(UsageError, match="matches no file"):
        open_embeddings(f"{tmp_path}/*.parquet")


def test_folder_with_other_files(tmp_path):
    write(tmp_path / "x.parquet", embedding=list(X))
    (tmp_path / "notes.md").write_text("hi")
    with pytest.raises(
        UsageError, match=r"holds files that are not Parquet \(1, first: .*notes.md.*by a glob"
    ):
        open_embeddings(tmp_path)
    assert len(open_embeddings(f"{tmp_path}/*.parquet")) == 9


def test_wrong_kinds_of_source(tmp_path):
    with pytest.raises(UsageError, match=r"numpy\.asarray"):
        open_embeddings([[1.0, 2.0]])
    with pytest.raises(UsageError, match="a NoneType"):
        open_embeddings(None)
    with pytest.raises(UsageError, match=r"on_invalid='drop' is not one of 'error', 'skip'"):
        open_embeddings(X, on_invalid="drop")
    with pytest.raises(UsageError, match="does not apply"):
        open_embeddings(X, embedding_column="embedding")
    with pytest.raises(UsageError, match=r"--ids items\.parquet:asin"):
        open_embeddings(X, id_column="asin")


def test_pandas_column_of_mixed_things():
    frame = pd.DataFrame({"embedding": [np.ones(2), "text", np.ones(2)]})
    with pytest.raises(EmbeddingError, match="something other than lists of numbers"):
        open_embeddings(frame).validate()
    deep = pd.DataFrame({"embedding": [np.ones((2, 2)), np.ones((2, 2))]})
    with pytest.raises(EmbeddingError, match="one flat list"):
        open_embeddings(deep).validate()


def test_ids_of_another_length_and_duplicates(tmp_path):
    for source in (X, torch.from_numpy(X), write(tmp_path / "x.parquet", embedding=list(X))):
        with pytest.raises(IdsError, match="9 rows and there are 3 ids; give one id per row"):
            open_embeddings(source, ids=["a", "b", "c"])
    twice = write(tmp_path / "d.parquet", item_id=list("abcabcabc"), embedding=list(X))
    with pytest.raises(
        IdsError, match=r"3 ids more than once \(6 rows too many\): 'a' \(3 times\)"
    ):
        open_embeddings(twice)
