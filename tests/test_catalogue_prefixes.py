"""The trie against brute-force sets: no invalid id ever allowed, no valid id ever refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import semid
from semid.catalogue import decoding
from semid.catalogue.decoding import AllowedTokens, TorchTrie
from semid.catalogue.prefixes import PrefixIndex
from semid.errors import InputError, UsageError


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes))
    codes = draw(st.lists(row, min_size=1, max_size=25))
    order = draw(st.permutations(range(len(sizes))))
    return np.array(codes), sizes, order


@settings(max_examples=150, deadline=None)
@given(catalogues())
def test_index_and_tensors_equal_brute_force(case):
    codes, sizes, order = case
    index = PrefixIndex.build(codes, sizes=sizes, order=order)
    trie = TorchTrie(index)
    walked = codes[:, order]
    sizes = [sizes[level] for level in order]
    valid = {tuple(row) for row in walked.tolist()}
    assert index.unique_ids == len(valid)
    assert index.nodes == 1 + sum(
        len({row[:depth] for row in valid}) for depth in range(1, len(sizes) + 1)
    )
    everything = np.array(list(itertools.product(*map(range, sizes))))
    assert index.contains(everything).tolist() == [tuple(r) in valid for r in everything.tolist()]
    numbers = {row: number for number, row in enumerate(sorted(valid))}
    leaves = [numbers.get(tuple(r), -1) for r in everything.tolist()]
    assert index.leaves(everything).tolist() == leaves
    for depth in range(len(sizes)):
        prefixes = list(itertools.product(*map(range, sizes[:depth])))
        follow = [{row[depth] for row in valid if row[:depth] == p} for p in prefixes]
        table = np.array(prefixes, dtype=np.int64).reshape(len(prefixes), depth)
        expected = np.array([[c in f for c in range(sizes[depth])] for f in follow])
        assert np.array_equal(index.allowed(table), expected)
        mask = trie.allowed(trie.find(torch.from_numpy(table))).numpy()
        assert np.array_equal(mask[:, : sizes[depth]], expected)
        assert not mask[:, sizes[depth] :].any()
        for prefix, codes_after in zip(prefixes, follow, strict=True):
            assert index.next_codes(prefix).tolist() == sorted(codes_after)
            under = np.flatnonzero((walked[:, :depth] == np.array(prefix)).all(1))
            assert index.items(prefix).tolist() == under.tolist()
            assert index.count(prefix) == len(under)
    for row in everything.tolist():
        under = np.flatnonzero((walked == np.array(row)).all(1))
        assert index.items(row).tolist() == under.tolist()
        assert index.next_codes(row).tolist() == []


@pytest.mark.parametrize("entries", [0, 12, decoding.MAX_DENSE_ENTRIES])
def test_children_of_nodes_at_any_depth_equal_brute_force(entries, monkeypatch):
    """With a dense table for two levels, for the root alone, and without one."""
    monkeypatch.setattr(decoding, "MAX_DENSE_ENTRIES", entries)
    rows_of_table = set()

    @settings(max_examples=100, deadline=None)
    @given(catalogues(), st.data())
    def check(case, data):
        codes, sizes, order = case
        index = PrefixIndex.build(codes, sizes=sizes, order=order)
        trie = TorchTrie(index)
        rows_of_table.add(len(trie.dense))
        valid = {tuple(row) for row in codes[:, order].tolist()}
        prefixes = {row[:depth] for row in valid for depth in range(len(sizes) + 1)}
        nodes = {prefix: int(index.find(np.array(prefix, np.int64))) for prefix in prefixes}
        depths = data.draw(st.sets(st.integers(0, len(sizes)), min_size=1))
        drawn = sorted(prefix for prefix in prefixes if len(prefix) in depths)
        chosen = data.draw(st.lists(st.sampled_from([None, *drawn]), max_size=9))
        batch = torch.tensor([-1 if p is None else nodes[p] for p in chosen], dtype=torch.int64)
        listed = trie.candidates(batch)
        assert [part.dtype for part in listed] == [torch.int64, torch.int64, torch.bool]
        assert ((listed.next_nodes == -1) == ~listed.valid).all()
        flat = trie.list_children(batch)
        expected = []
        for row, prefix in enumerate(chosen):
            after = [] if prefix is None else sorted(p for p in prefixes if p[:-1] == prefix and p)
            expected += [(row, p[-1], nodes[p]) for p in after]
            mask = listed.valid[row]
            pairs = torch.stack([listed.codes[row, mask], listed.next_nodes[row, mask]], dim=1)
            assert list(map(tuple, pairs.tolist())) == [(p[-1], nodes[p]) for p in after]
        assert list(map(tuple, torch.stack(flat, dim=1).tolist())) == expected
        # Padding has a code of the level, so that scores can be gathered before it is masked.
        depths = {len(p) for p in chosen if p is not None}
        if len(depths) == 1 and listed.codes.numel():
            assert listed.codes.max() < index.sizes[min(*depths, len(sizes) - 1)]
        # Every edge leads on, and nothing else does.
        for code in range(-1, max(sizes) + 1):
            stepped = trie.step(batch, torch.full((len(chosen),), code))
            assert stepped.tolist() == [
                -1 if p is None else nodes.get((*p, code), -1) for p in chosen
            ]

    check()
    assert rows_of_table == {1} if entries == 0 else 2 in rows_of_table


def test_levels_of_different_sizes_in_one_batch():
    """The root's children outnumber the codes of the level below."""
    trie = TorchTrie(PrefixIndex.build(np.array([[n, 0, 0] for n in range(5)]), sizes=(5, 2, 2)))
    codes, next_nodes, valid = trie.candidates(torch.tensor([0, 3, -1]))
    assert codes[0, valid[0]].tolist() == [0, 1, 2, 3, 4]
    assert next_nodes[0, valid[0]].tolist() == [1, 2, 3, 4, 5]
    assert codes[1, valid[1]].tolist() == [0]
    assert not valid[2].any()


