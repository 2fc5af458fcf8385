"""The MoC paper's claims on ranking, each with the comparisons that decide it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from semid.reproduce.claims import Claim, Comparison, Judgement, Row, Rows, judge
from semid.reproduce.claims_moc_codes import code_claims
from semid.reproduce.paper_numbers import moc_cells

__all__ = ["MODELS", "MocTest", "moc_claims"]

MODELS = ("deepfm", "deepim", "autoint", "dcnv2")


def auc(row: Row) -> float | None:
    """Read the test AUC."""
    value = row.get("auc")
    return None if value is None else float(value)


class MocTest:
    """Builds comparisons over data sets and models.

    Args:
        rows: of the ledger; protocols beside the main one decide nothing.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = Rows([r for r in rows.rows if not r.get("variant")])
        self.sets = self.rows.names("data") or ["any data set"]
        scales = [s for s in self.rows.names("scale", run="rank") if s and s > 1]
        self.widest = max(scales, default=7)

    def pairs(
        self,
        a: Mapping[str, Any],
        b: Mapping[str, Any],
        *,
        models: Iterable[str] = MODELS,
        sets: Iterable[str] | None = None,
        shared: Mapping[str, Any] | None = None,
    ) -> list[Comparison]:
        """Compare the AUC of two cells for every data set and model."""
        common = {"run": "rank", "part": "", **(shared or {})}
        found = []
        for name in self.sets if sets is None else sets:
            for model in models:
                base = {**common, "data": name, "model": model}
                found.append(
                    Comparison(
                        f"{name}, {model}: {_said(a)} - {_said(b)}",
                        self.rows.difference(auc, {**base, **a}, {**base, **b}),
                    )
                )
        return found


def _said(cell: Mapping[str, Any]) -> str:
    """Write a cell."""
    names = {"vqvae": "one code", "none": "no codes", "rqvae": "RQ-VAE", "moc": "MoC", "me": "ME"}
    scale = f" {cell['scale']}x" if cell.get("scale", 0) > 1 else ""
    fusion = {True: " + fusion", False: "", None: ""}[cell.get("fusion")]
    kind, _, number = str(cell.get("part", "")).partition(" ")
    part = {"alone": f", code {number} alone", "first": f", codes 1 to {number}"}.get(kind, "")
    return f"{names.get(cell['method'], cell['method'])}{scale}{part}{fusion}"


def _cell(method: str, scale: int, fusion: bool) -> dict[str, Any]:
    return {"method": method, "scale": scale, "fusion": fusion}


ONE, NONE = ("vqvae", 1), ("none", 0)


def moc_claims(rows: Rows) -> list[Judgement]:
    """Judge every claim of the paper on the rows of a ledger.

    Args:
        rows: of ranking runs and of runs that rebuild embeddings.
    """
    test = MocTest(rows)
    return [
        *_main(test),
        *_scaling(test),
        *_controls(test),
        *_fusion(test),
        *_levels(test),
        *code_claims(test.rows, test.sets, test.widest),
    ]


def _both(test: MocTest, a: str, b: str, *, sets: Iterable[str] | None = None) -> list[Comparison]:
    """Compare two methods at the widest scale with fusion on both sides and on neither."""
    m = test.widest
    return [
        c
        for fusion in (True, False)
        for c in test.pairs(_cell(a, m, fusion), _cell(b, m, fusion), sets=sets)
    ]


def _main(test: MocTest) -> list[Judgement]:
    m = test.widest
    above, cells, mean = moc_cells("rqvae")
    own = (
        f"In the paper's own table 1 MoC is above RQ-VAE in {above} of {cells} cells at 2x, 3x and "
        f"7x, by {mean:.4f} on average, with three seeds and no interval: 'a large margin' is not "
        "what it prints."
    )
    toys = [name for name in test.sets if name == "toys"] or ["toys"]
    return [
        judge(
            Claim(
                "moc-printed",
                "§5.2, table 1",
                "With as many codes MoC outperforms the baselines, most of all at 7x (as printed: "
                "fusion for MoC alone).",
                f"AUC at {m}x, MoC with fusion less RQ-VAE and ME without",
                rule="most",
                equal_terms=False,
            ),
            [
                c
                for other in ("rqvae", "me")
                for c in test.pairs(_cell("moc", m, True), _cell(other, m, False))
            ],
            note=own,
        ),
        judge(
            Claim(
                "moc-rqvae",
                "§5.2, table 1",
                "MoC outperforms RQ-VAE (on equal terms: fusion on both sides, or on neither).",
                f"AUC at {m}x, MoC less RQ-VAE",
                rule="most",
            ),
            _both(test, "moc", "rqvae"),
        ),
        judge(
            Claim(
                "moc-me",
                "§5.2, table 1",
                "MoC outperforms ME (on equal terms).",
                f"AUC at {m}x, MoC less ME",
                rule="most",
            ),
            _both(test, "moc", "me"),
        ),
        judge(
            Claim(
                "moc-toys",
                "§5.2",
                "On Toys at 7x all four models benefit from MoC over RQ-VAE, by .0020, .0018, "
                ".0029 and .0005 (as printed).",
                "AUC on Toys, MoC with fusion less RQ-VAE without, four models",
                equal_terms=False,
            ),
            test.pairs(_cell("moc", m, True), _cell("rqvae", m, False), sets=toys),
        ),
    ]


