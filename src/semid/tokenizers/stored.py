"""The artefact of a tokenizer: saving, loading, and the checks of settings and tensors."""

from __future__ import annotations

import contextlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt

from semid.artefact import FORMAT_VERSION, fingerprint, read_artefact, write_artefact
from semid.data.columns import TextModel
from semid.documents import checked, html_table, record
from semid.errors import ArtefactError, NotFittedError, UsageError
from semid.hub import Publishable
from semid.options import Parameters, argument_types, option
from semid.tokenizers.fit_report import FitReport, card

logger = logging.getLogger(__name__)

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

HELD_OUT_SALT = "semid/items"

CONFIG: dict[str, Any] = {
    "settings": dict[str, Any],
    "dim": int,
    "codebook_sizes": list[int],
    "codebook_fingerprint": str,
    "fit_report": dict[str, Any] | None,
}
"""What every config of a tokenizer holds."""


RENAMED = {
    "behaviour_weight": "behavior_weight",
    "behaviour_levels": "behavior_levels",
    "size_limit": "balance_strength",
}
"""Settings under names they had when older artefacts were written."""
RENAMED_OPTIONS = {
    "kmeans": {
        "iterations": "max_iter",
        "tolerance": "tol",
        "restarts": "n_init",
        "trials": "n_local_trials",
    },
    "refine": {"tolerance": "tol"},
}
"""The same inside nested options."""


def check_shapes(
    tensors: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int | None, ...]]
) -> None:
    """Refuse tensors of other shapes than settings ask for, before anything is made of them."""
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"there is no tensor '{name}'")
        actual = tensors[name].shape
        if len(actual) != len(shape) or any(
            length is not None and length != n for n, length in zip(actual, shape, strict=True)
        ):
            raise ValueError(f"tensor '{name}' has shape {actual}, its settings ask for {shape}")
        if tensors[name].dtype.kind == "f" and not np.isfinite(tensors[name]).all():
            raise ValueError(f"tensor '{name}' holds NaN or infinite values")


UNUSABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What constructors raise for settings and tensors that contradict each other."""


@contextlib.contextmanager
def described(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Turn whatever settings and tensors of an artefact cannot be into one sentence."""
    try:
        yield
    except (*UNUSABLE, ArtefactError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ArtefactError(
            f"'{path}' does not describe a {what} ({reason}); save the model again"
        ) from None


def stored_settings(kind: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the constructor's arguments in a config, of the types that they have there."""
    known = {name: value for name, value in config.items() if name in CONFIG}
    checked(CONFIG, known, "config.json", required=CONFIG)
    settings: dict[str, Any] = {
        RENAMED.get(name, name): value for name, value in config["settings"].items()
    }
    for name, renamed in RENAMED_OPTIONS.items():
        if isinstance(nested := settings.get(name), Mapping):
            settings[name] = {renamed.get(key, key): value for key, value in nested.items()}
    checked(argument_types(kind), settings, "settings")
    return settings


def check_stored(path: str | os.PathLike[str], config: Mapping[str, Any], tokenizer: Any) -> None:
    """Refuse tensors that are not those of the config, and settings that were changed in it."""
    actual = {
        "codebook_sizes": [len(book) for book in tokenizer.codebooks],
        "codebook_fingerprint": tokenizer.codebook_fingerprint,
    }
    if config["format_version"] > 1:  # before, it was that of the tensors as they were stored
        actual["weights_fingerprint"] = tokenizer.weights_fingerprint
    different = [name for name, value in actual.items() if config.get(name) != value]
    if different:
        raise ArtefactError(
            f"the tensors of '{path}' do not fit its config.json ({', '.join(different)}): one of "
            "them was changed; copy the folder again, or fit a model with other settings"
        )


@dataclass(kw_only=True, eq=False, repr=False)
class StoredTokenizer(Parameters, Publishable, ABC):
    """The part of the contract that an artefact holds; `semid.tokenizers.base` has the rest."""

    kind: ClassVar[str]
    hierarchical: ClassVar[bool]
    combine: ClassVar[Literal["sum", "mean", "concat"]]
    encodes_nearest: ClassVar[bool] = True

    seed: int = option(0, help="Seed of everything that is drawn.")
    validation_fraction: float = option(
        0.05, ge=0, lt=1, help="Share of the items held out by a hash of their id."
    )
    threads: int | None = option(
        None, ge=1, setting=False, help="CPU threads; all by default. Results do not depend on it."
    )

    def __post_init__(self) -> None:
        """Check the arguments and start unfitted; a subclass adds its state after calling this."""
        super().__post_init__()
        _ = self.codebook_sizes  # raises for sizes that contradict the number of levels
        self._report: FitReport | None = None
        self._dim: int | None = None
        self._text_model: TextModel | None = None
        self._warned_of: set[TextModel] = set()
        self._container = "default"  # what `transform` returns
        self._fingerprint_version = FORMAT_VERSION

    def _resolved(self, name: str) -> Any:
        # Settings list the sizes of all codebooks where one number may stand for them.
        if name == "codebook_size" and argument_types(type(self))[name] is not int:
            return list(self.codebook_sizes)
        return super()._resolved(name)

    @property
    def report(self) -> FitReport | None:
        """The report of the last fit, or None before it."""
        return self._report

    @report.setter
    def report(self, report: FitReport | None) -> None:
        self._report = report

    @property
    def text_model(self) -> TextModel | None:
        """The encoder of the embeddings that it was fitted on, where they say so."""
        return self._text_model

    @text_model.setter
    def text_model(self, model: TextModel | None) -> None:
        self._text_model = model

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codewords of each level."""

    @abstractmethod
    def _codebooks(self) -> tuple[Array, ...]:
        """Return one ``(codes, latent)`` float32 array per level."""

    @abstractmethod
    def _tensors(self) -> dict[str, np.ndarray]:
        """Return every learned array by name, the codebooks as ``codebooks.LEVEL``."""

    @abstractmethod
    def _set_tensors(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Take the arrays that `_tensors` gave."""

    def _code_tensors(self, level: int) -> Sequence[str]:
        """Return names of the arrays that have one row per codeword of ``level``."""
        return (f"codebooks.{level}",)

    @property
    def levels(self) -> int:
        """Number of codes per item."""
        return len(self.codebook_sizes)

    @property
    def dim(self) -> int:
        """Width of the embeddings it was fitted on."""
        if self._dim is None:
            raise NotFittedError(
                f"this {type(self).__name__} is not fitted; call fit(x) or semid.load(path)"
            )
        return self._dim

    @property
    def codebooks(self) -> tuple[Array, ...]:
        """Codewords of each level: ``(codes, width)`` float32; see `latent_slices`."""
        _ = self.dim
        return self._codebooks()

    @property
    def latent_slices(self) -> tuple[slice, ...]:
        """Columns of the latent that each codebook quantizes.

        All of them, but for ``concat``: there each codebook has columns of its own, side by side.
        """
        widths = [book.shape[1] for book in self.codebooks]
        if self.combine != "concat":
            return tuple(slice(0, width) for width in widths)
        ends = accumulate(widths)
        return tuple(slice(end - width, end) for end, width in zip(ends, widths, strict=True))

    @property
    def latent_dim(self) -> int:
        """Width of latent vectors."""
        return int(self.latent_slices[-1].stop)

    def score_terms(self, level: int) -> tuple[Doubles, Doubles, Doubles]:
        """Return ``a``, ``b`` and ``c`` such that a row's code has the least ``b.x^2 - 2 a.x + c``.

        For nearest codewords these are the codewords, ones, and squared lengths.

        Shapes: ``a`` and ``b`` (codes, width), ``c`` (codes,), float64.
        """
        # |x - c|^2 = |x|^2 - 2 c.x + |c|^2.
        codebook = self.codebooks[level].astype(np.float64)
        return codebook, np.ones_like(codebook), np.square(codebook).sum(1)

    @property
    def codebook_fingerprint(self) -> str:
        """SHA-256 of the codebooks; ids carry it."""
        return fingerprint({f"{level:04d}": book for level, book in enumerate(self.codebooks)})

    @property
    def weights_fingerprint(self) -> str:
        """SHA-256 of all learned arrays and of the settings that change codes beside them."""
        _ = self.dim
        # The fingerprint of format version 1 covered the arrays alone; ids written then must match.
        if self._fingerprint_version == 1:
            return fingerprint(self._tensors())
        return fingerprint(self._tensors(), settings=self._encoding_settings())

    def _encoding_settings(self) -> dict[str, Any]:
        """Return the settings that change what equal arrays encode, JSON-able."""
        settings = self.settings
        return {
            "kind": self.kind,
            "hierarchical": self.hierarchical,
            **{name: settings[name] for name in ("normalize", "center") if name in settings},
        }

    def _warn_of_other(self, given: TextModel | None, label: str) -> None:
        """Warn once about embeddings of another encoder than those it was fitted on."""
        fitted = self.text_model
        if fitted and given and fitted.is_other(given) and given not in self._warned_of:
            self._warned_of.add(given)
            logger.warning(
                "%s: embeddings by %s, but the tokenizer was fitted on embeddings by %s; its codes "
                "mean little for these: embed the texts with that model",
                *(label, given, fitted),
            )

    def replace_tensors(self, tensors: Mapping[str, np.ndarray]) -> Self:
        """Return a fitted tokenizer of the same settings with other arrays in place of some."""
        # A new object: whoever holds this one still encodes with the arrays it was given.
        other = type(self)(**self.get_params(deep=False))
        other._dim, other.text_model = self.dim, self.text_model
        other._set_tensors({**self._tensors(), **tensors})
        other.report = self.report
        return other

    def renumbered(self, numbers: Sequence[npt.NDArray[np.int64]]) -> Self:
        """Return the same tokenizer with new numbers ``(codes,)`` of each level's codewords."""
        # Row c of every array of a level moves to its new number, decoding tables included.
        tensors = self._tensors()
        moved: dict[str, np.ndarray] = {}
        for level, (book, number) in enumerate(zip(self.codebooks, numbers, strict=True)):
            name = f"codebooks.{level}"
            if name not in tensors or not np.array_equal(tensors[name], book):
                raise UsageError(
                    f"{self.kind} keeps no codebook under '{name}', so its codes cannot be "
                    "renumbered"
                )
            for name in self._code_tensors(level):
                moved[name] = np.empty_like(tensors[name])
                moved[name][number] = tensors[name]
        return self.replace_tensors(moved)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the artefact folder (``config.json``, ``model.safetensors``, ``README.md``)."""
        config = {
            "kind": self.kind,
            "settings": self.settings,
            "dim": self.dim,
            "codebook_sizes": list(self.codebook_sizes),
            "codebook_fingerprint": self.codebook_fingerprint,
            "weights_fingerprint": self.weights_fingerprint,
            "fingerprint_version": self._fingerprint_version,
            "held_out": {"fraction": self.validation_fraction, "salt": HELD_OUT_SALT},
            "fit_report": None if self.report is None else self.report.to_dict(),
            **({} if self.text_model is None else {"text_model": asdict(self.text_model)}),
        }
        return write_artefact(
            path,
            config=config,
            tensors=self._tensors(),
            card=card(self.kind, config),
            overwrite=overwrite,
        )

    def _card_data(self) -> dict[str, Any]:
        """Return what the card's metadata on the Hugging Face Hub say."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.report is not None:
            data["metrics"] = self.report.figures
        if self.text_model is not None and self.text_model.is_on_hub:
            data["base_model"] = self.text_model.model
        return data

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; encodes exactly as the saved tokenizer did.

        Raises:
            ArtefactError: if the folder is incomplete, altered, or of another kind.
        """
        config, tensors = read_artefact(path, kind=cls.kind)
        # Settings come first: the shapes of the arrays are checked against them.
        with described(path, cls.__name__):
            tokenizer = cls(**stored_settings(cls, config))
            tokenizer._dim = config["dim"]
            tokenizer._fingerprint_version = config.get("fingerprint_version", 1)
            tokenizer._set_tensors(tensors)
            if "text_model" in config:
                tokenizer.text_model = record(TextModel, config["text_model"], "text_model")
            if config["fit_report"] is not None:
                tokenizer.report = record(FitReport, config["fit_report"], "fit_report")
        check_stored(path, config, tokenizer)
        return tokenizer

    def __repr__(self) -> str:
        """Show the arguments that differ from their defaults, and whether it is fitted."""
        state = "not fitted" if self._dim is None else f"dim={self._dim}"
        return f"{super().__repr__()} [{state}]"

    def _repr_html_(self) -> str:
        """Show the settings and the verdict in a notebook."""
        verdict = [] if self.report is None else [["verdict", self.report.summary]]
        return html_table(repr(self), [*self.settings.items(), *verdict])

    def __getstate__(self) -> dict[str, Any]:
        """Return arguments and learned arrays, as `save` does, for copies and pickles."""
        fitted = self._dim is not None
        return {
            "arguments": self.get_params(deep=False),
            "tensors": self._tensors() if fitted else {},
            "attributes": {
                name: getattr(self, name)
                for name in ("_report", "_dim", "_fingerprint_version", "_container", "_text_model")
            },
        }

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take what `__getstate__` gave."""
        vars(self).update(state["arguments"])
        # This sets every attribute that is not stored; the learned arrays follow.
        self.__post_init__()
        vars(self).update(state["attributes"])
        if self._dim is not None:
            self._set_tensors(state["tensors"])
