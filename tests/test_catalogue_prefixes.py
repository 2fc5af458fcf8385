"""The trie against brute-force sets: no invalid id ever allowed, no valid id ever refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import semid
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


def test_public_name():
    assert semid.PrefixIndex is PrefixIndex


def test_transformers_generates_only_valid_ids():
    transformers = pytest.importorskip(
        "transformers", reason="constrained generation: pip install 'semid[transformers]'"
    )
    codes = np.random.default_rng(0).integers(0, 6, (20, 3))
    index = PrefixIndex.build(codes, sizes=(6, 6, 6))
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
        bos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokens = [range(10, 16), range(16, 22), range(22, 28)]
    processor = AllowedTokens(TorchTrie(index), tokens, prompt_length=3, end_token=1)
    prompt = torch.tensor([[2, 30, 31], [2, 33, 34]])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, num_beams=6,
        num_return_sequences=6, logits_processor=[processor], do_sample=False,
    )  # fmt: skip
    written = out[:, 3:6].numpy() - np.array([10, 16, 22])
    assert index.contains(written).all()
    assert len(np.unique(written[:6], axis=0)) == 6
    assert (out[:, 6] == 1).all()
