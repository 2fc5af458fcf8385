"""`semid.advise`: fit a few cheap candidates on samples of a catalogue, and say which to take."""

from __future__ import annotations

import contextlib
import logging
import math
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from semid.data.embeddings import open_embeddings
from semid.data.interactions import TEST, Interactions, read_interactions, split_users
from semid.data.source import EmbeddingSource
from semid.errors import InputError, SemidError
from semid.health import ROWS_PER_CODEWORD, collisions, read_evidence, usage, verdict
from semid.options import Options, option
from semid.progress import ProgressArgument, QuietProgress, with_progress
from semid.report.diagnose import diagnose
from semid.report.numbers import (
    KEPT_NEIGHBORS,
    NUMBERS,
    intrinsic_numbers,
    kept_neighbors,
)
from semid.reproduce.intervals import mean_difference
from semid.results import Result
from semid.seeds import numpy_generator
from semid.tokenizers.factory import make_tokenizer

MIN_ITEMS = 500
"""Fewer items fill no codebook worth choosing."""

MAX_ENCODED = 1_000_000
"""Items whose ids are made for collisions and the verdict."""

SHARE = 0.8
"""Share of the items in a sample at most, so that the samples of a small catalogue differ."""

IDS_PER_ITEM = 1000
"""Ids that three levels of the middle size make possible per item."""

MEANING = {
    "retention": "how much of what the embeddings retrieve of users' next items the codes keep",
    KEPT_NEIGHBORS: "share of an item's ten nearest neighbors that stay so when it is quantized",
}


@dataclass(frozen=True, kw_only=True)
class AdviseOptions(Options):
    """How much work an advice may take."""

    sample: int = option(
        20_000, ge=MIN_ITEMS, le=10_000_000, help="Largest number of items of a fit."
    )
    repeats: int = option(
        3, ge=2, le=100, help="Number of samples, each fitted anew: they give the intervals."
    )
    behind: float = option(
        0.05,
        ge=0,
        le=1,
        help="How far behind the best a choice with fewer bits may be, as a share.",
    )
    seed: int = option(0, help="Seed of the samples and the fits.")
    threads: int | None = option(None, ge=1, help="Number of CPU threads, all by default.")


@dataclass(frozen=True)
class AdvisedCandidate(Result):
    """One tokenizer that was tried.

    Values are of the number that candidates are ranked by, intervals Student's over the samples.
    """

    name: str
    tokenizer: str
    levels: int
    codebook_size: int
    bits: float  # per id
    options: Mapping[str, Any]  # further arguments of the tokenizer
    value: float
    low: float
    high: float
    behind: float  # how far behind the best on the same samples; 0 for the best itself
    behind_low: float
    behind_high: float
    colliding: float  # share of the items of the catalogue that share their id
    verdict: str  # of the ids of the catalogue: healthy, warning or unhealthy
    seconds: float  # of a fit


