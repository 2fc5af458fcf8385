"""The MoC paper as data: what its words claim of ranking and of the codes' embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from semid.reproduce.claims import Claim, Contrast, Metric, Row, Rows, claim, inside, metric
from semid.reproduce.tables import printed

__all__ = ["TITLE", "moc_claims", "paper_auc", "paper_gain"]

TITLE = "Towards Scalable Semantic Representation (Mixture-of-Codes)"
MODELS = ("deepfm", "deepim", "autoint", "dcnv2")
SETS = ("toys", "beauty", "sports")
CLUSTERS = 100
ONE, NONE = ("vqvae", 1), ("none", 0)
NAMES = {
    "none": "no codes",
    "vqvae": "one code",
    "me": "ME",
    "rqvae": "RQ-VAE",
    "moc": "MoC",
    "random": "random",
    "shuffled": "shuffled",
    "widened": "widened",
}
AUC = metric("auc")


def paper_auc(model: str, method: str, scale: int, data: str) -> float | None:
    """Return the AUC of the paper's table 1; at 1x the method is ``vqvae``."""
    values = printed("moc")["table-1"].get(model, {}).get(f"{method}-{scale}")
    return float(values[SETS.index(data)]) if values and data in SETS else None


def paper_gain(other: str, scales: Sequence[int] = (2, 3, 7)) -> tuple[int, int, float]:
    """Count where the paper's own table 1 has MoC above another method.

    Args:
        other: ``rqvae`` or ``me``.
        scales: which columns.

    Returns:
        Cells in which MoC is higher, cells in all, and the mean difference.
    """
    table = printed("moc")["table-1"]
    gains = [
        ours - theirs
        for cells in table.values()
        for scale in scales
        for ours, theirs in zip(cells[f"moc-{scale}"], cells[f"{other}-{scale}"], strict=True)
    ]
    return sum(gain > 1e-9 for gain in gains), len(gains), sum(gains) / len(gains)


def nmi(points: str = "sweep") -> Metric:
    """Return a metric of an analysis: NMI of clustered embeddings with the label.

    Small data have fewer clusters than `CLUSTERS`; the most that there are count then.
    """

    def read(analysis: Row) -> float:
        at_size = [p for p in analysis[points] if p["clusters"] == CLUSTERS]
        return float((at_size or analysis[points][-1:])[0]["nmi"])

    return read


def top_value(analysis: Row) -> float:
    """Return the logarithm of the largest singular value."""
    return float(np.log10(analysis["spectrum"]["value"][0]))


def used_share(analysis: Row) -> float:
    """Return the share of singular values above a thousandth of the largest."""
    return float(analysis["spectrum"]["above"] / analysis["spectrum"]["dimensions"])


def between_codes(name: str) -> Metric:
    """Return a metric of an analysis: mean absolute off-diagonal entry of a matrix over codes."""

    def read(analysis: Row) -> float | None:
        matrix = np.abs(np.asarray(analysis[name], dtype=np.float64))
        count = len(matrix)
        if count < 2:
            return None
        return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))

    return read


def variance_rebuilt(row: Row) -> float | None:
    """Return the share of the variance of item embeddings that is rebuilt from codes."""
    kept = row.get("kept")
    return 1.0 - float(kept["error"]) if kept else None


def cell(method: str, scale: int, fusion: bool = False, part: str = "") -> dict[str, Any]:
    """Select the ranking runs of one cell."""
    return {"run": "rank", "method": method, "scale": scale, "fusion": fusion, "part": part}


def cell_name(selection: Mapping[str, Any]) -> str:
    """Write a cell."""
    scale = f" {selection['scale']}x" if selection["scale"] > 1 else ""
    fusion = " + fusion" if selection["fusion"] else ""
    kind, _, number = selection["part"].partition(" ")
    part = {"alone": f", code {number} alone", "first": f", codes 1 to {number}"}.get(kind, "")
    return f"{NAMES[selection['method']]}{scale}{part}{fusion}"


def ranked(
    a: Mapping[str, Any], b: Mapping[str, Any], models: Sequence[str] = MODELS
) -> list[Contrast]:
    """Contrast the AUC of two cells for every ranking model."""
    name = f"{cell_name(a)} - {cell_name(b)}"
    return [Contrast(name, AUC, a, b, model=model) for model in models]