@settings(max_examples=40, deadline=None)
@given(catalogues(), st.integers(0, 2**32 - 1))
def test_random_scores_only_ever_write_valid_ids(case, seed):
    """Walk by random choices among what is allowed; every valid id must stay reachable."""
    codes, sizes, order = case
    index = PrefixIndex.build(codes, sizes=sizes, order=order)
    valid = {tuple(row) for row in codes[:, order].tolist()}
    starts = np.cumsum([10, *index.sizes])
    tokens = [range(a, a + size) for a, size in zip(starts, index.sizes, strict=False)]
    processor = AllowedTokens(TorchTrie(index), tokens, prompt_length=2, end_token=1)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(starts[-1]) + 3
    text = torch.zeros((16, 2), dtype=torch.int64)
    for _ in range(index.levels):
        scores = torch.randn((16, vocabulary), generator=generator)
        kept = processor(text, scores)
        assert torch.equal(kept[kept > -torch.inf], scores[kept > -torch.inf])
        text = torch.cat([text, kept.argmax(1, keepdim=True)], dim=1)
    written = text[:, 2:].numpy() - starts[: index.levels]
    assert {tuple(row) for row in written.tolist()} <= valid
    assert (processor(text, torch.zeros(16, vocabulary)).argmax(1) == 1).all()
    for row in valid:  # no valid id is refused at any step
        line = torch.tensor([[0, 0, *(np.array(row) + starts[: index.levels])]])
        for depth in range(index.levels):
            kept = processor(line[:, : 2 + depth], torch.zeros(1, vocabulary))
            assert kept[0, line[0, 2 + depth]] == 0


