"""Beam search and the items of ids against brute force over all ids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from semid.catalogue.beams import Buckets, beam_search
from semid.catalogue.decoding import AllowedTokens, TorchTrie
from semid.catalogue.prefixes import PrefixIndex
from semid.errors import InputError, UsageError


def score_table(seed: int, users: int, sizes, *, low: float = -20.0) -> dict:
    """Return a random score for every prefix of every user, as a lazily filled table."""
    generator = np.random.default_rng(seed)
    return {
        "values": [generator.uniform(low, 0, (users, 97, size)) for size in sizes],
        "sizes": sizes,
    }


def row_of(prefix) -> int:
    """Return which of the 97 rows of scores belongs to a prefix."""
    return sum(int(code) * 7**place for place, code in enumerate(prefix)) % 97


def step_function(table, users: int, *, dtype=torch.float64, calls=None):
    """Return a step function that scores by prefix, and checks what it is told of its rows."""
    state = torch.zeros((users, 0), dtype=torch.int64)
    owner = torch.arange(users)

    def step(codes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        nonlocal state, owner
        # The state that follows the rows must be the prefix without its last code.
        state, owner = state[rows], owner[rows]
        depth = codes.shape[1]
        assert torch.equal(state, codes[:, : max(depth - 1, 0)])
        assert torch.equal(owner, torch.arange(users).repeat_interleave(len(codes) // users))
        if depth:
            assert ((codes >= 0) & (codes < torch.tensor(table["sizes"][:depth]))).all()
        state = codes
        if calls is not None:
            calls.append(len(codes))
        values = table["values"][depth]
        scores = [values[user, row_of(c)] for user, c in zip(owner, codes.tolist(), strict=True)]
        return torch.tensor(np.array(scores)).to(dtype)

    return step


def brute_force(ids, table, user: int, beams: int):
    """Return the beams of one user, by sorting at every level: [(score, prefix)]."""
    live = [(0.0, ())]
    for depth in range(len(table["sizes"])):
        prefixes = {row[: depth + 1] for row in ids}
        live = [
            (score + table["values"][depth][user, row_of(prefix), code], (*prefix, code))
            for score, prefix in live
            for code in range(table["sizes"][depth])
            if (*prefix, code) in prefixes
        ]
        live = sorted(live, reverse=True)[:beams]
    return live


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = draw(st.lists(row, min_size=1, max_size=40))
    order = draw(st.permutations(range(len(sizes))))
    return np.array(codes), sizes, list(order)


@settings(max_examples=120, deadline=None)
@given(catalogues(), st.integers(1, 3), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_beam_search_equals_brute_force(case, users, beams, seed):
    codes, sizes, order = case
    index = PrefixIndex.build(codes, sizes=sizes, order=order)
    ids = {tuple(row) for row in codes[:, order].tolist()}
    table = score_table(seed, users, index.sizes)
    best = beam_search(TorchTrie(index), step_function(table, users), users=users, beams=beams)
    for user in range(users):
        expected = brute_force(ids, table, user, beams)
        assert [tuple(row) for row in best.codes[user].tolist()] == [p for _, p in expected]
        np.testing.assert_allclose(best.scores[user], [s for s, _ in expected])
        assert best.leaves[user].tolist() == index.leaves(best.codes[user].numpy()).tolist()
    # As many beams as there are ids lose nothing: the best of all ids, exactly.
    if beams >= len(ids):
        totals = {
            row: sum(table["values"][d][0, row_of(row[:d]), row[d]] for d in range(len(row)))
            for row in ids
        }
        ranked = sorted(totals, key=totals.__getitem__, reverse=True)
        assert [tuple(r) for r in best.codes[0, : len(ids)].tolist()] == ranked


@settings(max_examples=60, deadline=None)
@given(catalogues(), st.integers(1, 12), st.integers(0, 2**32 - 1), st.sampled_from(["inf", "nan"]))
def test_ids_are_valid_and_distinct_whatever_the_scores_are(case, beams, seed, kind):
    """All or many scores are minus infinity or NaN, as float16 gives them."""
    codes, sizes, order = case
    index = PrefixIndex.build(codes, sizes=sizes, order=order)
    ids = {tuple(row) for row in codes[:, order].tolist()}
    generator = torch.Generator().manual_seed(seed)
    share = float(torch.rand((), generator=generator)) * 1.5  # above 1: all of them

    def step(prefix, rows):
        size = index.sizes[prefix.shape[1]]
        scores = torch.randn((len(prefix), size), generator=generator).half()
        mask = torch.rand(scores.shape, generator=generator) < share
        return scores.masked_fill(mask, -torch.inf if kind == "inf" else torch.nan)

    best = beam_search(TorchTrie(index), step, users=4, beams=beams)
    assert best.scores.dtype == torch.float32
    for user in range(4):
        rows = [tuple(row) for row in best.codes[user].tolist()]
        assert set(rows) <= ids
        assert len(set(rows)) == len(rows) == min(beams, len(ids))
        scores = best.scores[user].tolist()
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, -1.0])
def test_users_with_few_children_get_them_beside_users_with_many(value):
    """The padding of one user must not win over children that the model scores minus infinity."""
    codes = np.array([[0, n] for n in range(900)] + [[n, m] for n in range(1, 41) for m in (0, 7)])
    index = PrefixIndex.build(codes, sizes=(41, 900))
    first = torch.zeros((3, 41))
    first[:2, 0], first[2, 0] = -9, 9  # only the last user has the code with most items
    for beams in (1, 30, 40):
        best = beam_search(
            TorchTrie(index),
            lambda codes, rows: torch.full((len(codes), 900), value) if codes.shape[1] else first,
            users=3,
            beams=beams,
        )
        assert best.codes.shape == (3, beams, 2)
        for user, rows in enumerate(best.codes.tolist()):
            assert len(set(map(tuple, rows))) == beams
            assert index.contains(np.array(rows)).all()
            assert user == 2 or all(code > 0 for code, _ in rows)
        assert (best.scores[:2] == (-torch.inf if value != -1 else -1)).all()


def test_ids_with_finite_scores_come_first():
    index = PrefixIndex.build(np.arange(6)[:, None])
    scores = torch.tensor([[-3.0, torch.nan, -1.0, -torch.inf, -2.0, torch.inf]])
    best = beam_search(TorchTrie(index), lambda codes, rows: scores, users=1, beams=9)
    assert best.codes[0, :4, 0].tolist() == [5, 2, 4, 0]
    assert best.scores[0].tolist() == [torch.inf, -1, -2, -3, -torch.inf, -torch.inf]


def test_beam_search_writes_what_transformers_writes():
    """A T5 with its cache reordered by `rows`, against `generate` with the logits processor."""
    transformers = pytest.importorskip("transformers", reason="pip install 'semid[transformers]'")
    codes = np.random.default_rng(0).integers(0, 6, (40, 3))
    index = PrefixIndex.build(codes, sizes=(6, 6, 6))
    trie = TorchTrie(index)
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=20, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=19,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    first = [1, 7, 13]  # token of code 0 of each level
    history, mask = torch.randint(1, 19, (5, 9)), torch.ones((5, 9), dtype=torch.int64)
    mask[1, 6:] = 0
    encoded = model.get_encoder()(history, attention_mask=mask).last_hidden_state
    owner, cache = torch.zeros(0), None

    def step(prefix, rows):
        nonlocal owner, cache
        depth = prefix.shape[1]
        if depth == 0:
            owner, tokens = rows, torch.zeros((len(rows), 1), dtype=torch.int64)
        else:
            owner, tokens = owner[rows], prefix[:, -1:] + first[depth - 1]
            cache.reorder_cache(rows)
        output = model(
            encoder_outputs=(encoded[owner],), attention_mask=mask[owner],
            decoder_input_ids=tokens, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = output.past_key_values
        return output.logits[:, -1].log_softmax(-1)[:, first[depth] : first[depth] + 6]

    best = beam_search(trie, step, users=5, beams=7)
    tokens = [range(start, start + 6) for start in first]
    processor = AllowedTokens(trie, tokens, prompt_length=1, end_token=19)
    written = model.generate(
        history, attention_mask=mask, num_beams=7, num_return_sequences=7, max_new_tokens=4,
        logits_processor=[processor], do_sample=False, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert torch.equal(processor.written(written.sequences).view(5, 7, 3), best.codes)
    torch.testing.assert_close(written.sequences_scores.view(5, 7), best.scores)


def test_wrong_calls():
    trie = TorchTrie(PrefixIndex.build(np.array([[0, 1], [1, 0]])))
    with pytest.raises(UsageError, match="at least 1"):
        beam_search(trie, lambda codes, rows: codes, users=1, beams=0)
    with pytest.raises(UsageError, match=r"depth 0; give \(3, 2\)"):
        beam_search(trie, lambda codes, rows: torch.zeros(3, 5), users=3, beams=2)


@pytest.fixture(scope="module")
def shared():
    """Forty items with six ids, their popularity and their embeddings."""
    generator = np.random.default_rng(3)
    codes = generator.integers(0, 2, (40, 3))[generator.permutation(40)]
    codes[:3] = [[0, 1, 2], [1, 1, 2], [1, 0, 2]]
    return PrefixIndex.build(codes), codes, generator


def items_by_brute_force(codes, leaves, k, key):
    """Return the first k items of each user's ids, sorted inside an id by a key."""
    ids = sorted({tuple(row) for row in codes.tolist()})
    ranked = []
    for user, row in enumerate(leaves):
        items = [
            (item, place)
            for place, leaf in enumerate(row)
            if leaf >= 0
            for item in sorted(
                np.flatnonzero((codes == ids[leaf]).all(1)), key=lambda i: (key(user, i), i)
            )
        ]
        ranked.append((items + [(-1, -1)] * k)[:k])
    return np.array(ranked).transpose(2, 0, 1)


