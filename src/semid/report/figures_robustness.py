"""Figures of robustness: flips under noise beside their proxies, and spectra."""

from __future__ import annotations

from semid.report.diagnosis import Diagnosis
from semid.report.figure import Figure, level_name, line
from semid.report.numbers import count, number, share

__all__ = ["robustness_figures"]


def robustness_figures(d: Diagnosis) -> list[Figure]:
    """Return the figures of flips and of spectra."""
    return [*_flips(d), *_spectra(d)]


def _plain(kind: str) -> str:
    return kind.replace("_", " ")


def _flips(d: Diagnosis) -> list[Figure]:
    if d.flips is None:
        return []
    points = d.flips["input"]["flips"]["points"]
    margins = d.flips["input"]["margins"]["points"]
    scales = [point["scale"] for point in points]
    kind = "prefix" if d.model["hierarchical"] else "code"
    traces = []
    for level in range(d.model["levels"]):
        color = level % 7 + 1
        shares = [point[kind][level] for point in points]
        name = f"up to level {level + 1}" if kind == "prefix" else level_name(d, level)
        traces.append(
            line(
                name,
                scales,
                [value["value"] for value in shares],
                color,
                mode="lines+markers",
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": [value["high"] - value["value"] for value in shares],
                    "arrayminus": [value["value"] - value["low"] for value in shares],
                    "thickness": 1,
                    "width": 2,
                    "color": f"@{color}",
                },
                hovertemplate="noise %{x}: %{y:.1%}",
            )
        )
        traces.append(
            line(
                f"margin proxy, {name}",
                scales,
                [margin[kind][level] for margin in margins],
                color,
                dash="dot",
                width=1,
                showlegend=False,
                hoverinfo="skip",
            )
        )
    return [
        Figure(
            "flips",
            "robustness",
            "Ids that change under noise on the input",
            "Good: lines that stay low at small noise, so that a refreshed embedding keeps its id. "
            "Bad: many ids that flip at 0.1 or 0.2; few collisions are then bought with noise.",
            "Gaussian noise is added to the embeddings, in units of their standard deviation, and "
            "they are encoded again. Whole lines are measured shares with 95% intervals; dotted "
            "lines are the margin proxy, a closed form from the distance of each item to the "
            "borders of its cell.",
            traces,
            {
                "xaxis": {
                    "title": {"text": "noise, in input standard deviations"},
                    "type": "log",
                    "tickvals": scales,
                    "ticktext": [f"{scale:g}" for scale in scales],
                },
                "yaxis": {
                    "title": {"text": "share of items"},
                    "tickformat": ".0%",
                    "range": [0, 1],
                },
            },
            ["Noise", *_flip_columns(d, kind)],
            _flip_rows(d, kind),
        )
    ]


def _flip_columns(d: Diagnosis, kind: str) -> list[str]:
    names = [
        f"up to level {level + 1}" if kind == "prefix" else level_name(d, level)
        for level in range(d.model["levels"])
    ]
    spaces = ["input"] if "latent" not in (d.flips or {}) else ["input", "latent"]
    return [
        f"{name}, {space}{what}"
        for space in spaces
        for name in names[-1:]
        for what in ("", " (proxy)")
    ] + [f"{name}, input" for name in names[:-1]]


def _flip_rows(d: Diagnosis, kind: str) -> list[list[str]]:
    flips = d.flips or {}
    spaces = [space for space in ("input", "latent") if space in flips]
    rows = []
    for place, point in enumerate(flips["input"]["flips"]["points"]):
        row = [f"{point['scale']:g}"]
        for space in spaces:
            row.append(share(flips[space]["flips"]["points"][place][kind][-1]["value"]))
            row.append(share(flips[space]["margins"]["points"][place][kind][-1]))
        row += [share(value["value"]) for value in point[kind][:-1]]
        rows.append(row)
    return rows


def _spectra(d: Diagnosis) -> list[Figure]:
    if d.geometry is None:
        return []
    spaces = d.geometry["spaces"]
    return [
        Figure(
            "spectra",
            "geometry",
            "Directions that carry variance",
            "Good: the three lines lie together, so codes keep the directions of the embedding. "
            "Bad: a line that drops early, where a space has collapsed onto few directions.",
            "Eigenvalues of the covariance as shares of their sum, largest first, on a random "
            f"{count(d.geometry['rows'])} of {count(d.geometry['items'])} items. Participation "
            "ratio and effective rank count the directions in use, from 1 to the width. The cosine "
            "is the mean absolute one between distinct dimensions, as they are and centered.",
            [
                line(
                    space["name"],
                    space["spectrum"]["rank"],
                    [value if value > 1e-9 else None for value in space["spectrum"]["share"]],
                    place + 1,
                    dash=("solid", "dash", "solid")[place % 3],
                    hovertemplate="direction %{x}: %{y:.2%}",
                )
                for place, space in enumerate(spaces)
            ],
            {
                "xaxis": {"title": {"text": "direction, strongest first"}},
                "yaxis": {
                    "title": {"text": "share of variance"},
                    "type": "log",
                    "tickformat": ".3~%",
                    "dtick": 1,
                },
            },
            [
                "",
                "Width",
                "Participation ratio",
                "Effective rank",
                "Top share",
                "Mean absolute cosine",
                "Centered",
            ],
            [
                [
                    space["name"],
                    count(space["dim"]),
                    number(space["participation_ratio"]),
                    number(space["effective_rank"]),
                    share(space["top_share"]),
                    number(space["mean_abs_cosine"]),
                    number(space["mean_abs_cosine_centered"]),
                ]
                for space in spaces
            ],
        )
    ]
