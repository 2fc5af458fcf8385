"""Models that use Semantic IDs: ranking and retrieval, each in a package of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from semid.errors import UsageError

if TYPE_CHECKING:
    from semid.codes import CodesInfo, SemanticIds


class UsesCodes:
    """Base of models that may read the codes of items."""

    codes_info: CodesInfo | None

    @property
    def codebook_fingerprint(self) -> str | None:
        """SHA-256 of the codebooks of the model's codes; None without codes."""
        return None if self.codes_info is None else self.codes_info.codebook_fingerprint

    def check_codes(self, ids: SemanticIds) -> None:
        """Refuse codes of another codebook than the model was trained with.

        Raises:
            FingerprintError: the fingerprints differ.
            UsageError: the model reads no codes.
        """
        if self.codebook_fingerprint is None:
            raise UsageError("this model was trained without codes, so it cannot use any")
        ids.check_codebook(self.codebook_fingerprint)