def _scaling(test: MocTest) -> list[Judgement]:
    m = test.widest
    found = []
    for method, name, sentence, better in (
        ("moc", "MoC", "MoC's performance increases with more codes.", True),
        ("rqvae", "RQ-VAE", "RQ-VAE gains slightly with more codes.", True),
        ("me", "ME", "ME degrades with more embeddings of its one code.", False),
    ):
        many = [_cell(method, m, fusion) for fusion in (True, False)]
        once = [_cell(*ONE, fusion) for fusion in (True, False)]
        found.append(
            judge(
                Claim(
                    f"scaling-{method}",
                    "§5.2, table 1",
                    sentence,
                    f"AUC of {name} at {m}x against 1x, fusion alike",
                    rule="most",
                ),
                [
                    c
                    for a, b in zip(many, once, strict=True)
                    for c in (test.pairs(a, b) if better else test.pairs(b, a))
                ],
            )
        )
    return found


def _controls(test: MocTest) -> list[Judgement]:
    m = test.widest
    found = [
        judge(
            Claim(
                f"help-{method}",
                "§1, implied",
                f"Codes help ranking: {name} against no codes.",
                f"AUC at {m}x less AUC without codes, fusion alike",
                rule="most",
            ),
            [
                c
                for fusion in (True, False)
                for c in test.pairs(_cell(method, m, fusion), _cell(*NONE, fusion))
            ],
        )
        for method, name in (("moc", "MoC"), ("rqvae", "RQ-VAE"), ("me", "ME"))
    ]
    controls = {
        "random": "codes that mean nothing, of the same shape",
        "shuffled": "MoC's own codes dealt to other items",
        "widened": "an item id with as many more parameters",
    }
    for control, meaning in controls.items():
        found.append(
            judge(
                Claim(
                    f"control-{control}",
                    "control (ours)",
                    f"What MoC gains is the meaning of its codes, not what {meaning} would gain.",
                    f"AUC at {m}x, MoC less {control}, fusion alike",
                    rule="most",
                ),
                _both(test, "moc", control),
            )
        )
    return found


def _fusion(test: MocTest) -> list[Judgement]:
    m = test.widest
    names = (("rqvae", "RQ-VAE"), ("moc", "MoC"))
    return [
        judge(
            Claim(
                f"fusion-{method}",
                "§5.5, table 2",
                f"{name} benefits from the fusion module when scaled up.",
                f"AUC of {name} at {m}x, fusion on less off",
                rule="most",
            ),
            test.pairs(_cell(method, m, True), _cell(method, m, False)),
        )
        for method, name in names
    ]


def _levels(test: MocTest) -> list[Judgement]:
    """Figure 8: a level alone, and levels from the lowest up."""
    m = test.widest

    def at(method: str, part: str) -> dict[str, Any]:
        return {**_cell(method, m, False), "part": part}

    models = test.rows.names("model", run="rank", part="alone 1") or ["dcnv2"]
    return [
        judge(
            Claim(
                "level-order",
                "§5.4, fig. 8a",
                "Adding a low level of RQ-VAE alone gains more than a high one.",
                f"AUC with level 1 alone less AUC with level {m} alone",
                rule="most",
            ),
            test.pairs(at("rqvae", "alone 1"), at("rqvae", f"alone {m}"), models=models),
        ),
        judge(
            Claim(
                "level-moc",
                "§5.4, fig. 8a",
                "A single code of MoC is consistently better than the same level of RQ-VAE.",
                "AUC with code i alone, MoC less RQ-VAE, every i",
            ),
            [
                c
                for n in range(1, m + 1)
                for c in test.pairs(
                    at("moc", f"alone {n}"), at("rqvae", f"alone {n}"), models=models
                )
            ],
        ),
        judge(
            Claim(
                "level-first",
                "§5.4, fig. 8b",
                "With several codes from the lowest up, MoC gains significantly over RQ-VAE.",
                "AUC with codes 1 to i, MoC less RQ-VAE, every i",
                rule="most",
            ),
            [
                c
                for n in range(1, m)
                for c in test.pairs(
                    at("moc", f"first {n}"), at("rqvae", f"first {n}"), models=models
                )
            ],
        ),
    ]