@dataclass(frozen=True)
class Advice(Result):
    """The results of `advise`.

    Attributes:
        items: of the catalogue.
        sample: items of each fit.
        repeats: number of samples.
        behind: how far behind the best the choice may be, as a share.
        criterion: number that candidates are ranked by.
        higher_is_better: its direction.
        reason: why it is this number.
        candidates: what was tried, the best first.
        recommended: name of the candidate to take.
        close: others that the intervals do not tell from the choice: either may be right.
        notes: what the reader must know, in sentences.
    """

    items: int
    sample: int
    repeats: int
    behind: float
    criterion: str
    higher_is_better: bool
    reason: str
    candidates: tuple[AdvisedCandidate, ...]
    recommended: str
    close: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def choice(self) -> AdvisedCandidate:
        """The candidate to take."""
        return next(each for each in self.candidates if each.name == self.recommended)

    @property
    def command(self) -> str:
        """The command that fits the choice on the whole catalogue."""
        c = self.choice
        more = "".join(
            f" --set {key}={value}" for key, value in c.options.items() if key != "training"
        )
        log = " --interactions LOG" if c.tokenizer in _BEHAVIOR else ""
        return (
            f"semid fit EMBEDDINGS --tokenizer {c.tokenizer} --levels {c.levels} "
            f"--codebook-size {c.codebook_size}{more}{log} -o model/"
        )

    def summary(self) -> str:
        """Return the advice as text for a terminal."""
        c, better = self.choice, "higher" if self.higher_is_better else "lower"
        width = max(len(each.name) for each in self.candidates)
        lines = [
            f"ranked by: {self.criterion} ({better} is better)",
            *textwrap.wrap(self.reason, 80, initial_indent="  ", subsequent_indent="  "),
            f"{self.repeats} fits each, on {self.sample:,} of {self.items:,} items",
            "",
            f"{'':{width}}  bits  {self.criterion[:22]:>22}  colliding  verdict    fit",
        ]
        lines += [
            f"{each.name:{width}}  {each.bits:4.0f}  "
            f"{f'{each.value:.3f} ({each.low:.3f} to {each.high:.3f})':>22}  "
            f"{each.colliding:9.1%}  {each.verdict:9}  {each.seconds:.0f} s"
            for each in self.candidates
        ]
        lines += [
            "",
            f"take {c.tokenizer} with {c.levels} levels of {c.codebook_size} codes:",
            f"the fewest bits of healthy ids at most {self.behind:.0%} behind the best of these",
        ]
        if self.close:
            lines.append(f"the intervals do not tell it from: {', '.join(self.close)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, "", f"  {self.command}"])


_BEHAVIOR = ("drqvae", "barq")
"""Tokenizers of the candidates that learn from interactions."""


def largest_codebook(sample: int) -> int:
    """Return the power of two that leaves about `ROWS_PER_CODEWORD` training rows per codeword."""
    return 1 << round(math.log2(sample / ROWS_PER_CODEWORD))


def _candidates(items: int, sample: int, dim: int, log: bool) -> Iterator[dict[str, Any]]:
    """Yield arguments of the candidates: sizes around what the number of items asks for."""
    # Three levels of the middle size give every item `IDS_PER_ITEM` ids; no codebook gets fewer
    # training rows than K-means needs.
    most = largest_codebook(sample)
    middle = min(2 ** round(math.log2(IDS_PER_ITEM * items) / 3), most)
    small, large = max(middle // 4, 4), middle * 4
    for levels, size in ((3, small), (2, middle), (3, middle), (4, middle), (3, large)):
        if size <= most:
            yield {"tokenizer": "rqkmeans", "levels": levels, "codebook_size": size}
    if dim >= 4:
        yield {"tokenizer": "opq", "levels": 4, "codebook_size": middle}
    if log:
        both = {"levels": 3, "codebook_size": middle}
        weight = {"contrastive_weight": 1.0, "training": {"epochs": 20}}
        yield {"tokenizer": "drqvae", **both, "options": weight}
        yield {"tokenizer": "barq", **both, "options": {"training": {"epochs": 30}}}


def _criterion(log: bool) -> tuple[str, bool, str]:
    """Return the number to rank by, whether higher is better, and why it is this one."""
    evidence = read_evidence()
    # Bits are what is to be chosen; the rate of decoded codes is retention times the embedding's.
    excluded = ("bits per id", "hit rate, decoded")
    names = [name for name in (*NUMBERS, KEPT_NEIGHBORS) if name not in excluded]
    if not log:  # numbers of pairs need a log
        pairs = ("retention", "hit rate", "behavior")
        names = [n for n in names if not n.startswith(pairs) and not n.endswith("AUC")]
    best = evidence.best(names)
    assert best is not None  # a test asks it of the committed runs
    predictor = evidence.numbers[best]
    meaning = f"{MEANING[best]}; " if best in MEANING else ""
    return (
        best,
        predictor.correlation > 0,
        f"{meaning}it ranks two tokenizers right in {predictor.pairs_right:.0%} of pairs by "
        "next-item quality, on data sets that did not decide how ('semid reproduce predict')",
    )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("semid")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _draw(
    source: EmbeddingSource, log: Interactions | None, count: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return rows of a sample, ascending: items of random test users first, then any."""
    # Test users' items come together, so that their consecutive pairs survive in a small sample.
    rng = numpy_generator(seed, "advise")
    order = rng.permutation(len(source))
    if log is not None:
        sequences = log.sequences(source.ids)
        users = rng.permutation(np.flatnonzero(split_users(log.user_ids) == TEST))
        drawn: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)]
        total = 0
        for user in users.tolist():
            drawn.append(sequences[user].astype(np.int64))
            total += len(drawn[-1])
            if total > 4 * count:
                break
        order = np.concatenate([*drawn, order])
        order = order[order >= 0]
    _, first = np.unique(order, return_index=True)
    return np.sort(order[np.sort(first)][:count])


@with_progress
def advise(
    x: Any,
    *,
    interactions: Any = None,
    ids: Any = None,
    progress: ProgressArgument = None,
    **options: Any,
) -> Advice:
    """Fit cheap candidates on samples of a catalogue, and recommend one with error bars.

    Each candidate is fitted on several samples of the items and measured there. The choice is the
    one with the fewest bits per id among those with healthy ids, at most ``behind`` behind the
    best of these: more bits keep more by themselves. What "best" means is the number that predicts
    the quality of recommendations best in the committed runs of ``semid reproduce predict``, of
    those that can be had: without interactions, numbers of pairs of items cannot.

    Args:
        x: embeddings ``(items, dim)``: anything `semid.open_embeddings` reads; 500 items or more.
        interactions: the log, as `semid.read_interactions` reads it, in an order; adds candidates
            that learn from behavior. Numbers are of its test users, whom no fit sees.
        ids: item ids for embeddings that have none.
        progress: callback that receives progress events.
        options: ``sample``, ``repeats``, ``behind``, ``seed`` and ``threads``, see `AdviseOptions`.

    Returns:
        An `Advice`; ``summary()`` is its text, ``command`` what to run next.

    Raises:
        InputError: fewer than 500 items, or a number that is not defined on them.
        InteractionsError: interactions without an order, or without a pair of test users.

    Cost: ``repeats`` times 6 fits (8 with interactions) of ``sample`` items.
    """
    settings, progress = AdviseOptions.of(options), progress or QuietProgress()
    source = open_embeddings(x, ids=ids)
    if len(source) < MIN_ITEMS:
        raise InputError(
            f"{len(source)} items are too few to choose a tokenizer by; give {MIN_ITEMS} or more"
        )
    source.validate()  # so that problems are named by rows of the catalogue, not of a sample
    log = None if interactions is None else read_interactions(interactions, rating_column="")
    criterion, higher, reason = _criterion(log is not None)
    count = min(settings.sample, math.ceil(SHARE * len(source)))
    whole = source
    notes = []
    if len(source) > MAX_ENCODED:
        rows = numpy_generator(settings.seed, "whole").permutation(len(source))[:MAX_ENCODED]
        whole = source.subset(np.sort(rows))
        notes.append(
            f"collisions are of {MAX_ENCODED:,} items drawn at random; among all there are more"
        )
    if (most := largest_codebook(count)) ** 3 < IDS_PER_ITEM * len(source) / 2:
        notes.append(
            f"samples of {count:,} items are enough for codebooks of {most} codes, few for "
            f"{len(source):,} items; give a larger --sample (sample=)"
        )
    tried = list(_candidates(len(source), count, source.dim, log is not None))
    progress.start("advise", total=len(tried) * settings.repeats)
    scores: dict[int, list[float]] = {}
    about: dict[int, dict[str, Any]] = {}
    for repeat in range(settings.repeats):
        sample = source.subset(_draw(source, log, count, settings.seed + repeat))
        for number, arguments in enumerate(tried):
            try:
                with _without_warnings():  # of small samples and of items outside them
                    value, more = _try(arguments, criterion, sample, whole, log, settings, repeat)
            except SemidError as error:
                if arguments["tokenizer"] not in _BEHAVIOR:
                    raise
                if not repeat:  # a log may be too small to learn from
                    notes.append(f"{arguments['tokenizer']} is left out: {error}")
            else:
                scores.setdefault(number, []).append(value)
                about.setdefault(number, more)
            progress.step(1)
    complete = {n: values for n, values in scores.items() if len(values) == settings.repeats}
    ordered = _candidate_results(tried, complete, about, 1.0 if higher else -1.0)
    healthy = [each for each in ordered if each.verdict == "healthy"]
    if not healthy:
        notes.append("no candidate has healthy ids; see 'semid report' of the choice")
    pool = healthy or ordered
    # How far behind the best of all a choice may be: some share behind the best of the pool.
    limit = pool[0].behind + settings.behind * abs(pool[0].value)
    choice = min((each for each in pool if each.behind <= limit), key=lambda e: (e.bits, e.seconds))
    close = tuple(
        each.name
        for each in pool
        if each is not choice and each.bits <= choice.bits and each.behind_low <= limit
    )
    return Advice(
        items=len(source),
        sample=count,
        repeats=settings.repeats,
        behind=settings.behind,
        criterion=criterion,
        higher_is_better=higher,
        reason=reason,
        candidates=tuple(ordered),
        recommended=choice.name,
        close=close,
        notes=tuple(notes),
    )


def _try(
    arguments: Mapping[str, Any],
    criterion: str,
    sample: EmbeddingSource,
    whole: EmbeddingSource,
    log: Interactions | None,
    settings: AdviseOptions,
    repeat: int,
) -> tuple[float, dict[str, Any]]:
    """Fit a candidate on a sample; return its number there, and what is known of its ids."""
    began, seed = time.perf_counter(), settings.seed + repeat
    values = {name: arguments[name] for name in ("levels", "codebook_size")}
    values |= {**arguments.get("options", {}), "seed": seed}
    tokenizer = make_tokenizer(arguments["tokenizer"], values, threads=settings.threads)
    learns = arguments["tokenizer"] in _BEHAVIOR
    tokenizer.fit(sample, interactions=log if learns else None, progress=False)
    seconds = time.perf_counter() - began
    if criterion == KEPT_NEIGHBORS:
        rows = sample.rows(np.arange(len(sample)))
        decoded = tokenizer.decode(tokenizer.encode(sample, progress=False))
        value: float | None = kept_neighbors(rows, decoded, sample=1000, seed=settings.seed)
    else:
        measured = diagnose(
            tokenizer,
            sample,
            interactions=log,
            seed=settings.seed,
            geometry_sample=2000,
            flip_sample=500,
            replicates=0,
            threads=settings.threads,
            explorer=False,
            progress=False,
        )
        value = intrinsic_numbers(measured)[criterion]
    if value is None:
        raise InputError(
            f"{criterion} is not defined on a sample of this catalogue: its embeddings may know "
            "nothing of users' next items; leave --interactions (interactions=) out"
        )
    if repeat:
        return value, {}
    codes = tokenizer.encode(whole, progress=False).codes
    shared = collisions(codes)
    level = verdict(usage(codes, tokenizer.codebook_sizes), shared).level
    return value, {
        "colliding": shared.colliding_item_rate,
        "verdict": level,
        "seconds": seconds,
        "bits": float(sum(map(math.log2, tokenizer.codebook_sizes))),
    }


def _candidate_results(
    tried: list[dict[str, Any]],
    scores: Mapping[int, list[float]],
    about: Mapping[int, Mapping[str, Any]],
    sign: float,
) -> list[AdvisedCandidate]:
    """Return the candidates with intervals over the samples, the best first."""
    best = max(scores, key=lambda number: sign * float(np.mean(scores[number])))
    results = []
    for number, values in scores.items():
        at = tried[number]
        estimate = mean_difference(values)
        # All candidates see the same samples, so their differences are paired.
        gaps = [sign * (a - b) for a, b in zip(scores[best], values, strict=True)]
        behind = mean_difference(gaps)
        results.append(
            AdvisedCandidate(
                name=f"{at['tokenizer']} {at['levels']}x{at['codebook_size']}",
                tokenizer=at["tokenizer"],
                levels=at["levels"],
                codebook_size=at["codebook_size"],
                options=at.get("options", {}),
                value=estimate.mean,
                low=estimate.low,
                high=estimate.high,
                behind=behind.mean,
                behind_low=behind.low,
                behind_high=behind.high,
                **about[number],
            )
        )
    return sorted(results, key=lambda each: each.behind)
