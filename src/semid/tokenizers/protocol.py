"""scikit-learn's protocol of a transformer, without importing scikit-learn."""

from __future__ import annotations

import sys
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from semid.codes import SemanticIds
from semid.errors import check_choice, import_extra
from semid.tokenizers.stored import StoredTokenizer

CONTAINERS = ("default", "pandas", "polars")
"""What `transform` may return: an array, or a frame of that library."""


@dataclass(kw_only=True, eq=False, repr=False)
class Transformer(StoredTokenizer):
    """The part of a tokenizer that scikit-learn's pipelines and searches call."""

    @abstractmethod
    def fit(self, *args: Any, **fit_params: Any) -> Self:
        """Learn the codebooks."""

    @abstractmethod
    def encode(self, *args: Any, **options: Any) -> SemanticIds:
        """Give every row its codes."""

    @property
    def n_features_in_(self) -> int:
        """Width of the embeddings it was fitted on."""
        return self.dim

    def fit_transform(self, source: Any, y: None = None, **fit_params: Any) -> Any:
        """Fit and return the codes as `transform` does; arguments as for `fit`."""
        return self.fit(source, **fit_params).transform(source)

    def transform(self, source: Any) -> Any:
        """Return the codes ``(items, levels)`` of `encode`, as an array or as `set_output` says."""
        codes, container = self.encode(source).codes, self._container
        if container == "default" and "sklearn" in sys.modules:
            container = sys.modules["sklearn"].get_config()["transform_output"]
        if container == "default":
            return codes
        library = import_extra(container, extra=container, purpose="set_output")
        columns = dict(zip(self.get_feature_names_out(), codes.T, strict=True))
        # As in scikit-learn, rows keep the labels that they had.
        index = {"index": source.index} if container == "pandas" and hasattr(source, "iloc") else {}
        return library.DataFrame(columns, **index)

    def set_output(self, *, transform: str | None = None) -> Self:
        """Let `transform` return an array (``default``), or a frame of ``pandas`` or ``polars``."""
        if transform is not None:
            self._container = check_choice("transform", transform, CONTAINERS)
        return self

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[Any]:
        """Return the names of the columns of codes: the class in lower case and the level."""
        _ = self.dim  # raises before `fit`
        name = type(self).__name__.lower()
        return np.array([f"{name}{level}" for level in range(self.levels)], dtype=object)

    def __sklearn_clone__(self) -> Self:
        """Return an unfitted tokenizer with the same arguments, for ``sklearn.base.clone``."""
        return type(self)(**self.get_params(deep=False)).set_output(transform=self._container)

    def __sklearn_is_fitted__(self) -> bool:
        """Whether `fit` has been called, for scikit-learn's pipelines."""
        return self._dim is not None

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags of a transformer that needs no target."""
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=[]),  # codes are integers
            requires_fit=True,
        )
