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
from semid.training.distributed import all_sum_, batch_span

RULES = ("ema", "gradient")

MAX_SCORES = 1 << 20
"""Scores held at once while searching: they stay in the cache between product and minimum."""

MIN_ENGINE_SIZE = 1 << 19
"""Numbers in a codebook from which the engine, its preparation included, beats a product on a CPU;
below it that preparation costs more than it saves."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule(Options):
    """How codewords move: by moving averages (van den Oord 2017, app. A.1) or by gradient."""

    kind: str = option(
        "ema",
        choices=RULES,
        name="rule",
        help="ema: to the mean of the vectors assigned; gradient: by the loss |sg[z] - c|^2.",
    )
    decay: float = option(0.99, gt=0, lt=1, name="ema_decay", help="Decay of moving averages.")
    revive_below: float = option(
        0.1,
        ge=0,
        lt=1,
        help="Share of an even filling below which a code moves to a vector of the batch; 0 never.",
    )
    smoothing: float = option(1e-5, gt=0, help="Laplace smoothing of the counts.")


@torch.no_grad()
def nearest_labels(z: Tensor, codewords: Tensor) -> Tensor:
    """Return the nearest codeword of each row ``(n, latent)``, ties to the lowest.

    A codebook changes every step. Preparing the engine for a small one costs more than a float32
    product, whose labels may be off where two codewords are as near as it rounds; ids, which
    encoding makes, are always exact.
    """
    rows = max(1, MAX_SCORES // len(codewords))
    # Under autocast the product would be taken in bf16, and codewords differ by less.
    with torch.autocast(z.device.type, enabled=False):
        if z.device.type == "cpu" and codewords.numel() >= MIN_ENGINE_SIZE:
            return nearest(z, index_codebook(codewords), threads=torch.get_num_threads()).labels
        # argmin_c |z - c|^2 = argmin_c |c|^2 / 2 - z c: the term |z|^2 is the same for all c.
        half_squares, transposed = 0.5 * codewords.square().sum(dim=1), codewords.t()
        labels = [
            torch.addmm(half_squares, block, transposed, alpha=-1.0).argmin(dim=1)
            for block in torch.split(z, rows)
        ]
    return torch.cat(labels)


class Codebook(nn.Module):
    """Codewords ``(codes, latent)`` of one level with the statistics that move them.

    ``seed`` and ``name`` decide which vectors revived codes move to.
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
        if rule.kind == "gradient":
            self.codewords = nn.Parameter(torch.zeros(codes, latent))
        else:
            self.register_buffer("codewords", torch.zeros(codes, latent))
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

    def batch_counts(self, labels: Tensor) -> Tensor:
        """Return how often each code is among the labels of all processes, ``(codes,)`` float32."""
        counts = torch.bincount(labels, minlength=len(self.codewords)).to(self.counts.dtype)
        all_sum_(counts)
        return counts

    @torch.no_grad()
    def observe_(self, z: Tensor, labels: Tensor) -> None:
        """Take a batch ``(n, latent)``: move codewords (EMA), count usage, revive dead codes.

        Sums and counts are those of all processes together, so codebooks stay equal.
        """
        codes, decay = len(self.codewords), self.rule.decay
        counts = self.batch_counts(labels)
        self.used += counts.to(torch.int64)
        # N_c <- decay N_c + (1 - decay) n_c (van den Oord 2017, eq. 6).
        self.counts.mul_(decay).add_(counts, alpha=1 - decay)
        if self.rule.kind == "ema":
            # m_c <- decay m_c + (1 - decay) sum of the vectors assigned to c (eq. 7).
            sums = torch.zeros_like(self.sums).index_add_(0, labels, z)
            self.sums.mul_(decay).add_(all_sum_(sums), alpha=1 - decay)
            # c <- m_c / N_c (eq. 8), with counts smoothed after Laplace so that none is 0.
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
        # Vectors are drawn from the whole batch, of which every process has a part: the sum hands
        # all processes the vectors that one process with all rows would draw.
        rows = int(all_sum_(torch.tensor(float(len(z)), device=z.device)))
        generator = torch_generator(self.seed, "revive", self.name, int(self.steps), 0)
        drawn = torch.randint(rows, (len(dead),), generator=generator).to(z.device)
        span = batch_span(rows)
        own = (drawn >= span.start) & (drawn < span.stop)
        vectors = z.new_zeros(len(dead), z.shape[1])
        vectors[own] = z[drawn[own] - span.start]
        all_sum_(vectors)
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
    """A quantized batch and its losses, summed over dimensions, mean over rows."""

    latent: Tensor  # (n, latent) for the decoder: codewords forward, the identity backward
    codes: Tensor  # (n, levels) int64
    commitment: Tensor  # (levels,) |sg[q] - r|^2 per level
    codebook: Tensor  # scalar |q - sg[r]|^2 over all levels; 0 under the moving-average rule


