"""The synthetic catalogue: its structure is there, and depends on nothing but the seed."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from semid.data import synthetic
from semid.data.embeddings import open_embeddings
from semid.data.interactions import read_interactions
from semid.data.items import read_items
from semid.data.synthetic import DEPARTMENTS, PATHS, SyntheticCatalogue, plural
from semid.errors import OutputExistsError, UsageError

SMALL = SyntheticCatalogue(items=6_000, dim=24, users=5_000, seed=3)


def test_written_files_are_read_back_as_they_were(tmp_path):
    files = SMALL.write(tmp_path / "catalogue")
    source = open_embeddings(files.embeddings, ids=str(files.items))
    matrix = SMALL.matrix()
    assert matrix.shape == (6_000, 24)
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(source.rows(range(6_000)), matrix)
    later = [block for _, block in SMALL.embeddings().blocks(1_000, first=3_000)]
    np.testing.assert_array_equal(np.concatenate(later), matrix[3_000:])
    assert source.ids == SMALL.ids
    assert pq.read_table(files.items).equals(SMALL.items_table())
    assert pq.read_table(files.interactions).equals(SMALL.interactions_table())
    log = read_interactions(files.interactions)
    assert log.order_column == "timestamp"
    assert log.sequences(source.ids).unknown == 0
    assert sorted(p.name for p in (tmp_path / "catalogue").glob("[!.]*")) == [
        "embeddings.npy",
        "interactions.parquet",
        "items.parquet",
    ]
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        SMALL.write(tmp_path / "catalogue")
    SMALL.write(tmp_path / "catalogue", overwrite=True, dtype="float16")
    assert np.load(files.embeddings).dtype == np.float16


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_as_a_column(tmp_path, dtype):
    files = SMALL.write(tmp_path, embeddings="parquet", dtype=dtype)
    source = open_embeddings(files.items)
    assert files.embeddings == files.items
    assert source.describe()["dtype"] == {"float16": "halffloat", "float32": "float"}[dtype]
    np.testing.assert_array_equal(
        source.rows(range(6_000)), SMALL.matrix().astype(dtype).astype(np.float32)
    )


def test_the_source_makes_the_same_rows_in_any_block():
    source, matrix = SMALL.embeddings(), SMALL.matrix()
    for size in (1_000, 4_096, 65_536):
        got = np.concatenate([block for _, block in source.blocks(size)])
        np.testing.assert_array_equal(got, matrix)
    rows = np.array([5_999, 0, 4_096, 4_095])
    np.testing.assert_array_equal(source.rows(rows), matrix[rows])
    assert open_embeddings(source) is source
    assert source.describe()["kind"] == "synthetic"


def test_the_seed_decides_and_a_larger_catalogue_begins_with_the_smaller(monkeypatch):
    again = SyntheticCatalogue(items=6_000, dim=24, users=5_000, seed=3)
    np.testing.assert_array_equal(again.matrix(), SMALL.matrix())
    assert again.interactions_table().equals(SMALL.interactions_table())
    larger = SyntheticCatalogue(items=9_000, dim=24, users=5_000, seed=3)
    np.testing.assert_array_equal(larger.matrix()[:6_000], SMALL.matrix())
    assert larger.items_table().slice(0, 6_000).equals(SMALL.items_table())
    more_users = SyntheticCatalogue(items=6_000, dim=24, users=6_000, seed=3)
    known = SMALL.interactions_table()
    assert more_users.interactions_table().slice(0, len(known)).equals(known)
    other = SyntheticCatalogue(items=6_000, dim=24, users=5_000, seed=4)
    assert np.abs(other.matrix() - SMALL.matrix()).max() > 0.1
    monkeypatch.setattr(synthetic, "_GROUP", 1)
    groups = [len(group) for group in SMALL._item_groups(None)]
    assert groups == [4_096, 1_904]


def test_embeddings_share_what_their_topics_share():
    x, niche = SMALL.matrix(), SMALL.niches()
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, len(x), (2, 200_000))
    cosine = (x[a] * x[b]).sum(1)
    same_niche = niche[a] == niche[b]
    same_aisle = (niche[a] // 4 == niche[b] // 4) & ~same_niche
    same_department = (niche[a] // 16 == niche[b] // 16) & ~same_niche & ~same_aisle
    far = niche[a] // 16 != niche[b] // 16
    levels = [cosine[m].mean() for m in (same_niche, same_aisle, same_department, far)]
    assert levels == sorted(levels, reverse=True)
    assert min(np.diff(levels[::-1])) > 0.05
    # Squared lengths that are shared: all, department, aisle, niche; then style, finish, noise.
    shared = np.cumsum([1.0, 0.9**2, 0.7**2, 0.55**2])
    cosines = shared / (shared[-1] + 0.35**2 + 0.2**2 + 0.45**2)
    np.testing.assert_allclose(levels[::-1], cosines, atol=0.12)
    # Anisotropy: even strangers point the same way, and few directions hold most variance.
    assert levels[-1] > 0.2
    spectrum = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2
    assert spectrum[:5].sum() / spectrum.sum() > 0.4


def test_popularity_has_a_long_tail():
    sequences = SMALL.interactions().sequences(SMALL.ids)
    counts = np.sort(np.bincount(sequences.items, minlength=6_000))[::-1]
    assert counts[:60].sum() / counts.sum() > 0.1
    assert counts[:1_200].sum() / counts.sum() > 0.5
    assert (counts == 0).any()
    declared = SMALL.items_table()["popularity"].to_numpy()
    drawn = np.bincount(sequences.items, minlength=6_000)
    assert np.corrcoef(np.argsort(np.argsort(declared)), np.argsort(np.argsort(drawn)))[0, 1] > 0.5


def test_users_follow_the_topics_and_time():
    table = SMALL.interactions_table()
    log = SMALL.interactions()
    sequences = log.sequences(SMALL.ids)
    assert len(sequences) == 5_000
    pairs = sequences.consecutive_pairs().pairs
    niche = SMALL.niches()
    same = (niche[pairs[:, 0]] == niche[pairs[:, 1]]).mean()
    shuffled = np.random.default_rng(0).permutation(pairs[:, 1])
    assert same > 0.4
    assert same > 5 * (niche[pairs[:, 0]] == niche[shuffled]).mean()
    assert 0.02 < (niche[pairs[:, 0]] // 16 != niche[pairs[:, 1]] // 16).mean() < 0.3
    user = log.users
    step = user[1:] == user[:-1]
    assert (np.diff(table["timestamp"].to_numpy())[step] > 0).all()
    assert (np.diff(table["position"].to_numpy())[step] == 1).all()
    assert (table["position"].to_numpy()[1:][~step] == 0).all()
    assert len(np.unique(user.astype(np.int64) * 6_000 + log.items)) == len(log)
    ratings, counts = np.unique(log.rating, return_counts=True)
    assert ratings.tolist() == [1, 2, 3, 4, 5]
    assert counts.argmax() in (2, 3, 4)


def test_ratings_and_times_are_those_that_the_text_states():
    """Ratings fall with the distance of a step and rise with the item's quality; 3 years, days."""
    log, table = SMALL.interactions(), SMALL.interactions_table()
    item = SMALL.ids.index_of(table["item_id"])
    niche, user, rating = SMALL.niches()[item], log.users, log.rating
    later = np.flatnonzero(user[1:] == user[:-1]) + 1
    near = niche[later] == niche[later - 1]
    far = niche[later] // 16 != niche[later - 1] // 16
    assert 0.5 < rating[later[near]].mean() - rating[later[far]].mean() < 1.1
    assert rating.mean() == pytest.approx(3.85, abs=0.1)
    sums = np.bincount(item, rating, 6_000), np.bincount(item, minlength=6_000)
    often = np.flatnonzero(sums[1] > 60)
    assert np.std(sums[0][often] / sums[1][often]) > 0.15
    steps = np.bincount(user)
    assert steps.min() >= 1
    assert 8 < steps.mean() < 11.5
    assert steps.max() <= 60
    times = table["timestamp"].to_numpy()
    starts = times[table["position"].to_numpy() == 0]
    assert len(np.unique(niche[table["position"].to_numpy() == 0])) > 100  # users start anywhere
    year = 365 * 86_400
    assert 0 <= starts.min() - 1_420_070_400 < year / 10
    assert 2.9 * year < starts.max() - 1_420_070_400 < 3 * year + 60 * 86_400
    assert np.diff(times)[later - 1].mean() / 86_400 == pytest.approx(8, rel=0.2)