def both_fusions(a: tuple[str, int], b: tuple[str, int]) -> list[list[Contrast]]:
    """Contrast two methods on equal terms: with fusion on both sides, then on neither."""
    return [ranked(cell(*a, fusion), cell(*b, fusion)) for fusion in (True, False)]


def moc_claims(rows: Rows) -> list[Claim]:
    """Return every claim of the paper, about the widest scale that has run.

    Args:
        rows: rows of the main protocol.
    """
    widest = max((s for s in rows.names("scale", run="rank") if s and s > 1), default=7)
    return [*_ranking_claims(rows, widest), *_code_claims(rows, widest)]


def _ranking_claims(rows: Rows, m: int) -> Iterator[Claim]:
    above, cells, mean = paper_gain("rqvae")
    moc, me, rq = (cell(name, m) for name in ("moc", "me", "rqvae"))
    fused = {**moc, "fusion": True}
    yield claim(
        "moc-printed",
        "§5.2, table 1",
        "With as many codes MoC outperforms the baselines, most of all at 7x (as printed: "
        "fusion for MoC alone).",
        f"AUC at {m}x, MoC with fusion less RQ-VAE and ME without",
        ranked(fused, rq),
        ranked(fused, me),
        rule="most",
        equal_terms=False,
        note=f"In the paper's own table 1 MoC is above RQ-VAE in {above} of {cells} cells at 2x, "
        f"3x and 7x, by {mean:.4f} on average, with three seeds and no interval: 'a large margin' "
        "is not what it prints.",
    )
    yield claim(
        "moc-rqvae",
        "§5.2, table 1",
        "MoC outperforms RQ-VAE (on equal terms: fusion on both sides, or on neither).",
        f"AUC at {m}x, MoC less RQ-VAE",
        *both_fusions(("moc", m), ("rqvae", m)),
        rule="most",
    )
    yield claim(
        "moc-me",
        "§5.2, table 1",
        "MoC outperforms ME (on equal terms).",
        f"AUC at {m}x, MoC less ME",
        *both_fusions(("moc", m), ("me", m)),
        rule="most",
    )
    yield claim(
        "moc-toys",
        "§5.2",
        "On Toys at 7x all four models benefit from MoC over RQ-VAE, by .0020, .0018, "
        ".0029 and .0005 (as printed).",
        "AUC on Toys, MoC with fusion less RQ-VAE without, four models",
        ranked(fused, rq),
        equal_terms=False,
        data=("toys",),
    )
    for method, name, sentence in (
        ("moc", "MoC", "MoC's performance increases with more codes."),
        ("rqvae", "RQ-VAE", "RQ-VAE gains slightly with more codes."),
        ("me", "ME", "ME degrades with more embeddings of its one code."),
    ):
        ends = ((method, m), ONE)
        yield claim(
            f"scaling-{method}",
            "§5.2, table 1",
            sentence,
            f"AUC of {name} at {m}x against 1x, fusion alike",
            *both_fusions(*(ends[::-1] if method == "me" else ends)),
            rule="most",
        )
    for method in ("moc", "rqvae", "me"):
        yield claim(
            f"help-{method}",
            "§1, implied",
            f"Codes help ranking: {NAMES[method]} against no codes.",
            f"AUC at {m}x less AUC without codes, fusion alike",
            *both_fusions((method, m), NONE),
            rule="most",
        )
    for control, meaning in (
        ("random", "codes that mean nothing, of the same shape"),
        ("shuffled", "MoC's own codes dealt to other items"),
        ("widened", "an item id with as many more parameters"),
    ):
        yield claim(
            f"control-{control}",
            "control (ours)",
            f"What MoC gains is the meaning of its codes, not what {meaning} would gain.",
            f"AUC at {m}x, MoC less {control}, fusion alike",
            *both_fusions(("moc", m), (control, m)),
            rule="most",
        )
    for method in ("rqvae", "moc"):
        yield claim(
            f"fusion-{method}",
            "§5.5, table 2",
            f"{NAMES[method]} benefits from the fusion module when scaled up.",
            f"AUC of {NAMES[method]} at {m}x, fusion on less off",
            ranked(cell(method, m, True), cell(method, m)),
            rule="most",
        )
    models = rows.names("model", run="rank", part="alone 1") or ["dcnv2"]

    def parts(kind: str, count: int) -> list[list[Contrast]]:
        """Contrast MoC with RQ-VAE at equal parts of their codes."""
        return [
            ranked({**moc, "part": f"{kind} {n}"}, {**rq, "part": f"{kind} {n}"}, models)
            for n in range(1, count + 1)
        ]

    yield claim(
        "level-order",
        "§5.4, fig. 8a",
        "Adding a low level of RQ-VAE alone gains more than a high one.",
        f"AUC with level 1 alone less AUC with level {m} alone",
        ranked({**rq, "part": "alone 1"}, {**rq, "part": f"alone {m}"}, models),
        rule="most",
    )
    yield claim(
        "level-moc",
        "§5.4, fig. 8a",
        "A single code of MoC is consistently better than the same level of RQ-VAE.",
        "AUC with code i alone, MoC less RQ-VAE, every i",
        *parts("alone", m),
    )
    yield claim(
        "level-first",
        "§5.4, fig. 8b",
        "With several codes from the lowest up, MoC gains significantly over RQ-VAE.",
        "AUC with codes 1 to i, MoC less RQ-VAE, every i",
        *parts("first", m - 1),
        rule="most",
    )


