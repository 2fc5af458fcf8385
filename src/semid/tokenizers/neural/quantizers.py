"""Codebooks in training, and the quantizers made of them: residual levels or parallel codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from semid.options import Options, option
from semid.quantization.nearest import index_codebook, nearest
from semid.seeds import child_seed, torch_generator
from semid.tokenizers.neural.autoencoder import blank_linear
from semid.training.distributed import all_sum_, rank, world_size

__all__ = [
    "RULES",
    "Codebook",
    "ParallelQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "UpdateRule",
    "nearest_labels",
]


RULES = ("ema", "gradient")

SCORES = 1 << 20
"""Scores held at once while searching: they stay in the cache between product and minimum."""

ENGINE_FROM = 1 << 19
"""Numbers in a codebook from which the engine, its preparation included, beats a product on a CPU;
below it that preparation costs more than it saves."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule(Options):
    """How codewords move.

    Attributes:
        kind: ``ema``: to the moving average of the vectors assigned to them (van den Oord 2017,
            app. A.1); ``gradient``: by the loss ``|sg[z] - c|^2``.
        decay: of the moving averages, in (0, 1); the gradient rule counts usage with it.
        revive_below: a code whose moving count falls below this share of an even filling is
            replaced by a vector of the batch, in [0, 1); 0 never revives (ours: 0.1).
        smoothing: Laplace smoothing of the counts, above 0.
    """

    kind: str = option("ema", choices=RULES, name="rule")
    decay: float = option(0.99, gt=0, lt=1, name="ema_decay")
    revive_below: float = option(0.1, ge=0, lt=1)
    smoothing: float = option(1e-5, gt=0)