@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("order", ["popularity", "embedding", "random"])
def test_items_of_ids_equal_brute_force(shared, order, k):
    index, codes, _ = shared
    generator = np.random.default_rng(k)
    popularity = generator.integers(0, 5, 40)
    embeddings = generator.normal(size=(40, 6)).astype(np.float32)
    queries = generator.normal(size=(7, 6))
    leaves = np.array([generator.permutation(index.unique_ids) for _ in range(7)])[:, :5]
    leaves[2, 1:] = -1
    leaves[3] = -1
    buckets = Buckets(index, order=order, popularity=popularity, embeddings=embeddings, seed=1)
    rows, places = buckets.first_items(leaves, k, queries=queries)
    if order == "random":
        drawn = np.argsort(buckets.rows)
        key = lambda user, item: drawn[item]  # noqa: E731
        again = Buckets(index, order="random", seed=1)
        assert np.array_equal(buckets.rows, again.rows)
        assert not np.array_equal(buckets.rows, Buckets(index, order="random", seed=2).rows)
    elif order == "popularity":
        key = lambda user, item: -popularity[item]  # noqa: E731
    else:
        key = lambda user, item: ((embeddings[item] - queries[user]) ** 2).sum()  # noqa: E731
    expected = items_by_brute_force(codes, leaves, k, key)
    assert np.array_equal(rows, expected[0])
    assert np.array_equal(places, expected[1])


