"""Semantic IDs for recommendation: learn them, know whether they are good, use them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semid.catalogue.prefixes import PrefixIndex
    from semid.catalogue.uniqueness import make_unique
    from semid.codes import SemanticIds
    from semid.data.embeddings import open_embeddings
    from semid.data.interactions import read_interactions
    from semid.data.synthetic import SyntheticCatalogue
    from semid.errors import SemidError
    from semid.loading import load
    from semid.quantization.kmeans import KMeansOptions
    from semid.quantization.refine import RefineOptions
    from semid.recommenders.ranking.data import RankingDataConfig, prepare_ranking_data
    from semid.recommenders.ranking.features import CodeFeatures
    from semid.recommenders.ranking.network import RankerConfig
    from semid.recommenders.ranking.ranker import Ranker
    from semid.recommenders.ranking.stream import RankingStream
    from semid.recommenders.ranking.training import train_ranker
    from semid.report import diagnose
    from semid.tokenizers.barq import BARQ
    from semid.tokenizers.behavior import Neighbors
    from semid.tokenizers.drqvae import DRQVAE
    from semid.tokenizers.features import fuse
    from semid.tokenizers.heads import DecodeHead
    from semid.tokenizers.mocvae import VQVAE, MoCVAE
    from semid.tokenizers.neural.tokenizer import Network
    from semid.tokenizers.refining import refine
    from semid.tokenizers.rqkmeans import RQKMeans
    from semid.tokenizers.rqvae import RQPVAE, RQVAE
    from semid.training.options import TrainOptions


__all__ = [
    "BARQ",
    "DRQVAE",
    "RQPVAE",
    "RQVAE",
    "VQVAE",
    "CodeFeatures",
    "DecodeHead",
    "KMeansOptions",
    "MoCVAE",
    "Neighbors",
    "Network",
    "PrefixIndex",
    "RQKMeans",
    "Ranker",
    "RankerConfig",
    "RankingDataConfig",
    "RankingStream",
    "RefineOptions",
    "SemanticIds",
    "SemidError",
    "SyntheticCatalogue",
    "TrainOptions",
    "diagnose",
    "fuse",
    "load",
    "make_unique",
    "open_embeddings",
    "prepare_ranking_data",
    "read_interactions",
    "refine",
    "train_ranker",
]

# Names are imported when first used, so that `import semid` and `semid --help` stay quick.
_HOME = {
    "RankerConfig": "semid.recommenders.ranking.network",
    "BARQ": "semid.tokenizers.barq",
    "CodeFeatures": "semid.recommenders.ranking.features",
    "DRQVAE": "semid.tokenizers.drqvae",
    "RankingDataConfig": "semid.recommenders.ranking.data",
    "DecodeHead": "semid.tokenizers.heads",
    "KMeansOptions": "semid.quantization.kmeans",
    "MoCVAE": "semid.tokenizers.mocvae",
    "Neighbors": "semid.tokenizers.behavior",
    "Network": "semid.tokenizers.neural.tokenizer",
    "PrefixIndex": "semid.catalogue.prefixes",
    "RQKMeans": "semid.tokenizers.rqkmeans",
    "RQPVAE": "semid.tokenizers.rqvae",
    "RQVAE": "semid.tokenizers.rqvae",
    "Ranker": "semid.recommenders.ranking.ranker",
    "RankingStream": "semid.recommenders.ranking.stream",
    "RefineOptions": "semid.quantization.refine",
    "SemanticIds": "semid.codes",
    "SemidError": "semid.errors",
    "SyntheticCatalogue": "semid.data.synthetic",
    "TrainOptions": "semid.training.options",
    "VQVAE": "semid.tokenizers.mocvae",
    "diagnose": "semid.report",
    "fuse": "semid.tokenizers.features",
    "load": "semid.loading",
    "make_unique": "semid.catalogue.uniqueness",
    "open_embeddings": "semid.data.embeddings",
    "prepare_ranking_data": "semid.recommenders.ranking.data",
    "read_interactions": "semid.data.interactions",
    "refine": "semid.tokenizers.refining",
    "train_ranker": "semid.recommenders.ranking.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'semid' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
