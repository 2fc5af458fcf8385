"""Training step of RQPVAE against vector-quantize-pytorch's ResidualVQ in the same autoencoder.

    pip install --no-deps vector-quantize-pytorch einops einx
    python benchmarks/training_step.py --batch 4096 --codes 4096

Both sides have moving averages and revival of dead codes, the same encoder, decoder, optimizer
and batch, and the same precision. Steps are interleaved; medians and their ratio are printed, and
the time of each part of our step. Without the peer installed, only ours is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from semid.tokenizers.neural.autoencoder import Autoencoder
from semid.tokenizers.neural.quantized import QuantizedAutoencoder, squared_error
from semid.tokenizers.neural.quantizers import (
    Codebook,
    ResidualQuantizer,
    UpdateRule,
    nearest_labels,
)

Run = Callable[[], None]
DIM, HIDDEN = 384, (512, 256, 128)


class Peer(nn.Module):
    """The same autoencoder around ResidualVQ."""

    def __init__(self, levels: int, codes: int, latent: int) -> None:
        super().__init__()
        from vector_quantize_pytorch import ResidualVQ

        self.autoencoder = Autoencoder([DIM], latent=latent, hidden=HIDDEN, seed=0)
        self.quantizer = ResidualVQ(
            dim=latent,
            codebook_size=codes,
            num_quantizers=levels,
            decay=0.99,
            threshold_ema_dead_code=0.1,
            commitment_weight=0.25,
            kmeans_init=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the loss."""
        z = self.autoencoder.encode(x)
        with torch.autocast(x.device.type, enabled=False):
            quantized, _, commitment = self.quantizer(z[None])
        return squared_error(x, self.autoencoder.decode(quantized[0])) + commitment.sum()


def ours(levels: int, codes: int, latent: int, batch: int) -> QuantizedAutoencoder:
    """Return our model with codebooks at random latents, as the peer's are."""
    autoencoder = Autoencoder([DIM], latent=latent, hidden=HIDDEN, seed=0)
    rule = UpdateRule(decay=0.99, revive_below=0.1)
    quantizer = ResidualQuantizer((codes,) * levels, latent, rule=rule, seed=0)
    generator = torch.Generator().manual_seed(0)
    for book in quantizer.books:
        assert isinstance(book, Codebook)
        words = torch.randn(codes, latent, generator=generator)
        book.initialize_(words, torch.full((codes,), 1 / codes), batch=batch)
    model = QuantizedAutoencoder(autoencoder, quantizer, commitment_weight=0.25)
    model.quantizing.fill_(True)
    return model


def stepper(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor, bf16: bool) -> Run:
    """Return a function that trains one step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    model.train()

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            value = loss(x)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def interleave(sides: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Time all sides in turn; seconds a step."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in sides.values():
        step()
    for _ in range(rounds):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - began)
    return times


def parts(model: QuantizedAutoencoder, x: Tensor, bf16: bool) -> dict[str, Run]:
    """Return the parts of our step."""
    z = model.autoencoder.encode(x).detach()
    book = model.quantizer.books[0]
    assert isinstance(book, Codebook)
    labels = nearest_labels(z, book.codewords)

    def autoencoder() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            latent = model.autoencoder.encode(x)
            squared_error(x, model.autoencoder.decode(latent)).backward()

    return {
        "autoencoder forward and backward": autoencoder,
        "search, one level": lambda: void(nearest_labels(z, book.codewords)),
        "codebook update, one level": lambda: book.observe_(z, labels),
    }


def void(_: object) -> None:
    """Drop a result."""


def main() -> None:
    """Time and print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    x = torch.randn(given.batch, DIM, generator=torch.Generator().manual_seed(1))
    x = x.to(given.device)
    for bf16 in (False, True):
        model = ours(given.levels, given.codes, given.latent, given.batch).to(given.device)
        sides = {"semid": stepper(model, lambda rows, m=model: m(rows).loss, x, bf16)}
        try:
            peer = Peer(given.levels, given.codes, given.latent).to(given.device)
            sides["vector-quantize-pytorch"] = stepper(peer, peer, x, bf16)
        except ImportError:
            print(json.dumps({"note": "vector-quantize-pytorch is not installed"}))
        times = interleave(sides, given.rounds)
        medians = {name: statistics.median(each) for name, each in times.items()}
        line = {
            "batch": given.batch,
            "codes": given.codes,
            "levels": given.levels,
            "latent": given.latent,
            "precision": "bf16" if bf16 else "fp32",
            "threads": torch.get_num_threads(),
            **{f"{name} ms": round(1e3 * each, 2) for name, each in medians.items()},
            **{f"{name} least ms": round(1e3 * min(each), 2) for name, each in times.items()},
        }
        if len(medians) == 2:
            line["ratio"] = round(medians["vector-quantize-pytorch"] / medians["semid"], 2)
        print(json.dumps(line))
        shown = interleave(parts(model, x, bf16), given.rounds)
        print(json.dumps({f"{name} ms": round(1e3 * min(each), 2) for name, each in shown.items()}))


if __name__ == "__main__":
    main()