def test_random_order_is_uniform_inside_a_bucket():
    index = PrefixIndex.build(np.zeros((3, 2), np.int64))
    first = [Buckets(index, order="random", seed=seed).rows[0] for seed in range(300)]
    assert (np.bincount(first, minlength=3) > 60).all()


def test_beam_search_gives_items(shared):
    index, codes, _ = shared
    table = score_table(0, 2, index.sizes)
    best = beam_search(TorchTrie(index), step_function(table, 2), users=2, beams=4)
    popularity = np.arange(40)
    rows, scores = best.items(Buckets(index, popularity=popularity), 12)
    expected = items_by_brute_force(codes, best.leaves.numpy(), 12, lambda user, i: -popularity[i])
    assert np.array_equal(rows, expected[0])
    values = best.scores.numpy()
    for user in range(2):
        for row, score, place in zip(rows[user], scores[user], expected[1][user], strict=True):
            assert score == (values[user, place] if row >= 0 else -np.inf)


def test_what_an_order_needs(shared):
    index, codes, _ = shared
    with pytest.raises(UsageError, match=r"40 items share \d+ ids.*popularity="):
        Buckets(index)
    with pytest.raises(UsageError, match="did you mean 'popularity'"):
        Buckets(index, order="popular")
    with pytest.raises(UsageError, match="embeddings="):
        Buckets(index, order="embedding")
    with pytest.raises(InputError, match="40 items"):
        Buckets(index, popularity=np.ones(3))
    with pytest.raises(InputError, match="3 embeddings for 40 items"):
        Buckets(index, order="embedding", embeddings=np.ones((3, 2), np.float32))
    buckets = Buckets(index, order="embedding", embeddings=np.ones((40, 2), np.float32))
    with pytest.raises(UsageError, match=r"\(1, 2\)"):
        buckets.first_items(np.array([[0]]), 5)
    with pytest.raises(UsageError, match="k=0"):
        buckets.first_items(np.array([[0]]), 0)
    unique = PrefixIndex.build(np.unique(codes, axis=0))
    assert Buckets(unique).first_items(np.array([[1, 0]]), 2)[0].tolist() == [[1, 0]]