class Quantizer(nn.Module):
    """Base of quantizers in training: their codebooks, from which `forward` makes `Quantized`.

    Residuals are taken from the raw codewords, never from a straight-through output; one
    straight-through estimator covers the whole sum; the commitment of every level reaches the
    encoder.
    """

    is_fixed = False  # whether the codebooks are there from the start and never learn

    def __init__(self, sizes: Sequence[int], latent: int, *, rule: UpdateRule, seed: int) -> None:
        super().__init__()
        self.rule = rule
        self.books = nn.ModuleList(
            [Codebook(k, latent, rule=rule, seed=seed, name=i) for i, k in enumerate(sizes)]
        )

    @property
    def codebooks(self) -> list[Codebook]:
        """The codebooks, in order."""
        return [book for book in self.books if isinstance(book, Codebook)]


class ResidualQuantizer(Quantizer):
    """Levels that each quantize what the levels before left (RQ-VAE)."""

    def forward(self, z: Tensor) -> Quantized:
        """Quantize ``(n, latent)``; in training mode the codebooks also learn from the batch."""
        quantized = torch.zeros_like(z)
        codes, commitment_losses, codebook_loss = [], [], z.new_zeros(())
        for codebook in self.codebooks:
            # r_l = z - sum_{k<l} q_k. `quantized` holds raw codewords without a
            # graph, so the gradient of every residual to z is 1.
            residual = z - quantized
            target = residual.detach()
            assignments = nearest_labels(target, codebook.codewords)
            codewords = codebook.codewords[assignments]
            if self.training:
                if self.rule.kind == "gradient":
                    # |q_l - sg[r_l]|^2 moves the codewords to the residuals, not the encoder.
                    codebook_loss = codebook_loss + mean_squared_norm(codewords - target)
                codebook.observe_(target, assignments)
            codes.append(assignments)
            # |sg[q_l] - r_l|^2 moves the encoder to the codewords.
            commitment_losses.append(mean_squared_norm(residual - codewords.detach()))
            quantized = quantized + codewords.detach()
        return Quantized(
            straight_through(z, quantized),
            torch.stack(codes, 1),
            torch.stack(commitment_losses),
            codebook_loss,
        )


class ParallelQuantizer(Quantizer):
    """Codebooks that all quantize the same latent; the decoder receives their average (MoC eq. 7).

    With the gradient rule the codebooks are fitted jointly through their average, with moving
    averages each goes to the mean of the vectors assigned to it. ``projection`` gives each codebook
    a learned linear map of the latent (MoC §4.1 speaks of "various spaces"; the map is ours).
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
        super().__init__(sizes, latent, rule=rule, seed=seed)
        self.maps = nn.ModuleList(
            [blank_linear(latent, latent, bias=False) for _ in sizes] if projection else []
        )
        for number, projected in enumerate(self.maps):
            assert isinstance(projected, nn.Linear)
            nn.init.eye_(projected.weight)
            map_seed = int(seed) + number
            if not -(2**63) <= map_seed < 2**64:  # torch takes no others
                map_seed = child_seed(seed, "projection", number)
            generator = torch.Generator().manual_seed(map_seed)
            with torch.no_grad():  # spaces that start alike would stay alike
                noise = torch.randn(latent, latent, generator=generator)
                projected.weight.add_(noise / latent)

    def spaces(self, z: Tensor) -> list[Tensor]:
        """Return what each codebook quantizes ``(n, latent)``: its map of the latent, or that."""
        return [projection(z) for projection in self.maps] or [z] * len(self.books)

    def forward(self, z: Tensor) -> Quantized:
        """Quantize ``(n, latent)``; in training mode the codebooks also learn from the batch."""
        with torch.autocast(z.device.type, enabled=False):
            spaces = self.spaces(z)
        codes, codewords, commitment_losses = [], [], []
        for codebook, space in zip(self.codebooks, spaces, strict=True):
            target = space.detach()
            assignments = nearest_labels(target, codebook.codewords)
            codes.append(assignments)
            codewords.append(codebook.codewords[assignments])
            commitment_losses.append(mean_squared_norm(space - codewords[-1].detach()))
            if self.training:
                codebook.observe_(target, assignments)
        center = torch.stack(spaces).mean(dim=0) if len(self.maps) else z
        quantized = torch.stack(codewords).mean(dim=0)  # z_q = mean_i q_i (MoC eq. 7)
        codebook_loss = z.new_zeros(())
        if self.training and self.rule.kind == "gradient":
            # |z_q - sg[z]|^2: the codebooks are fitted through their average.
            codebook_loss = mean_squared_norm(quantized - center.detach())
        # With projections each map has to be held to its codebook; without, z to the average.
        commitment = (
            torch.stack(commitment_losses) / len(commitment_losses)
            if len(self.maps)
            else mean_squared_norm(z - quantized.detach())[None]
        )
        return Quantized(
            center + (quantized.detach() - center.detach()).detach(),
            torch.stack(codes, 1),
            commitment,
            codebook_loss,
        )


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """Forward pass uses the quantized vector, gradients flow to z unchanged."""
    if not z.requires_grad:
        return quantized
    return z + (quantized - z.detach()).detach()


def mean_squared_norm(difference: Tensor) -> Tensor:
    """Sum over dimensions, mean over rows."""
    return difference.square().sum(dim=1).mean()
