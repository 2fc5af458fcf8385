"""Children of a trie's nodes: semid beside a plain gather and a mask over the codes, one thread.

    python benchmarks/trie.py [--items 1000000] [--levels 4] [--codes 2048] [--beams 1120]

Two random catalogues: codes that are equally likely, and codes by Zipf's law after each prefix.
Beams are prefixes of random items, so that popular prefixes occur more often.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch

from common import in_turn, save
from semid.catalogue.beams import beam_search
from semid.catalogue.decoding import TorchTrie
from semid.catalogue.prefixes import PrefixIndex

USERS = 16


def random_codes(items: int, levels: int, codes: int, *, exponent: float) -> np.ndarray:
    """Return codes ``(items, levels)``; the most likely code depends on the prefix."""
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, codes + 1) ** exponent
    result = np.zeros((items, levels), np.int64)
    prefix = np.zeros(items, np.uint64)
    for level in range(levels):
        rank = generator.choice(codes, items, p=weights / weights.sum())
        result[:, level] = (rank + (prefix % np.uint64(codes)).astype(np.int64)) % codes
        prefix = prefix * np.uint64(6364136223846793005) + result[:, level].astype(np.uint64)
    return result


def children_sides(index: PrefixIndex, trie: TorchTrie, nodes: torch.Tensor) -> dict[str, Any]:
    """Return the ways to list the children of nodes."""
    starts, codes = torch.from_numpy(index.child_starts), torch.from_numpy(index.child_codes)
    width = int((starts[nodes + 1] - starts[nodes]).max())

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        edges = starts[nodes][:, None] + torch.arange(width)
        return codes[edges.clamp_(max=len(codes) - 1)], edges + 1  # what is padding is not said

    def mask_and_search() -> torch.Tensor:
        mask = trie.allowed(nodes)
        key = nodes * trie.width + mask.int().argmax(1)
        return torch.searchsorted(trie.keys, key)  # one child per beam

    return {
        "plain gather": gather,
        "candidates": lambda: trie.candidates(nodes),
        "list_children, without padding": lambda: trie.list_children(nodes),
        "mask over codes, binary search": mask_and_search,
    }


def search_sides(trie: TorchTrie, beams: int) -> dict[str, Any]:
    """Return beam searches over scores that cost nothing: only the trie's part is measured."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn((beams * USERS, size), generator=generator) for size in trie.sizes]

    def ours() -> Any:
        return beam_search(
            trie, lambda codes, rows: tables[codes.shape[1]][: len(codes)], users=USERS, beams=beams
        ).leaves

    def with_masks() -> Any:
        nodes, totals, width = trie.root(USERS), torch.zeros(USERS, 1), 1
        for table, size in zip(tables, trie.sizes, strict=True):
            scores = table[: len(nodes)].masked_fill(~trie.allowed(nodes)[:, :size], -torch.inf)
            total = (totals.view(-1, 1) + scores).view(USERS, -1)
            width_before, width = width, min(beams, total.shape[1])
            totals, best = total.topk(width, dim=1)
            parents = nodes.view(USERS, width_before).gather(1, best // size)
            nodes = trie.step(parents.flatten(), (best % size).flatten())
        return (nodes - trie.first_leaf).view(USERS, -1)

    assert torch.equal(ours(), with_masks())
    return {"masks over codes, binary search": with_masks, "beam_search": ours}


def main() -> None:
    """Run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--codes", type=int, default=2048)
    parser.add_argument("--beams", type=int, default=1120, help=f"beams of all {USERS} users")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, exponent in (("equally likely", 0.0), ("Zipf", 0.8)):
        codes = random_codes(arguments.items, arguments.levels, arguments.codes, exponent=exponent)
        index = PrefixIndex.build(codes, sizes=(arguments.codes,) * arguments.levels)
        trie = TorchTrie(index)
        drawn = np.random.default_rng(1).choice(len(codes), arguments.beams, replace=False)
        for depth in range(arguments.levels):
            nodes = trie.find(torch.from_numpy(codes[drawn, :depth]))
            counts = np.diff(index.child_starts)[nodes.numpy()]
            timings = in_turn(children_sides(index, trie, nodes), repeats=arguments.repeats)
            size = {"mean children": float(counts.mean()), "most": int(counts.max())}
            rows += [
                {"codes": name, "level": depth + 1, **size, "side": side}
                | timing.figures(timings["plain gather"])
                for side, timing in timings.items()
            ]
        timings = in_turn(search_sides(trie, arguments.beams // USERS), repeats=arguments.repeats)
        size = {"mean children": "", "most": ""}
        rows += [
            {"codes": name, "level": "all", **size, "side": side}
            | timing.figures(timings["masks over codes, binary search"])
            for side, timing in timings.items()
        ]
    save(
        "trie",
        rows,
        settings=vars(arguments),
        packages=(),
        note="Ratios (`_x`) are to the first line of each level: how many times less time. A plain "
        "gather lists the codes and nodes padded to the most children, but does not say what is "
        f"padding. `beam_search` has {USERS} users and scores that cost nothing.",
    )


if __name__ == "__main__":
    main()
