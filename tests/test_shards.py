"""K-means over shards: the same bits however the blocks are shared out, and mergeable counts."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import semid
from distributed_cases import many_rows
from semid.errors import InputError, UsageError
from semid.health import (
    CapacityCounter,
    CollisionCounter,
    UsageCounter,
    collisions,
    merge_capacities,
    merge_collisions,
    usage,
)
from semid.quantization.blocks import (
    BLOCK_ROWS,
    ArrayBlocks,
    Preprocess,
    TreeSum,
    cut_blocks,
    merge_nodes,
)
from semid.quantization.kmeans import KMeansOptions, kmeans
from semid.quantization.product import fit_product, part_slices
from semid.quantization.residual import fit_residual
from semid.quantization.sharding import Shard, ShardedMatrix, as_sharded, payload_bytes
from semid.training.distributed import local_world_size, shard_spans


class Term:
    """A sum that shows its brackets."""

    def __init__(self, text: str) -> None:
        self.text = text

    def add_(self, other: Term) -> None:
        self.text = f"({self.text}+{other.text})"


class SeveralShards:
    """A team of shards in this process, as processes and actors hold them."""

    def __init__(self, x: np.ndarray, shards: int, weights: np.ndarray | None = None) -> None:
        self.spans = shard_spans(len(x), shards)
        self.shards = [
            Shard(
                ArrayBlocks(x[a:b]),
                first_row=-(-a // BLOCK_ROWS) * BLOCK_ROWS,
                weights=None if weights is None else weights[a:b],
                threads=1,
            )
            for a, b in self.spans
        ]

    def _ask(self, shard, method, arguments):
        # Calls and answers travel, as between processes.
        answer = getattr(shard, method)(*pickle.loads(pickle.dumps(arguments)))
        return pickle.loads(pickle.dumps(answer))

    def call(self, method, arguments):
        return {at: self._ask(self.shards[at], method, each) for at, each in arguments.items()}

    def call_all(self, method, *arguments):
        return merge_nodes([self._ask(shard, method, arguments) for shard in self.shards])


def bracketed(blocks: int, shards: int) -> str:
    parts = []
    for first, last in cut_blocks(blocks, shards):
        tree: TreeSum[Term] = TreeSum()
        for block in range(first, last):
            tree.add(block, Term(str(block)))
        parts.append(tree.nodes)
    whole: TreeSum[Term] = TreeSum()
    whole.nodes = merge_nodes(parts)
    return whole.total().text


@given(blocks=st.integers(1, 200), shards=st.integers(1, 40))
@settings(deadline=None)
def test_brackets_do_not_depend_on_shards(blocks, shards):
    assert bracketed(blocks, shards) == bracketed(blocks, 1)


def test_few_blocks_are_added_in_order():
    assert bracketed(1, 1) == "0"
    assert bracketed(2, 2) == "(0+1)"
    assert bracketed(3, 2) == "((0+1)+2)"
    assert bracketed(5, 1) == "(((0+1)+(2+3))+4)"


@given(blocks=st.integers(0, 100_000), shards=st.integers(1, 64))
@settings(deadline=None)
def test_cuts_cover_all_blocks_and_are_fair(blocks, shards):
    cuts = cut_blocks(blocks, shards)
    assert [a for a, _ in cuts] == [0, *[b for _, b in cuts][:-1]]
    assert cuts[-1][1] == blocks
    assert max(b - a for a, b in cuts) <= max(blocks / shards * 1.125, blocks / shards + 1)


def test_a_sum_of_nothing_is_refused():
    with pytest.raises(UsageError, match="at least one"):
        TreeSum().total()


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return many_rows()


@pytest.mark.parametrize(("shards", "weighted"), [(3, False), (7, True)])
def test_shards_end_with_the_same_bits(rows, shards, weighted):
    weights = np.random.default_rng(0).random(len(rows)) if weighted else None
    options = KMeansOptions(max_iter=2)
    alone = kmeans(ArrayBlocks(rows), 12, seed=5, options=options, weights=weights)
    team = SeveralShards(rows, shards, weights)
    shared = kmeans(
        ShardedMatrix(team, dim=rows.shape[1], weights=weights), 12, seed=5, options=options
    )
    assert alone.centroids.tobytes() == shared.centroids.tobytes()
    assert alone.history == shared.history
    labels = np.concatenate([shard.labels for shard in team.shards])
    assert (labels == alone.labels).all()
    assert len(shared.labels) == 0


@pytest.mark.parametrize("sample", [None, 500])
def test_residual_levels_over_shards(rows, sample):
    options = KMeansOptions(max_iter=1, sample_per_code=sample)
    books, fits = fit_residual(ArrayBlocks(rows), [5, 6], seed=1, options=options)
    team = ShardedMatrix(SeveralShards(rows, 3), dim=rows.shape[1])
    shared, shared_fits = fit_residual(team, [5, 6], seed=1, options=options)
    assert [book.tobytes() for book in books] == [book.tobytes() for book in shared]
    assert fits == shared_fits


def test_a_resumed_level_finds_its_labels_again(rows):
    options = KMeansOptions(max_iter=1)
    books, fits = fit_residual(ArrayBlocks(rows), [5, 6], seed=1, options=options)
    team = ShardedMatrix(SeveralShards(rows, 2), dim=rows.shape[1])
    done = [(books[0], np.empty(0, np.int64), fits[0])]
    again, _ = fit_residual(team, [5, 6], seed=1, options=options, done=done)
    assert books[1].tobytes() == again[1].tobytes()


def test_empty_clusters_are_seeded_alike(rows):
    init = np.concatenate([rows[:4], np.full((4, rows.shape[1]), 50, np.float32)])
    options = KMeansOptions(max_iter=2)
    alone = kmeans(ArrayBlocks(rows), 8, seed=0, options=options, init=init)
    team = ShardedMatrix(SeveralShards(rows, 3), dim=rows.shape[1])
    shared = kmeans(team, 8, seed=0, options=options, init=init)
    assert alone.centroids.tobytes() == shared.centroids.tobytes()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", [semid.PQ, semid.OPQ])
def test_product_codes_over_shards(rows, kind, weighted):
    weights = np.random.default_rng(0).random(len(rows)) if weighted else None
    settings = {"n_codebooks": 3, "codebook_size": 9, "center": True, "normalize": weighted}
    settings |= {"rotation_iter": 2} if kind is semid.OPQ else {}
    settings |= {"kmeans": {"max_iter": 2, "sample_per_code": 20_000 if weighted else None}}
    alone = kind(validation_fraction=0, **settings).fit(rows, weights=weights)
    for shards in (1, 3):
        team = SeveralShards(rows, shards, weights)
        model = kind(**settings)
        assert model.fits_shards
        levels = model.fit_rows(ShardedMatrix(team, dim=rows.shape[1], weights=weights))
        assert levels == alone.report.details["levels"]
        assert model.weights_fingerprint == alone.weights_fingerprint


@pytest.mark.parametrize("weighted", [False, True])
def test_mixtures_over_shards(rows, weighted):
    weights = np.random.default_rng(0).random(len(rows)) if weighted else None
    settings = {"levels": 2, "codebook_size": 7, "max_em_iter": 3, "center": True}
    settings |= {"covariance": "spherical" if weighted else "diagonal", "normalize": weighted}
    settings |= {"kmeans": {"max_iter": 2, "sample_per_code": 20_000 if weighted else None}}
    alone = semid.RQGMM(validation_fraction=0, **settings).fit(rows, weights=weights)
    for shards in (1, 3):
        team = SeveralShards(rows, shards, weights)
        model = semid.RQGMM(**settings)
        assert model.fits_shards
        levels = model.fit_rows(ShardedMatrix(team, dim=rows.shape[1], weights=weights))
        assert levels == alone.report.details["levels"]
        assert model.weights_fingerprint == alone.weights_fingerprint
    # What the shards have subtracted is what hard codes leave.
    sums = ShardedMatrix(team, dim=rows.shape[1])
    first = np.arange(9)
    codes = alone.encode(rows[:9]).codes.astype(int)
    left = alone.latent(rows[:9]) - alone.codebooks[0][codes[:, 0]]
    np.testing.assert_array_equal(sums.rows(first), left)


class Saved:
    """A store of states in memory, which ends the run at one of them."""

    def __init__(self, state=None, after: int = 0) -> None:
        self.state, self.left = state, after

    def save(self, arrays, record) -> None:
        self.state = {name: array.copy() for name, array in arrays.items()}, record
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_mixture_is_continued_from_every_state(rows):
    def fit(store):
        model = semid.RQGMM(levels=2, codebook_size=5, max_em_iter=2, kmeans={"max_iter": 2})
        model.fit_rows(ShardedMatrix(SeveralShards(rows[:70_000], 2), dim=4), store=store)
        return model.weights_fingerprint

    counted = Saved()
    whole = fit(counted)
    for after in range(1, -counted.left + 1):
        store = Saved(after=after)
        with pytest.raises(KeyboardInterrupt):
            fit(store)
        assert fit(Saved(store.state)) == whole


def test_the_variance_of_shards_is_numpys(rows):
    team = ShardedMatrix(SeveralShards(rows, 3), dim=rows.shape[1])
    assert team.variance() == pytest.approx(rows.astype(float).var(axis=0).mean())
    team.preprocess(Preprocess(mean=np.full(4, 2, np.float32)))
    assert team.variance() == pytest.approx(rows.astype(float).var(axis=0).mean())


def test_empty_codewords_of_parts_are_seeded_alike(rows):
    # Most rows are copies of few, so that the farthest rows are copies too.
    copies = np.concatenate([np.repeat(rows[:7], 20_000, axis=0), rows[:9], rows[:5] + 3])
    init = [np.full((12, 2), 50, np.float32) + np.arange(12, dtype=np.float32)[:, None]] * 2
    settings = {"seed": 0, "options": KMeansOptions(max_iter=1), "init": init}
    slices = part_slices(4, 2)
    alone, _ = fit_product(ArrayBlocks(copies), slices, [12, 12], **settings)
    team = ShardedMatrix(SeveralShards(copies, 3), dim=4)
    shared, _ = fit_product(team, slices, [12, 12], **settings)
    for mine, theirs in zip(alone, shared, strict=True):
        assert mine.tobytes() == theirs.tobytes()
        assert len(np.unique(mine, axis=0)) == 12
        assert mine.max() < 20  # one of them gets all rows at first, and the others move at once


def test_preparation_over_shards(rows):
    team = ShardedMatrix(SeveralShards(rows, 3), dim=rows.shape[1])
    mean = team.mean().astype(np.float32)
    whole = Preprocess.fit(ArrayBlocks(rows), center=True, normalize=False).mean
    assert whole is not None
    assert mean.tobytes() == whole.tobytes()
    team.preprocess(Preprocess(mean=mean))
    wanted = np.array([199_999, 0, 70_000])
    np.testing.assert_array_equal(team.rows(wanted), rows[wanted] - mean)


def test_more_shards_than_blocks(rows):
    few = rows[:1000]
    alone = kmeans(ArrayBlocks(few), 10, seed=2)
    shared = kmeans(ShardedMatrix(SeveralShards(few, 4), dim=few.shape[1]), 10, seed=2)
    assert alone.centroids.tobytes() == shared.centroids.tobytes()


def test_farthest_rows_go_by_loss_then_row():
    x = np.zeros((10, 2), np.float32)
    x[[2, 5, 7], 0] = [3, 9, 9]
    found = as_sharded(ArrayBlocks(x))
    found.assign(np.zeros((1, 2), np.float32))
    assert found.farthest(2).tolist() == [5, 7]
    assert found.farthest(10).tolist() == [5, 7, 2]


def test_payload_counts_arrays():
    node = as_sharded(ArrayBlocks(np.ones((4, 3), np.float32))).pool.call_all("moments")
    assert payload_bytes(node) == 3 * 8 + 8 + 8
    assert payload_bytes({1: (np.zeros(4, np.int64), [2.0, "x"])}) == 40


def test_processes_of_one_machine_share_its_cpus(monkeypatch):
    assert local_world_size() == 1
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert local_world_size() == 4


# Counts over codes that do not fit one machine ------------------------------------------------


def shards_of(codes: np.ndarray, count: int) -> list[np.ndarray]:
    return np.array_split(codes, count)


@pytest.mark.parametrize("sizes", [[6, 5, 4], [2**30, 2**30, 2**30]])
def test_collisions_of_parts_are_those_of_the_whole(sizes):
    generator = np.random.default_rng(1)
    codes = np.stack(
        [generator.integers(0, min(size, 7 - i), 3000) % size for i, size in enumerate(sizes)],
        axis=1,
    )
    groups = generator.integers(0, 400, 3000).astype(np.uint64)
    codes = codes[groups.astype(int)]  # equal inputs have equal ids
    counters = []
    for part, group in zip(shards_of(codes, 3), shards_of(groups, 3), strict=True):
        counter = CollisionCounter(sizes)
        counter.update(part, duplicate_groups=group)
        counters.append(counter)
    assert sum(len(counter) for counter in counters) == 3000
    splits = [counter.split(4) for counter in counters]
    results = []
    for part in range(4):
        whole = CollisionCounter(sizes)
        for split in splits:
            whole.merge(split[part])
        if len(whole):
            results.append(whole.result())
    assert merge_collisions(results) == collisions(codes, duplicate_groups=groups)
    brute = Counter(map(tuple, codes.tolist()))
    merged = merge_collisions(results)
    assert merged.unique_ids == len(brute)
    assert merged.colliding_item_rate == sum(n for n in brute.values() if n > 1) / 3000
    assert dict(merged.histogram) == dict(sorted(Counter(brute.values()).items()))


def test_usage_of_parts_is_that_of_the_whole():
    codes = np.random.default_rng(0).integers(0, 8, (1000, 2))
    whole = UsageCounter([8, 8])
    for part in shards_of(codes, 5):
        counter = UsageCounter([8, 8])
        counter.update(part)
        for counts in counter._counts:
            counts.flags.writeable = False  # as they come from another process
        counter.merge(whole)
        whole = counter
    assert whole.result() == usage(codes, 8)


def test_capacity_of_parts_is_that_of_brute_force():
    generator = np.random.default_rng(2)
    codes = generator.integers(0, 5, (800, 2))
    segments = generator.integers(0, 3, 800)
    results = []
    counters = []
    for part, own in zip(shards_of(codes, 4), shards_of(segments, 4), strict=True):
        counter = CapacityCounter([5, 5], 3)
        counter.update(part, own)
        counters.append(counter.split(3))
    for part in range(3):
        whole = CapacityCounter([5, 5], 3)
        for split in counters:
            whole.merge(split[part])
        results.append(whole.result())
    merged = merge_capacities(results)
    sizes = Counter(map(tuple, codes.tolist()))
    for segment in range(3):
        own = [sizes[tuple(code)] for code in codes[segments == segment].tolist()]
        assert merged.items[segment] == len(own)
        assert merged.capacity_shares[segment] == pytest.approx(sum(1 / n for n in own) / 25)
        assert merged.colliding_item_rates[segment] == sum(n > 1 for n in own) / len(own)
    assert sum(merged.capacity_shares) == pytest.approx(1.0)


def test_what_cannot_be_merged_is_refused():
    counter = CollisionCounter([4])
    counter.update([[1], [2]])
    with pytest.raises(UsageError, match="parts=0"):
        counter.split(0)
    with pytest.raises(InputError, match="at least one"):
        merge_collisions([])
    with_hashes = collisions([[1]], duplicate_groups=[3])
    with pytest.raises(InputError, match="1 of 2 parts"):
        merge_collisions([with_hashes, collisions([[2]])])
    with pytest.raises(InputError, match="segments run from 0 to 4"):
        CapacityCounter([4], 2).update([[1], [2]], [0, 4])
    with pytest.raises(UsageError, match="segments=0"):
        CapacityCounter([4], 0)
    with pytest.raises(UsageError, match="2 and 3 segments"):
        CapacityCounter([4], 2).merge(CapacityCounter([4], 3))
    with pytest.raises(InputError, match="same segments"):
        merge_capacities([])