def _code_claims(rows: Rows, m: int) -> Iterator[Claim]:
    """Yield the claims behind figures 1 to 4, 7, 9 and 10."""
    # Embeddings were analyzed of one ranking model, whichever the recipe has first.
    model = next((r["model"] for r in rows.rows if r.get("analysis")), "dcnv2")

    def at(method: str, scale: int, fusion: bool = False) -> dict[str, Any]:
        return {**cell(method, scale, fusion), "model": model}

    one, me, rq, moc = at(*ONE), at("me", m), at("rqvae", m), at("moc", m)

    def contrast(
        name: str,
        a: Mapping[str, Any],
        b: Mapping[str, Any],
        read: Metric,
        read_b: Metric | None = None,
        *,
        part: str = "analysis",
        **more: Any,
    ) -> list[Contrast]:
        """Contrast a metric of two cells' analyses; of the first one's ``part``."""
        other = inside(("analysis",), read_b or read)
        return [Contrast(name, inside((part,), read), a, b, other, **more)]

    scales = [s for s in rows.names("scale", run="kept", method="moc") if s <= 3] or [2, 3]
    yield claim(
        "information",
        "§3.1, fig. 1a",
        "The error of rebuilding item embeddings drops significantly with 2 and 3 "
        "independent codebooks.",
        "variance rebuilt on held-out items, MoC at 2x and 3x less one code",
        *(
            [
                Contrast(
                    f"variance rebuilt, MoC {scale}x - one code",
                    variance_rebuilt,
                    {"run": "kept", "method": "moc", "scale": scale},
                    {"run": "kept", "method": "vqvae", "scale": 1},
                )
            ]
            for scale in scales
        ),
    )
    yield claim(
        "nmi-me",
        "§3.3, fig. 2",
        "ME's discriminability does not increase with scale and may decrease slightly.",
        f"NMI of {CLUSTERS} clusters with the label, one code less ME {m}x",
        contrast(f"NMI, one code - ME {m}x", one, me, nmi(), digits=5),
        rule="most",
        note="Every comparison here is of tiny numbers; the page sets each beside its value "
        "for shuffled labels.",
    )
    yield claim(
        "nmi-moc",
        "§4.3, fig. 2",
        "MoC's discriminability increases with scale.",
        f"NMI, MoC {m}x less one code",
        contrast(f"NMI, MoC {m}x - one code", moc, one, nmi(), digits=5),
    )
    yield claim(
        "nmi-rqvae",
        "§3.3, fig. 2",
        "RQ-VAE's discriminability does not increase like MoC's.",
        f"NMI at {m}x, MoC less RQ-VAE",
        contrast(f"NMI at {m}x, MoC - RQ-VAE", moc, rq, nmi(), digits=5),
    )
    yield claim(
        "nmi-first",
        "§3.3, figs. 1c and 3",
        "RQ-VAE's first code knows more than all its codes flattened.",
        "NMI of the first code's embedding less that of all, RQ-VAE",
        contrast(f"NMI, code 1 - all, RQ-VAE {m}x", rq, rq, nmi("first"), nmi(), digits=5),
    )
    first, last = (metric("codes", n, "nmi") for n in (0, -1))
    yield claim(
        "nmi-levels",
        "§3.3, fig. 3",
        "Higher levels of RQ-VAE hold less: the first code itself against the last.",
        f"NMI of code 1 less NMI of code {m}, RQ-VAE",
        contrast(f"NMI, code 1 - code {m}", rq, rq, first, last, digits=5),
    )
    yield claim(
        "nmi-once",
        "§4.3 against table 1",
        "At 1x all methods are the same (table 1 prints one number for them; §4.3 says "
        "that MoC's discriminability at 1x is much higher than ME's).",
        "difference of the NMI at 1x within 0.0005, three separate trainings",
        *(
            contrast(
                f"NMI, MoC 1x and {name} 1x (0.0005 less its size)",
                at("moc", 1),
                at(other, 1),
                nmi(),
                margin=0.0005,
                digits=5,
            )
            for other, name in (("rqvae", "RQ-VAE"), ("vqvae", "ME"))
        ),
        rule="most",
    )
    top = f"log10 top value at {m}x"
    yield claim(
        "spectrum-me-top",
        "§3.3, fig. 4",
        "ME has the largest top singular values.",
        "log10 of the largest singular value, ME less RQ-VAE and less MoC",
        contrast(f"{top}, ME - RQ-VAE", me, rq, top_value, digits=3),
        contrast(f"{top}, ME - MoC", me, moc, top_value, digits=3),
    )
    yield claim(
        "spectrum-moc-top",
        "§4.3, fig. 4",
        "MoC's top singular values are higher than RQ-VAE's.",
        "log10 of the largest singular value, MoC less RQ-VAE",
        contrast(f"{top}, MoC - RQ-VAE", moc, rq, top_value, digits=3),
    )
    yield claim(
        "spectrum-me-tail",
        "§3.3, fig. 4",
        "ME's dimensions collapse at 5x and 7x, RQ-VAE's and MoC's do not.",
        "share of singular values above 1/1000 of the largest, RQ-VAE and MoC less ME",
        contrast(f"share used at {m}x, RQ-VAE - ME", rq, me, used_share, digits=3),
        contrast(f"share used at {m}x, MoC - ME", moc, me, used_share, digits=3),
        note="ME's embeddings have at most K distinct rows, so their rank cannot exceed K.",
    )
    alike, cka = between_codes("correlation"), between_codes("cka")
    yield claim(
        "correlation-me",
        "§5.3, fig. 7",
        "ME's representations are strongly correlated, those of RQ-VAE and MoC are not.",
        "mean |correlation| between codes (eq. 9), ME less RQ-VAE and less MoC",
        contrast("|correlation|, ME - RQ-VAE", me, rq, alike, digits=3),
        contrast("|correlation|, ME - MoC", me, moc, alike, digits=3),
        note="Eq. 9 depends on the basis each table happens to have; the next claim does not.",
    )
    yield claim(
        "cka-me",
        "§5.3, fig. 7, by linear CKA (ours)",
        "ME's representations are alike, those of RQ-VAE and MoC are not.",
        "mean CKA between codes, ME less RQ-VAE and less MoC",
        contrast("CKA, ME - RQ-VAE", me, rq, cka, digits=3),
        contrast("CKA, ME - MoC", me, moc, cka, digits=3),
    )
    after = "analysis_fused"
    fused = at("moc", m, True)
    yield claim(
        "fusion-nmi",
        "§5.5, fig. 9",
        "Fusion enhances MoC's discriminability.",
        "NMI of MoC's embeddings after fusion less those of the model without",
        contrast(f"NMI at {m}x, fused - without", fused, moc, nmi(), part=after, digits=5),
    )
    yield claim(
        "fusion-spectrum",
        "§5.5, fig. 10",
        "Fusion amplifies the principal components.",
        "log10 of the largest singular value after fusion less without",
        contrast(f"{top}, fused - without", fused, moc, top_value, part=after, digits=3),
    )