@settings(max_examples=80, deadline=None)
@given(catalogues(), st.integers(0, 2**32 - 1))
def test_ids_begin_after_a_token_wherever_it_stands(case, seed):
    """Rows write free text and ids in turn, each at its own pace, from prompts of any kind."""
    codes, sizes, order = case
    index = PrefixIndex.build(codes, sizes=sizes, order=order)
    valid = {tuple(row) for row in codes[:, order].tolist()}
    begin, end, words = 1, 2, range(3, 6)
    starts = np.cumsum([6, *index.sizes])
    tokens = [range(a, a + size) for a, size in zip(starts, index.sizes, strict=False)]
    processor = AllowedTokens(TorchTrie(index), tokens, begin_token=begin, end_token=end)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = int(starts[-1])
    spelled = [int(c + s) for c, s in zip(codes[0, order], starts, strict=False)]
    # Left padding, a history, an id that has begun, and nothing at all.
    prompts = [[3, 4], [begin, *spelled, end], [begin, *spelled[:-1]], []]
    length = max(map(len, prompts))
    text = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
    for _ in range(4 * (len(sizes) + 2)):
        scores = torch.randn((4, vocabulary), generator=generator)
        scores[:, spelled[0] :] = -torch.inf  # what comes here is allowed, not preferred
        kept = processor(text, scores)
        for row, line in enumerate(text.tolist()):
            finite = torch.isfinite(kept[row]).nonzero().ravel().tolist()
            after = line[len(line) - line[::-1].index(begin) :] if begin in line else None
            if after is None or len(after) > len(sizes):
                assert torch.equal(kept[row], scores[row])
            elif len(after) == len(sizes):
                assert finite == [end]
                assert kept[row, end] == 0  # certain, so it changes no order of beams
            else:
                prefix = [t - s for t, s in zip(after, starts, strict=False)]
                follow = {r[len(prefix)] for r in valid if list(r[: len(prefix)]) == prefix}
                assert finite == sorted(int(starts[len(prefix)]) + c for c in follow)
        likely = torch.where(torch.isfinite(kept), kept + 50, -torch.inf)
        likely[:, [begin, *words]] += torch.randn((4, 4), generator=generator)
        text = torch.cat([text, likely.argmax(1, keepdim=True)], dim=1)
    # `written` reads the last id of each row, if it is whole.
    for line, last in zip(text.tolist(), processor.written(text).tolist(), strict=True):
        after = line[len(line) - line[::-1].index(begin) :] if begin in line else []
        for level, code in enumerate(last):
            token = after[level] if level < len(after) else None
            assert code == (token - starts[level] if token is not None else -1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_allowed_tokens_stay_above_all_others_where_every_score_is_minus_infinity(dtype):
    index = PrefixIndex.build(np.array([[0, 1], [1, 0]]), sizes=(2, 2))
    for begins in ({"prompt_length": 1}, {"begin_token": 0}):
        processor = AllowedTokens(TorchTrie(index), [[5, 6], [7, 8]], end_token=2, **begins)
        text = torch.tensor([[0]])
        total = torch.zeros((), dtype=dtype)
        for expected in ([5, 6], [8], [2]):
            for value in (torch.nan, -torch.inf):
                kept = processor(text, torch.full((1, 10), value, dtype=dtype))
                assert kept.dtype == dtype
                assert torch.isfinite(kept[0]).nonzero().ravel().tolist() == expected
                total += kept[0].max()
            text = torch.cat([text, kept.argmax(1, keepdim=True)], dim=1)
        assert torch.isfinite(total)  # beam search adds the scores of an id up


def test_a_text_shorter_than_its_prompt_begins_an_id():
    index = PrefixIndex.build(np.array([[0, 1], [1, 0]]), sizes=(2, 2))
    processor = AllowedTokens(TorchTrie(index), [[5, 6], [7, 8]], prompt_length=3, end_token=2)
    for length in range(4):
        kept = processor(torch.zeros((1, length), dtype=torch.int64), torch.zeros(1, 10))
        assert torch.isfinite(kept[0]).nonzero().ravel().tolist() == [5, 6]


def test_where_ids_begin_is_said_once():
    trie = TorchTrie(PrefixIndex.build(np.array([[0, 1]])))
    for begins in ({}, {"prompt_length": 1, "begin_token": 3}):
        with pytest.raises(UsageError, match="either prompt_length or begin_token"):
            AllowedTokens(trie, [[4], [5, 6]], end_token=0, **begins)


def test_what_is_not_in_the_trie_ends():
    index = PrefixIndex.build(np.array([[0, 1], [1, 0]]), sizes=(2, 2))
    processor = AllowedTokens(TorchTrie(index), [[5, 6], [7, 8]], prompt_length=1, end_token=2)
    kept = processor(torch.tensor([[0, 9], [0, 6]]), torch.zeros(2, 10))
    assert torch.isfinite(kept[0]).nonzero().ravel().tolist() == [2]
    assert torch.isfinite(kept[1]).nonzero().ravel().tolist() == [7]


def test_unknown_and_wrong_prefixes():
    index = PrefixIndex.build(np.array([[0, 1], [3, 0]]))
    assert index.find([1]) == -1
    assert index.find([-1]) == -1
    assert index.find([99]) == -1
    assert index.find([]) == 0
    assert index.items([2]).tolist() == []
    assert index.next_codes().tolist() == [0, 3]
    assert len(index) == 2
    with pytest.raises(UsageError, match="ids have 2 levels"):
        index.find([0, 1, 0])
    with pytest.raises(UsageError, match="integers"):
        index.find([[0.5]])
    with pytest.raises(UsageError, match="permutation"):
        PrefixIndex.build(np.array([[0, 1]]), order=(0, 0))
    with pytest.raises(InputError):
        PrefixIndex.build(np.array([[0, 7]]), sizes=(2, 2))
    with pytest.raises(UsageError, match="twice"):
        AllowedTokens(TorchTrie(index), [[1, 1, 2, 3], [4, 5]], prompt_length=1, end_token=0)
    with pytest.raises(UsageError, match="tokens per level"):
        AllowedTokens(TorchTrie(index), [[1, 2]], prompt_length=1, end_token=0)


def test_a_trie_is_a_module_that_saves_and_loads():
    codes = np.random.default_rng(0).integers(0, 3, (20, 3))
    trie = TorchTrie(PrefixIndex.build(codes)).eval()
    flipped = TorchTrie(PrefixIndex.build(2 - codes))
    assert (flipped.find(torch.from_numpy(codes)) < 0).any()
    flipped.load_state_dict(trie.state_dict())  # a mirrored catalogue has as many nodes
    assert torch.equal(flipped.find(torch.from_numpy(codes)), trie.find(torch.from_numpy(codes)))


def test_public_name():
    assert semid.PrefixIndex is PrefixIndex


@pytest.fixture
def language_model():
    transformers = pytest.importorskip(
        "transformers", reason="constrained generation: pip install 'semid[transformers]'"
    )
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


TOKENS = [range(10, 16), range(16, 22), range(22, 28)]


def test_transformers_generates_only_valid_ids(language_model):
    """Prompts of two lengths in one batch: padded on the left, they end at one position."""
    codes = np.random.default_rng(0).integers(0, 6, (20, 3))
    index = PrefixIndex.build(codes, sizes=(6, 6, 6))
    processor = AllowedTokens(TorchTrie(index), TOKENS, prompt_length=4, end_token=1)
    prompt = torch.tensor([[2, 30, 31, 34], [0, 0, 2, 33]])
    out = language_model.generate(
        prompt, attention_mask=(prompt > 0).long(), max_new_tokens=5, num_beams=6,
        num_return_sequences=6, logits_processor=[processor], do_sample=False,
    )  # fmt: skip
    written = out[:, 4:7].numpy() - np.array([10, 16, 22])
    assert np.array_equal(processor.written(out).numpy(), written)
    assert index.contains(written).all()
    assert len(np.unique(written[:6], axis=0)) == len(np.unique(written[6:], axis=0)) == 6
    assert (out[:, 7] == 1).all()
    # The longer prompt alone gives the same ids: padding of the other row changes nothing.
    alone = language_model.generate(
        prompt[:1], attention_mask=torch.ones((1, 4)), max_new_tokens=5, num_beams=6,
        num_return_sequences=6, logits_processor=[processor], do_sample=False,
    )  # fmt: skip
    assert torch.equal(alone, out[:6])


def test_transformers_writes_free_text_before_ids(language_model):
    """The begin token comes at different positions: in a prompt, or sampled after some words."""
    codes = np.random.default_rng(0).integers(0, 6, (20, 3))
    index = PrefixIndex.build(codes, sizes=(6, 6, 6))
    begin, end = 3, 4
    processor = AllowedTokens(TorchTrie(index), TOKENS, begin_token=begin, end_token=end)

    def words(input_ids, scores):
        """Between ids, only words 30 to 33 and the begin token."""
        starts = processor.starts(input_ids)
        is_text = (starts < 0) | (input_ids.shape[1] - starts > 3)
        masked = torch.full_like(scores, -torch.inf)
        masked[:, [begin, 30, 31, 32, 33]] = scores[:, [begin, 30, 31, 32, 33]]
        return torch.where(is_text[:, None], masked, scores)

    prompt = torch.tensor([[0, 0, 2, 30]] * 8 + [[2, 30, 31, begin]] * 8)
    torch.manual_seed(1)
    out = language_model.generate(
        prompt, attention_mask=(prompt > 0).long(), max_new_tokens=24, do_sample=True,
        logits_processor=[words, processor], top_k=0,
    )  # fmt: skip
    positions = set()
    for line in out.tolist():
        for position, token in enumerate(line):
            if token == begin and position + 4 < len(line):
                positions.add(position)
                written = np.array(line[position + 1 : position + 4]) - np.array([10, 16, 22])
                assert index.contains(written[None]).all()
                assert line[position + 4] == end
    assert 3 in positions
    assert len(positions) > 5