@torch.no_grad()
def nearest_labels(z: Tensor, codewords: Tensor) -> Tensor:
    """Return the nearest codeword of each row, ties to the lowest.

    A codebook changes every step. Preparing the engine for a small one costs more than a float32
    product, whose labels may be off where two codewords are as near as it rounds; ids, which
    encoding makes, are always exact.

    Args:
        z: ``(n, latent)``.
        codewords: ``(codes, latent)``.

    Returns:
        int64 ``(n,)``.
    """
    rows = max(1, SCORES // len(codewords))
    # Under autocast the product would be taken in bf16, and codewords differ by less.
    with torch.autocast(z.device.type, enabled=False):
        if z.device.type == "cpu" and codewords.numel() >= ENGINE_FROM:
            return nearest(z, index_codebook(codewords), threads=torch.get_num_threads()).labels
        halves, across = 0.5 * codewords.square().sum(dim=1), codewords.t()
        parts = [
            torch.addmm(halves, part, across, alpha=-1.0).argmin(dim=1)
            for part in torch.split(z, rows)
        ]
    return torch.cat(parts)


class Codebook(nn.Module):
    """Codewords of one level with the statistics that move them.

    Args:
        codes: number of codewords.
        latent: their width.
        rule: how they move.
        seed: of the vectors drawn for revived codes.
        name: tells this codebook's draws from those of others.
    """

    codewords: Tensor
    counts: Tensor
    sums: Tensor
    used: Tensor
    steps: Tensor
    revived: Tensor

    def __init__(
        self, codes: int, latent: int, *, rule: UpdateRule, seed: int, name: object
    ) -> None:
        super().__init__()
        self.rule, self.seed, self.name = rule, seed, name
        start = torch.zeros(codes, latent)
        if rule.kind == "gradient":
            self.codewords = nn.Parameter(start)
        else:
            self.register_buffer("codewords", start)
            self.register_buffer("sums", torch.zeros(codes, latent))
        self.register_buffer("counts", torch.zeros(codes))
        self.register_buffer("used", torch.zeros(codes, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("revived", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def initialize_(self, codewords: Tensor, shares: Tensor, *, batch: int) -> None:
        """Set codewords ``(codes, latent)``; ``shares`` ``(codes,)`` of the rows each one takes.

        Moving counts start at what a batch of ``batch`` rows is expected to hold.
        """
        self.codewords.copy_(codewords)
        self.counts.copy_(shares * batch)
        if self.rule.kind == "ema":
            self.sums.copy_(self.codewords * self.counts[:, None])

    @torch.no_grad()
    def observe_(self, z: Tensor, labels: Tensor) -> None:
        """Take a batch: move codewords (EMA), count usage, revive dead codes.

        Args:
            z: ``(n, latent)`` vectors that were quantized.
            labels: ``(n,)`` their codes.

        Sums and counts are those of all processes together, so codebooks stay equal.
        """
        codes = len(self.codewords)
        counts = torch.bincount(labels, minlength=codes).to(self.counts.dtype)
        all_sum_(counts)
        self.used += counts.to(torch.int64)
        decay = self.rule.decay
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        if self.rule.kind == "ema":
            sums = torch.zeros_like(self.sums).index_add_(0, labels, z)
            self.sums.mul_(decay).add_(all_sum_(sums), alpha=1 - decay)
            total, smoothing = self.counts.sum(), self.rule.smoothing
            smoothed = (self.counts + smoothing) * (total / (total + codes * smoothing))
            self.codewords.copy_(self.sums / smoothed[:, None])
        self.steps += 1
        if self.rule.revive_below > 0:
            self._revive_(z)

    def _revive_(self, z: Tensor) -> None:
        """Put codes that are hardly used on vectors of the batch, with fresh accumulators."""
        even = self.counts.sum() / len(self.counts)
        dead = torch.nonzero(self.counts < self.rule.revive_below * even).flatten()
        if len(dead) == 0:
            return
        world, own = world_size(), rank()
        generator = torch_generator(self.seed, "revive", self.name, int(self.steps), own)
        drawn = torch.randint(len(z), (len(dead),), generator=generator).to(z.device)
        # Process r proposes for every world-th code; the sum hands all of them the same vectors.
        mine = (torch.arange(len(dead), device=z.device) % world == own).to(z.dtype)
        vectors = all_sum_(z[drawn] * mine[:, None])
        self.codewords[dead] = vectors
        self.counts[dead] = even
        if self.rule.kind == "ema":
            self.sums[dead] = vectors * even
        self.revived += len(dead)

    def take_usage_(self) -> Tensor:
        """Return how often each code was chosen since the last call, ``(codes,)`` int64."""
        used = self.used.clone()
        self.used.zero_()
        return used


class Quantized(NamedTuple):
    """What a quantizer makes of a batch.

    Attributes:
        latent: ``(n, latent)`` for the decoder: codewords forward, the identity backward.
        codes: ``(n, levels)`` int64.
        commitment: ``(levels,)`` ``|sg[q] - r|^2`` a level, summed over dimensions, mean over rows.
        codebook: scalar ``|q - sg[r]|^2`` over all levels; 0 under the moving-average rule.
    """

    latent: Tensor
    codes: Tensor
    commitment: Tensor
    codebook: Tensor


class ResidualQuantizer(nn.Module):
    """Levels that each quantize what the levels before left (RQ-VAE).

    Args:
        sizes: codewords of each level.
        latent: width.
        rule: how codewords move.
        seed: of revived codewords.
    """

    def __init__(self, sizes: Sequence[int], latent: int, *, rule: UpdateRule, seed: int) -> None:
        super().__init__()
        self.rule = rule
        self.books = nn.ModuleList(
            [Codebook(k, latent, rule=rule, seed=seed, name=i) for i, k in enumerate(sizes)]
        )

    def forward(self, z: Tensor) -> Quantized:
        """Quantize ``(n, latent)``; in training mode the codebooks take the batch in."""
        taken = torch.zeros_like(z)
        codes, commitment, codebook = [], [], z.new_zeros(())
        for book in self.books:
            assert isinstance(book, Codebook)
            residual = z - taken  # gradient 1 to z: taken holds raw codewords without a graph
            fixed = residual.detach()
            labels = nearest_labels(fixed, book.codewords)
            words = book.codewords[labels]
            chosen = words.detach()
            if self.training:
                if self.rule.kind == "gradient":
                    codebook = codebook + _squared(words - fixed)
                book.observe_(fixed, labels)
            codes.append(labels)
            commitment.append(_squared(residual - chosen))
            taken = taken + chosen
        straight = z + (taken - z.detach()).detach() if z.requires_grad else taken
        return Quantized(straight, torch.stack(codes, 1), torch.stack(commitment), codebook)


class ParallelQuantizer(nn.Module):
    """Codebooks that all quantize the same latent; the decoder sees their average (MoC eq. 7).

    With the gradient rule the codebooks are fitted jointly through their average, with moving
    averages each goes to the mean of the vectors it was given.

    Args:
        sizes: codewords of each codebook.
        latent: width.
        rule: how codewords move.
        seed: of revived codewords.
        projection: give each codebook a learned linear map of the latent before its lookup
            (MoC §4.1 speaks of "various spaces"; the map is ours).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        latent: int,
        *,
        rule: UpdateRule,
        seed: int,
        projection: bool = False,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.books = nn.ModuleList(
            [Codebook(k, latent, rule=rule, seed=seed, name=i) for i, k in enumerate(sizes)]
        )
        self.maps = nn.ModuleList(
            [blank_linear(latent, latent, bias=False) for _ in sizes] if projection else []
        )
        for number, each in enumerate(self.maps):
            assert isinstance(each, nn.Linear)
            nn.init.eye_(each.weight)
            own_seed = seed + number
            if not -(2**63) <= own_seed < 2**64:  # torch takes no others
                own_seed = child_seed(seed, "projection", number)
            generator = torch.Generator().manual_seed(own_seed)
            with torch.no_grad():  # spaces that start alike would stay alike
                each.weight.add_(torch.randn(latent, latent, generator=generator) / latent)

    def spaces(self, z: Tensor) -> list[Tensor]:
        """Return what each codebook is given: ``(n, latent)`` each."""
        if len(self.maps):
            return [each(z) for each in self.maps]
        return [z] * len(self.books)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize ``(n, latent)``; in training mode the codebooks take the batch in."""
        with torch.autocast(z.device.type, enabled=False):
            spaces = self.spaces(z)
        codes, words, apart = [], [], []
        for book, space in zip(self.books, spaces, strict=True):
            assert isinstance(book, Codebook)
            fixed = space.detach()
            labels = nearest_labels(fixed, book.codewords)
            found = book.codewords[labels]
            codes.append(labels)
            words.append(found)
            apart.append(_squared(space - found.detach()))
            if self.training:
                book.observe_(fixed, labels)
        middle = torch.stack(spaces).mean(dim=0) if len(self.maps) else z
        mean = torch.stack(words).mean(dim=0)
        codebook = z.new_zeros(())
        if self.training and self.rule.kind == "gradient":
            codebook = _squared(mean - middle.detach())
        # Under a projection each map has to be held to its codebook; without one, z to the average.
        commitment = (
            torch.stack(apart) / len(apart) if len(self.maps) else _squared(z - mean.detach())[None]
        )
        fixed_mean = mean.detach()
        straight = middle + (fixed_mean - middle.detach()).detach()
        return Quantized(straight, torch.stack(codes, 1), commitment, codebook)


Quantizer = ResidualQuantizer | ParallelQuantizer


def _squared(difference: Tensor) -> Tensor:
    """Sum over dimensions, mean over rows."""
    return difference.square().sum(dim=1).mean()
