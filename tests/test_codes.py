"""Semantic IDs: shapes, look-ups, Parquet and fingerprints."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catalogue_cases import codes_info
from semid.codes import SemanticIds, code_dtype
from semid.data.ids import ItemIds
from semid.errors import (
    ArtefactError,
    FingerprintError,
    IdsError,
    InputError,
    OutputExistsError,
    UsageError,
)

INFO = codes_info((4, 8), beam_width=2)


def make(items=("x", "y", "z"), codes=((0, 7), (3, 1), (0, 2)), info=INFO) -> SemanticIds:
    return SemanticIds(
        ItemIds(list(items)),
        np.array(codes),
        np.arange(len(codes), dtype=np.float32),
        info,
    )


def test_parquet_round_trip(tmp_path):
    ids = make()
    ids.write(tmp_path / "ids.parquet")
    back = SemanticIds.read(tmp_path / "ids.parquet")
    assert back.info == INFO
    assert np.array_equal(back.codes, ids.codes)
    assert back.codes.dtype == np.uint16
    assert np.array_equal(back.residual_norms, ids.residual_norms)
    assert back.items.strings().to_pylist() == ["x", "y", "z"]
    schema = pq.read_schema(tmp_path / "ids.parquet")
    assert schema.field("codes").type.list_size == 2
    assert schema.field("codes").type.value_type == pa.uint16()


@pytest.mark.parametrize(
    "column", [pa.array([7, 8, 9], pa.int32()), pa.array(["p", "q", "r"]).dictionary_encode()]
)
def test_item_type_is_kept(tmp_path, column):
    ids = SemanticIds(ItemIds(column), make().codes, make().residual_norms, INFO)
    ids.write(tmp_path / "ids.parquet")
    stored = pq.read_table(tmp_path / "ids.parquet")["item_id"]
    assert stored.to_pylist() == column.to_pylist()
    if pa.types.is_integer(column.type):
        assert stored.type == column.type


def test_large_codebooks_take_uint32():
    assert code_dtype([256, 65_536]) == np.uint16
    assert code_dtype([65_537]) == np.uint32
    wide = make(codes=((69_999,), (1,), (2,)), info=codes_info((70_000,)))
    assert wide.codes.dtype == np.uint32


def test_lookup_of_one_and_of_many():
    ids = make()
    assert ids.lookup("y").tolist() == [3, 1]
    assert ids.lookup(["z", "x"]).tolist() == [[0, 2], [0, 7]]
    with pytest.raises(IdsError, match=r"1 of 2 items .* 'nope'"):
        ids.lookup(["x", "nope"])


@pytest.mark.parametrize("items", [(3, 5, 7), ("3", "5", "7")])
def test_lookup_by_integers(items):
    ids = make(items=items)
    for item in (5, np.int64(5), np.uint8(5), "5", np.str_("5"), pa.scalar(5)):
        assert ids.lookup(item).tolist() == [3, 1]
    for several in ([7, 3], (7, 3), np.array([7, 3]), pa.array([7, 3]), range(7, 2, -4), ["7", 3]):
        assert ids.lookup(several).tolist() == [[0, 2], [0, 7]]
    with pytest.raises(IdsError, match=r"1 of 1 items .*first: '4'; ids look like '3'"):
        ids.lookup(4)
    with pytest.raises(IdsError, match=str(2**70)):
        ids.lookup(2**70)


def test_lookup_by_what_is_no_id():
    ids = make()
    with pytest.raises(IdsError, match=r"1 of 1 items .*first: '3'; ids look like 'x'"):
        ids.lookup(3)
    with pytest.raises(IdsError, match="1 would match without spaces"):
        ids.lookup("x ")
    for value in (3.0, None, True, b"x", [1.5], np.array([True])):
        with pytest.raises(UsageError, match="ids, which are strings or integers, not by"):
            ids.lookup(value)
    with pytest.raises(IdsError, match="not valid Unicode"):
        ids.lookup("\ud800")


def test_files_of_a_folder_may_hold_text_ids_in_different_types(tmp_path):
    for number, column in enumerate((pa.array(["a", "b", "c"]), pa.array(["d", "e", "f"]))):
        kept = column if number else column.dictionary_encode()
        part = SemanticIds(ItemIds(kept), make().codes, make().residual_norms, INFO)
        part.write(tmp_path / f"{number}.parquet")
    assert SemanticIds.read(tmp_path).items.strings().to_pylist() == list("abcdef")


def test_prefixes():
    ids = make()
    assert ids.with_prefix((0,)).tolist() == [0, 2]
    assert ids.with_prefix((0, 2)).tolist() == [2]
    assert ids.with_prefix(()).tolist() == [0, 1, 2]
    assert ids.with_prefix((2,)).tolist() == []
    with pytest.raises(UsageError, match="2 levels"):
        ids.with_prefix((0, 1, 2))


def test_what_does_not_fit_is_listed_at_once():
    with pytest.raises(InputError) as caught:
        SemanticIds(ItemIds(["x"]), np.array([[4, 9], [0, 0]]), np.zeros(2, dtype=np.float32), INFO)
    assert len(caught.value.problems) == 3
    with pytest.raises(InputError, match="expected"):
        make(codes=((1,), (2,), (3,)))


def test_other_codebooks_are_refused():
    make().check_codebook("a" * 64)
    with pytest.raises(FingerprintError, match="another codebook"):
        make().check_codebook("c" * 64)


def test_files_that_are_no_ids(tmp_path):
    with pytest.raises(ArtefactError, match="does not exist"):
        SemanticIds.read(tmp_path / "none.parquet")
    pq.write_table(pa.table({"item_id": ["x"]}), tmp_path / "plain.parquet")
    with pytest.raises(ArtefactError, match="no semid fingerprint"):
        SemanticIds.read(tmp_path / "plain.parquet")
    make().write(tmp_path / "ids.parquet")
    with pytest.raises(OutputExistsError, match="--overwrite"):
        make().write(tmp_path / "ids.parquet")
    whole = (tmp_path / "ids.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:100])
    with pytest.raises(ArtefactError, match="cannot be read"):
        SemanticIds.read(tmp_path / "cut.parquet")
    table = pq.read_table(tmp_path / "ids.parquet").drop_columns(["codes"])
    pq.write_table(table, tmp_path / "lacks.parquet")
    with pytest.raises(ArtefactError, match="lacks the columns codes"):
        SemanticIds.read(tmp_path / "lacks.parquet")


def test_newer_formats_are_refused(tmp_path):
    make().write(tmp_path / "ids.parquet")
    table = pq.read_table(tmp_path / "ids.parquet")
    metadata = {b"semid": table.schema.metadata[b"semid"].replace(b'version": 2', b'version": 99')}
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "new.parquet")
    with pytest.raises(ArtefactError, match="format version 99"):
        SemanticIds.read(tmp_path / "new.parquet")
