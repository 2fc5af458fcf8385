"""New items never move a published id; a killed writer leaves the version before it readable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from catalogue_cases import drawn_tokenizer, rows
from semid.catalogue.additions import add_items, norm_quantiles, novelty
from semid.catalogue.bundle import CatalogueBundle
from semid.catalogue.uniqueness import make_unique
from semid.data.ids import ItemIds
from semid.errors import (
    ArtefactError,
    FingerprintError,
    IdsError,
    InputError,
    OutputExistsError,
    UsageError,
)


def names(start, stop):
    return ItemIds([f"i{n}" for n in range(start, stop)])


@pytest.fixture(scope="module")
def tokenizer():
    return drawn_tokenizer(sizes=(8, 16))


@pytest.fixture(scope="module")
def x():
    return rows(120)


def published(tokenizer, x, method):
    ids = tokenizer.encode(x[:80], ids=names(0, 80))
    return make_unique(
        ids, method=method, tokenizer=tokenizer, embeddings=x[:80], embedding_ids=names(0, 80)
    ).ids


@pytest.mark.parametrize("method", ["none", "append", "reassign"])
def test_published_ids_stay_and_new_ones_are_unique(tokenizer, x, method):
    before = published(tokenizer, x, method)
    done = add_items(before, tokenizer, x[60:], ids=names(60, 120))  # 20 known ones among them
    assert np.array_equal(done.ids.codes[:80], before.codes)
    assert done.ids.items == names(0, 120)
    assert (done.report.given, done.report.known, done.report.new) == (60, 20, 40)
    assert done.report.stale == 0
    assert np.array_equal(done.ids.encoded, tokenizer.encode(x).codes)
    counts = np.unique(done.ids.codes, axis=0, return_counts=True)[1]
    if method == "append":
        assert counts.max() == 1
    if method == "reassign":
        shared_before = 80 - len(np.unique(before.codes, axis=0))
        assert (counts - 1).sum() - shared_before <= done.report.unplaced
        assert np.array_equal(done.ids.codes[:, 0], done.ids.encoded[:, 0])
    again = add_items(done.ids, tokenizer, x[60:], ids=names(60, 120))
    assert again.report.new == 0
    assert np.array_equal(again.ids.codes, done.ids.codes)
    moved = add_items(done.ids, tokenizer, x[60:] + 3.0, ids=names(60, 120))
    assert moved.report.stale > 0
    assert np.array_equal(moved.ids.codes, done.ids.codes)


def test_new_tokens_follow_the_published_ones(tokenizer, x):
    before = published(tokenizer, x, "append")
    copies = np.repeat(x[:1], 3, axis=0)
    done = add_items(before, tokenizer, copies, ids=names(200, 203))
    bucket = (before.encoded == before.encoded[0]).all(1)
    top = before.codes[bucket, -1].max()
    assert done.ids.codes[80:, -1].tolist() == [top + 1, top + 2, top + 3]


def test_reassigned_additions_go_round_published_codes(tokenizer, x):
    before = published(tokenizer, x, "reassign")
    prefixes, counts = np.unique(before.codes[:, 0], return_counts=True)
    prefix = prefixes[counts.argmin()]
    row = int(np.flatnonzero(before.codes[:, 0] == prefix)[0])
    done = add_items(before, tokenizer, x[[row]], ids=names(200, 201))  # a copy of that item
    taken = {tuple(codes) for codes in before.codes.tolist()}
    free = [code for code in range(16) if (prefix, code) not in taken]
    left = x[row] - tokenizer.codebooks[0][prefix]
    nearest = min(free, key=lambda code: ((left - tokenizer.codebooks[1][code]) ** 2).sum())
    assert done.ids.codes[80].tolist() == [prefix, nearest]


def test_novelty_between_quantiles_that_repeat():
    norms = np.array([0.5, 1, 1.5, 2, 2.5, 3, 4], np.float32)
    scores = novelty(norms, (1.0, 1.0, 2.0, 2.0, 3.0))
    assert scores.tolist() == [0, 0.25, 0.5, 0.75, 0.875, 1, 1]


def test_novelty_is_a_percentile_of_the_reference(tokenizer, x):
    before = tokenizer.encode(x[:80], ids=names(0, 80))
    quantiles = norm_quantiles(before, tokenizer)
    scores = novelty(before.residual_norms, quantiles)
    ranks = np.argsort(np.argsort(before.residual_norms)) / 79
    np.testing.assert_allclose(scores, ranks, atol=0.02)
    done = add_items(
        before, tokenizer, np.concatenate([x[80:90], x[80:82] + 50]), ids=names(80, 92)
    )
    assert done.report.novelty[-2:].tolist() == [1.0, 1.0]
    assert done.report.novel >= 2
    # The reference stays that of the first catalogue, also after novel items came in.
    assert add_items(done.ids, tokenizer, x[:1]).ids.info.norm_quantiles == quantiles
    assert norm_quantiles(done.ids, tokenizer) == quantiles


def test_many_held_out_items_are_the_reference():
    tokenizer = drawn_tokenizer(sizes=(4, 4))
    tokenizer.validation_fraction = 0.5
    ids = tokenizer.encode(rows(1000))
    from semid.data.ids import held_out_mask
    from semid.tokenizers.stored import HELD_OUT_SALT

    held = held_out_mask(ids.items, 0.5, salt=HELD_OUT_SALT)
    assert norm_quantiles(ids, tokenizer)[-1] == pytest.approx(ids.residual_norms[held].max())


def test_wrong_catalogues_are_refused(tokenizer, x):
    before = tokenizer.encode(x[:80], ids=names(0, 80))
    with pytest.raises(FingerprintError, match="another codebook"):
        add_items(before, drawn_tokenizer(sizes=(8, 16), seed=3), x)
    with pytest.raises(UsageError, match="threshold=2"):
        add_items(before, tokenizer, x, threshold=2)
    numbers = tokenizer.encode(x[:80], ids=ItemIds(np.arange(80)))
    with pytest.raises(IdsError, match="catalogue's int64"):
        add_items(numbers, tokenizer, x[80:], ids=names(80, 120))
    done = add_items(numbers, tokenizer, x[80:], ids=ItemIds([str(n) for n in range(80, 120)]))
    assert done.ids.items.to_arrow().type == pa.int64()


def test_bundles_grow_and_keep_their_past(tokenizer, x, tmp_path):
    first = published(tokenizer, x, "append")
    bundle = CatalogueBundle.create(tmp_path / "b", first)
    second = add_items(first, tokenizer, x[80:100], ids=names(80, 100)).ids
    third = add_items(second, tokenizer, x[100:], ids=names(100, 120)).ids
    assert [bundle.append(second), bundle.append(third)] == [2, 3]
    for version, ids in ((1, first), (2, second), (3, third), (None, third)):
        read = CatalogueBundle(tmp_path / "b").read(version)
        assert np.array_equal(read.codes, ids.codes)
        assert np.array_equal(read.encoded, ids.encoded)
        assert read.items == ids.items
    assert read.info.norm_quantiles == third.info.norm_quantiles
    assert [part.rows for part in bundle.parts()] == [80, 20, 20]
    assert bundle.append(third) == 3  # nothing new: no version
    assert bundle.versions() == [1, 2, 3]
    with pytest.raises(InputError, match="only grows"):
        bundle.append(second)
    with pytest.raises(OutputExistsError, match="only grows"):
        CatalogueBundle.create(tmp_path / "b", first)
    with pytest.raises(UsageError, match="versions 1 to 3, not 9"):
        bundle.read(9)
    part = tmp_path / "b" / bundle.parts()[1].file
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert len(bundle.read(1)) == 80
    with pytest.raises(ArtefactError, match="not what was written"):
        bundle.read()
    part.unlink()
    with pytest.raises(ArtefactError, match="lacks the part"):
        bundle.read()
    with pytest.raises(ArtefactError, match="holds no manifest"):
        CatalogueBundle(tmp_path)


def test_the_second_of_two_writers_is_told(tokenizer, x, tmp_path, monkeypatch):
    first = tokenizer.encode(x[:80], ids=names(0, 80))
    bundle = CatalogueBundle.create(tmp_path / "b", first)
    both = [add_items(first, tokenizer, x[a : a + 20], ids=names(a, a + 20)).ids for a in (80, 100)]
    import semid.catalogue.bundle as module

    write = module._write_part

    def overtaken(folder, version, ids):
        monkeypatch.setattr(module, "_write_part", write)
        CatalogueBundle(folder).append(both[1])
        return write(folder, version, ids)

    monkeypatch.setattr(module, "_write_part", overtaken)
    with pytest.raises(ArtefactError, match="another writer"):
        bundle.append(both[0])
    assert np.array_equal(bundle.read().codes, both[1].codes)


WRITER = """
import sys, time, os
import semid.catalogue.bundle as module
from semid.codes import SemanticIds

