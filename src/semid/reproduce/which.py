"""Which tokenizer when: who leads in each view, and who cannot be told from the leader."""

from __future__ import annotations

from semid.report.figure import Figure
from semid.reproduce.claims import Comparison, Rows
from semid.reproduce.drq_reads import TOKENIZERS, Read, effective_size, figure, flips, less

__all__ = ["QUESTIONS", "which_tokenizer"]


QUESTIONS: dict[str, tuple[Read, int]] = {
    "steady ids: fewest flips under input noise 0.2": (less(flips), 4),
    "close to the embedding: least error of the codes": (
        less(figure("decoder(codes)", "relative_error")),
        4,
    ),
    "close to it on items never seen: least held-out error": (
        less(figure("decoder(codes)", "relative_error_held_out")),
        4,
    ),
    "retrieval by reconstruction: retention at 50": (
        figure("behavior", "retention", "decoder(codes)", "50"),
        4,
    ),
    "retrieval by ids alone: HR@50": (figure("behavior", "discrete", "50"), 4),
    "soft matching: weighted AUC": (figure("behavior", "aucs", "weighted"), 4),
    "even usage: perplexity of the last level": (figure("usage", -1, "perplexity"), 1),
    "capacity: K_eff of the first level": (effective_size(0), 1),
    "unique ids: fewest collisions": (less(figure("collisions", "collision_rate")), 4),
}
"""What one may want of ids, and the figure that answers it, higher being better."""


def which_tokenizer(rows: Rows) -> Figure:
    """Name for every question and data set the leader, and those level with it.

    A tokenizer is level with the leader where the paired interval over seeds of their difference
    does not leave out 0; with one seed nobody can be told from anybody.

    Args:
        rows: of the ledger; variants do not take part.
    """
    table = []
    for data in rows.names("data", variant=""):
        for question, (read, digits) in QUESTIONS.items():
            means = {}
            for name in TOKENIZERS:
                values = rows.values(read, data=data, tokenizer=name, variant="")
                if values:
                    means[name] = sum(values) / len(values)
            if not means:
                continue
            best = max(means, key=lambda name: means[name])
            level = []
            for other in means:
                own, rival = (
                    {"data": data, "tokenizer": name, "variant": ""} for name in (best, other)
                )
                beaten = Comparison(other, rows.difference(read, own, rival)).favor
                if other != best and not beaten:
                    level.append(other)
            absent = [name for name in TOKENIZERS if name not in means]
            table.append(
                [
                    f"{data}: {question}",
                    f"{best} ({abs(means[best]):.{digits}f})",
                    ", ".join(level) or "nobody",
                    ", ".join(absent) or "none",
                ]
            )
    return Figure(
        "which",
        "which",
        "Which tokenizer when",
        "Start from what you need of the ids; no view stands for another.",
        "The leader by the mean over seeds, and the tokenizers whose paired 95 % interval against "
        "it includes 0. Few collisions and even usage are no merit by themselves: noisy codes have "
        "both.",
        columns=["wanted", "leader", "level with it", "not run"],
        rows=table,
    )