def test_titles_and_categories_can_be_read():
    items = read_items(SMALL.items_table(), ids=SMALL.ids)
    niche = SMALL.niches()
    for row in range(0, 6_000, 997):
        department, aisle, noun = PATHS[niche[row]]
        assert f" {noun}, " in items.title(row)
        assert items.title(row).split(" " + noun)[0] in department.styles
        expected = f"{department.name} > {aisle} > {plural(noun).capitalize()}"
        assert items.categories[row].as_py() == expected
        assert items.brand[row].as_py() in department.brands
        assert items.title(row) in items.text[row].as_py()


def test_the_word_lists_are_as_regular_as_the_arithmetic_expects():
    assert len(PATHS) == 128
    for department in DEPARTMENTS:
        assert len(department.aisles) == 4
        assert {len(niches) for niches in department.aisles.values()} == {4}
        assert len(set(department.styles)) == 8
        assert len(set(department.finishes)) == len(set(department.brands)) == 6
    assert len({noun for _, _, noun in PATHS}) == 128
    assert [plural(w) for w in ("lamp", "brush", "story", "jersey", "box")] == [
        "lamps",
        "brushes",
        "stories",
        "jerseys",
        "boxes",
    ]


def test_the_smallest_catalogue_and_sizes_refused():
    tiny = SyntheticCatalogue(items=1, dim=2, users=1, seed=0)
    assert tiny.matrix().shape == (1, 2)
    assert len(tiny.interactions()) == 1
    assert SyntheticCatalogue(items=10).user_count == 5
    for bad in ({"items": 0}, {"dim": 1}, {"users": 0}, {"seed": -1}):
        with pytest.raises(UsageError, match=r"give (0 or more|at least)"):
            SyntheticCatalogue(**bad)
    with pytest.raises(UsageError, match="is not one of 'npy', 'parquet'"):
        tiny.write("nowhere", embeddings="csv")