folder, update, where = sys.argv[1:]
if where == "part":
    def write_bytes(self, data):
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            print("now", flush=True)
            time.sleep(60)
    module.Path.write_bytes = write_bytes
elif where == "manifest":
    def write_manifest(*arguments):
        print("now", flush=True)
        time.sleep(60)
    module._write_manifest = write_manifest
else:
    def write_text(self, text, **options):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            print("now", flush=True)
            time.sleep(60)
    module.Path.write_text = write_text
module.CatalogueBundle(folder).append(SemanticIds.read(update))
"""


def test_kill_in_the_middle_leaves_the_version_before(tokenizer, x, tmp_path):
    first = published(tokenizer, x, "append")
    bundle = CatalogueBundle.create(tmp_path / "b", first)
    second = add_items(first, tokenizer, x[80:], ids=names(80, 120)).ids
    second.write(tmp_path / "second.parquet")
    arguments = [
        sys.executable,
        "-c",
        WRITER,
        str(tmp_path / "b"),
        str(tmp_path / "second.parquet"),
    ]
    for where in ("part", "manifest", "half a manifest"):  # one writer at a time
        writer = subprocess.Popen([*arguments, where], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "now\n"
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        assert bundle.versions() == [1]
        assert np.array_equal(CatalogueBundle(tmp_path / "b").read().codes, first.codes)
    assert bundle.append(second) == 2
    assert np.array_equal(bundle.read().codes, second.codes)


def test_the_report_can_be_written(tokenizer, x, tmp_path):
    before = published(tokenizer, x, "append")
    report = add_items(before, tokenizer, x[80:], ids=names(80, 120)).report
    report.write(tmp_path / "new.parquet")
    table = pq.read_table(tmp_path / "new.parquet")
    assert table.column_names == ["item_id", "residual_norm", "novelty", "novel", "unplaced"]
    assert sum(table["novel"].to_pylist()) == report.novel
    assert "40 new items" in report.summary()
