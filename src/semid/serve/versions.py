"""What the service answers from: one immutable version of a bundle, replaced as a whole.

A request takes `Catalogue.current` once and answers from it alone, so it never sees two versions.
Loading and adding happen beside it, under one lock; only when all is checked does the attribute
change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from semid.catalogue.additions import NOVEL, add_items, check_model, norm_quantiles, novelty
from semid.catalogue.bundle import CatalogueBundle
from semid.catalogue.drift import usage_shift
from semid.catalogue.prefixes import PrefixIndex
from semid.codes import SemanticIds
from semid.data.ids import ItemIds, cast_ids
from semid.data.items import ItemTexts, read_items
from semid.errors import ArtefactError, InputError, UsageError
from semid.health import Verdict, collisions, usage, verdict
from semid.quantization.blocks import BLOCK_ROWS
from semid.serve.batching import Refused
from semid.serve.bodies import Rows
from semid.tokenizers.base import Tokenizer
from semid.tokenizers.scan import CodeScan

ATTEMPTS = 3
"""Appends that are tried while other writers add versions to the bundle."""


@dataclass(frozen=True, eq=False)
class Version:
    """One version of the catalogue with all that answers need; nothing of it ever changes."""

    number: int
    ids: SemanticIds
    tokenizer: Tokenizer
    trie: PrefixIndex
    texts: ItemTexts | None
    # reference of novelty; None where the ids carry no residual norms
    quantiles: tuple[float, ...] | None
    before: int  # items of the version before; they are the first rows
    trees: dict[int, Any] = field(
        default_factory=dict
    )  # of `semid.serve.explore`, made when asked for

    @classmethod
    def of(
        cls,
        number: int,
        ids: SemanticIds,
        tokenizer: Tokenizer,
        texts: ItemTexts | None,
        before: int,
    ) -> Version:
        """Check ids against the model and index them.

        Raises:
            FingerprintError: the ids are of another model.
        """
        check_model(ids, tokenizer)
        try:
            quantiles = norm_quantiles(ids, tokenizer)
        except UsageError:
            quantiles = None
        aligned = None if texts is None else texts.aligned(ids.items)
        ids.items.index_of(["-"])  # sorts the hashes now, not at the first request
        return cls(number, ids, tokenizer, PrefixIndex.build(ids), aligned, quantiles, before)

    @cached_property
    def scan(self) -> CodeScan:
        """The catalogue's quantized vectors, ready to be searched."""
        return CodeScan(self.tokenizer, self.ids)

    @cached_property
    def verdict(self) -> Verdict:
        """Health of the published codes, without an appended token."""
        sizes = self.ids.info.model_sizes
        codes = self.ids.encoded
        return verdict(usage(codes, sizes), collisions(codes))

    @cached_property
    def novelty(self) -> npt.NDArray[np.float64] | None:
        """Share of the reference below the residual norm of each item ``(items,)``."""
        return self.novelty_of(self.ids.residual_norms)

    @cached_property
    def search_texts(self) -> Any:
        """Id and title of each item in lower case ``(items,)``, as a search reads them."""
        names = self.ids.items.strings()
        if self.texts is not None:
            names = pc.binary_join_element_wise(
                names, self.texts.titles, pa.scalar("\n", pa.large_string())
            )
        return pc.utf8_lower(names)

    @cached_property
    def spread(self) -> list[float]:
        """Mean squared distance of two items' quantized vectors, per codebook in its columns."""
        codes = self.ids.encoded[:: max(len(self.ids) // BLOCK_ROWS, 1)].astype(np.int64)
        variances = self.tokenizer.quantize(codes).astype(np.float64).var(axis=0)
        return [2.0 * float(variances[part].sum()) for part in self.tokenizer.latent_slices]

    @cached_property
    def used(self) -> list[npt.NDArray[np.bool_]]:
        """Which codes of each level some item has."""
        counts = usage(self.ids.codes, self.ids.info.codebook_sizes)
        return [level.counts > 0 for level in counts]

    def novelty_of(self, norms: npt.NDArray[np.float32]) -> npt.NDArray[np.float64] | None:
        """Return the share of the reference below each norm; None without a reference."""
        return None if self.quantiles is None else novelty(norms, self.quantiles)

    def title(self, row: int) -> str | None:
        """Return the title of an item, or None."""
        return None if self.texts is None else self.texts.titles[row].as_py() or None

    def item(self, row: int) -> dict[str, Any]:
        """Return an item as JSON-able values."""
        norm = float(self.ids.residual_norms[row])
        return {
            "item_id": self.ids.items[row],
            "codes": self.ids.codes[row].tolist(),
            "residual_norm": norm if np.isfinite(norm) else None,
            "title": self.title(row),
        }

    def prefix(self, codes: Sequence[int]) -> list[int]:
        """Check a prefix that a client gave.

        Raises:
            Refused: it is longer than an id or has a code beyond its codebook.
        """
        sizes = self.trie.sizes
        if len(codes) > len(sizes):
            raise Refused(422, f"{len(codes)} codes; ids have {len(sizes)}")
        for level, code in enumerate(codes):
            if not 0 <= code < sizes[level]:
                raise Refused(
                    422, f"code {code} of level {level + 1} is not in 0 to {sizes[level] - 1}"
                )
        return list(codes)

    def since(self) -> dict[str, Any]:
        """Return what is new since the version before: items, novel ones, shift per level."""
        new = len(self.ids) - self.before
        scores = self.novelty
        share = None
        if new and scores is not None:
            share = float((scores[self.before :] > NOVEL).mean())
        levels = []
        if new and self.before:
            sizes = self.ids.info.model_sizes
            codes = self.ids.encoded
            first, last = usage(codes[: self.before], sizes), usage(codes, sizes)
            for a, b in zip(first, last, strict=True):
                shift, chance = usage_shift(a, b, shared=self.before)
                levels.append({"level": a.level, "shift": shift, "chance": chance})
        return {"items": len(self.ids), "new": new, "novel_share": share, "levels": levels}


class AddedItem(NamedTuple):
    """An item of an addition: its row in the new version, and what was found out about it."""

    row: int
    added: bool
    novelty: float | None
    shared: bool


class Catalogue:
    """A bundle's current version, and the two ways to another one: `swap` and `add`.

    Args:
        path: folder of the bundle.
        tokenizer: the model that made its ids.
        items: table of titles, or None.
    """

    def __init__(
        self, path: str | os.PathLike[str], tokenizer: Tokenizer, *, items: Any = None
    ) -> None:
        self.bundle, self.tokenizer = CatalogueBundle(path), tokenizer
        self._items = items
        self._texts: tuple[Any, ItemTexts] | None = None  # with the time of the file it came from
        self._lock = threading.Lock()
        self.pinned = False
        self.last_error: str | None = None
        self.churn = 0.0  # share of the items before the last swap whose id changed or went
        self.current = self._load(self.bundle.versions()[-1])

    def swap(self, number: int | None = None) -> Version:
        """Load a version beside the current one, check it, and make it the current one.

        Args:
            number: the version; it is kept until the next swap if it is not the last. None takes
                the last one, unless another is kept.

        Raises:
            Refused: there is no such version (404).
            ArtefactError: it is damaged or of another model; the current one stays.
        """
        with self._lock:
            last = self.bundle.versions()[-1]
            if number is None:
                number = self.current.number if self.pinned else last
            elif number not in self.bundle.versions():
                raise Refused(404, f"the bundle has no version {number}; its last is {last}")
            if number != self.current.number:
                try:
                    self._become(self._load(number))
                except Exception as error:
                    self.last_error = f"version {number} cannot be served: {error}"
                    raise
            self.last_error = None
            self.pinned = number != last
            return self.current

    def add(self, requests: list[Rows]) -> list[tuple[Version, list[AddedItem]] | Exception]:
        """Publish the new items of several requests as one version of the bundle.

        Ids that are published keep their codes, so that any request may be repeated. Nothing is
        answered before the version is on disk.
        """
        with self._lock:
            if self.pinned:
                problem = (
                    f"version {self.current.number} is kept, which is not the last; items are "
                    "added to the last one: ask for it with POST /v1/versions first"
                )
                return [Refused(409, problem)] * len(requests)
            kind = self.current.ids.items.to_arrow().type
            good: list[Any] = []
            results: list[Refused | None] = []
            for request in requests:
                try:  # ids that the catalogue's type cannot hold spoil their own request alone
                    good.append(ItemIds(cast_ids(request.ids, kind, source="item_ids")).strings())
                    results.append(None)
                except InputError as error:
                    results.append(Refused(422, str(error)))
            rows = [
                request for request, result in zip(requests, results, strict=True) if not result
            ]
            before = len(self.current.ids)
            if rows:
                x, names = np.concatenate([each.x for each in rows]), pa.concat_arrays(good)
                before = self._publish(x, names)
            version, left = self.current, iter(good)
            return [result or (version, _added(version, next(left), before)) for result in results]

    def _publish(self, x: npt.NDArray[np.float32], names: Any) -> int:
        """Append the items that are not published yet, of equal ids the first, and serve them.

        Returns the number of items before them.
        """
        first = np.unique(names.to_numpy(zero_copy_only=False), return_index=True)[1]
        for attempt in range(ATTEMPTS):
            last = self.bundle.versions()[-1]
            if last != self.current.number:  # somebody else has added one
                self._become(self._load(last))
            ids = self.current.ids
            new = np.sort(first[ids.items.index_of(names.take(pa.array(first))) < 0])
            if not len(new):
                break
            added = add_items(ids, self.tokenizer, x[new], ids=ItemIds(names.take(pa.array(new))))
            try:
                number = self.bundle.append(added.ids)
            except (ArtefactError, InputError):
                if attempt == ATTEMPTS - 1 or self.bundle.versions()[-1] == last:
                    raise
                continue
            self._become(self._version(number, added.ids, before=len(ids)))
            return len(ids)
        return len(self.current.ids)

    def _become(self, version: Version) -> None:
        before = self.current
        old, new = before.ids, version.ids
        if len(old) <= len(new) and version.number > before.number:
            self.churn = 0.0  # a bundle only grows: `append` refuses anything else
        else:
            self.churn = 1.0 - len(new) / len(old)
        self.current = version

    def _load(self, number: int) -> Version:
        before = self.bundle.versions()
        earlier = [each for each in before if each < number]
        size = sum(part.rows for part in self.bundle.parts(earlier[-1])) if earlier else 0
        return self._version(number, self.bundle.read(number), before=size)

    def _version(self, number: int, ids: SemanticIds, *, before: int) -> Version:
        return Version.of(number, ids, self.tokenizer, self._read_texts(), before)

    def _read_texts(self) -> ItemTexts | None:
        """Read the table of titles, again when its file has changed."""
        if self._items is None:
            return None
        path = Path(self._items) if isinstance(self._items, str | os.PathLike) else None
        stamp = path.stat().st_mtime_ns if path is not None and path.is_file() else 0
        if self._texts is None or self._texts[0] != stamp:
            self._texts = stamp, read_items(self._items)
        return self._texts[1]


def _added(version: Version, names: Any, before: int) -> list[AddedItem]:
    rows = version.ids.items.index_of(names)
    scores = version.novelty_of(version.ids.residual_norms[rows])
    return [
        AddedItem(
            row,
            row >= before,
            None if scores is None else float(scores[place]),
            version.trie.count(version.ids.codes[row]) > 1,
        )
        for place, row in enumerate(rows.tolist())
    ]
