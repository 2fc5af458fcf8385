"""The peers' side of ``benchmarks/ranking.py``; runs in their environment, without semid.

Reads lines on standard input; each trains an epoch and is answered by the CPU seconds it took.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

BATCH, WIDTH = 8192, 16


def without_ray() -> None:
    """Let FuxiCTR import: it asks for Ray, which only its Parquet loader uses, and we read npz."""

    class Absent(types.ModuleType):
        __path__: list[str] = []  # noqa: RUF012

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):  # `inspect` asks every module for its file
                raise AttributeError(name)
            return type(name, (), {})

    for name in ("ray", "ray.data", "ray.data.datasource", "ray.data.datasource.filename_provider"):
        sys.modules.setdefault(name, Absent(name))


def fuxictr_models() -> dict[str, Any]:
    """Put DeepFM and DCNv2 together from FuxiCTR's own layers (its wheel holds no model zoo)."""
    from fuxictr.pytorch.layers import CrossNetV2, FactorizationMachine, FeatureEmbedding, MLP_Block
    from fuxictr.pytorch.models import BaseModel
    from torch import nn

    class Base(BaseModel):  # type: ignore[misc]
        def __init__(self, feature_map: Any, *, hidden: list[int], rate: float, **rest: Any):
            super().__init__(feature_map, **rest)
            self.embedding_layer = FeatureEmbedding(feature_map, WIDTH)
            self.build(feature_map, feature_map.sum_emb_out_dim(), hidden)
            self.compile("adam", "binary_crossentropy", rate)
            self.reset_parameters()
            self.model_to_device()

    class DeepFM(Base):
        def build(self, feature_map: Any, size: int, hidden: list[int]) -> None:
            self.fm = FactorizationMachine(feature_map)
            self.mlp = MLP_Block(size, output_dim=1, hidden_units=hidden, dropout_rates=0)

        def forward(self, inputs: Any) -> dict[str, torch.Tensor]:
            x = self.get_inputs(inputs)
            e = self.embedding_layer(x)
            logit = self.fm(x, e) + self.mlp(e.flatten(start_dim=1))
            return {"y_pred": self.output_activation(logit)}

    class DCNv2(Base):
        def build(self, feature_map: Any, size: int, hidden: list[int]) -> None:
            self.cross = CrossNetV2(size, 3)
            self.mlp = MLP_Block(size, output_dim=None, hidden_units=hidden, dropout_rates=0)
            self.last = nn.Linear(size + hidden[-1], 1)

        def forward(self, inputs: Any) -> dict[str, torch.Tensor]:
            e = self.embedding_layer(self.get_inputs(inputs)).flatten(start_dim=1)
            logit = self.last(torch.cat([self.cross(e), self.mlp(e)], dim=1))
            return {"y_pred": self.output_activation(logit)}

    return {"deepfm": DeepFM, "dcnv2": DCNv2}


def fuxictr(
    kind: str, model: str, hidden: list[int], x: np.ndarray, y: np.ndarray, seed: int
) -> tuple[Any, Callable[[], None], Any]:
    """Return FuxiCTR's model, a function that trains an epoch, and what makes its loaders."""
    without_ray()
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.dataloaders.npz_dataloader import NpzDataLoader

    folder = Path(tempfile.mkdtemp())
    (folder / "rows").mkdir()  # its checkpoints go there, and it does not make it
    names = [f"f{n}" for n in range(x.shape[1])]
    sizes = [int(top) + 1 for top in x.max(0)]
    spec = {
        "dataset_id": "rows",
        "num_fields": len(names),
        "total_features": sum(sizes),
        "input_length": len(names),
        "labels": ["y"],
        "features": [
            {name: {"source": "", "type": "categorical", "padding_idx": 0, "vocab_size": size}}
            for name, size in zip(names, sizes, strict=True)
        ],
    }
    (folder / "feature_map.json").write_text(json.dumps(spec))
    feature_map = FeatureMap("rows", str(folder))
    feature_map.load(str(folder / "feature_map.json"), {"embedding_dim": WIDTH})

    def loader(part: slice, shuffle: bool) -> Any:
        file = str(folder / f"{part.start}.npz")
        columns = {name: x[part, n] for n, name in enumerate(names)}
        np.savez(file, **columns, y=y[part])
        return NpzDataLoader(feature_map, file, batch_size=BATCH, shuffle=shuffle, num_workers=0)

    torch.manual_seed(seed)
    made = fuxictr_models()[model](
        feature_map,
        hidden=hidden,
        rate=1e-3,
        model_root=str(folder),
        model_id="m",
        metrics=["AUC"],
        verbose=0,
        reduce_lr_on_plateau=False,
    )
    made._max_gradient_norm = 10.0  # its own default, set by its fit()
    if kind == "parity":
        return made, lambda: None, loader
    batches: Any = loader(slice(0, len(y)), True)
    if kind == "memory":
        batches = list(batches)

    def epoch() -> None:
        made.train()
        for batch in batches:
            made.train_step(batch)

    return made, epoch, loader


def deepctr(model: str, hidden: list[int], x: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    """Return a function that trains an epoch by DeepCTR-Torch's own fit."""
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import DCN, DeepFM

    names = [f"f{n}" for n in range(x.shape[1])]
    columns = [
        SparseFeat(name, int(x[:, n].max()) + 1, embedding_dim=WIDTH)
        for n, name in enumerate(names)
    ]
    shape = {"dnn_hidden_units": tuple(hidden), "l2_reg_embedding": 0, "l2_reg_linear": 0}
    made = (
        DeepFM(columns, columns, **shape)
        if model == "deepfm"
        else DCN(columns, columns, cross_num=3, cross_parameterization="matrix", **shape)
    )
    made.compile("adam", "binary_crossentropy", metrics=[])
    given = {name: x[:, n] for n, name in enumerate(names)}
    return lambda: made.fit(given, y, batch_size=BATCH, epochs=1, verbose=0)


def main() -> None:
    """Serve one side."""
    side, model, hidden, file = sys.argv[1:5]
    torch.set_num_threads(1)
    rows = np.load(file)
    x, y, widths = rows["x"], rows["y"], json.loads(hidden)
    if side == "fuxictr-parity":
        made, _, loader = fuxictr("parity", model, widths, x, y, int(sys.argv[5]))
        a, b = int(0.8 * len(y)), int(0.9 * len(y))
        made.fit(loader(slice(0, a), True), validation_data=loader(slice(a, b), False), epochs=20)
        print(made.evaluate(loader(slice(b, len(y)), False))["AUC"])
        return
    if side == "deepctr":
        epoch = deepctr(model, widths, x, y)
    else:
        epoch = fuxictr(side.removeprefix("fuxictr-"), model, widths, x, y, 0)[1]
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        epoch()
        print(f"took {time.process_time() - began}", flush=True)


if __name__ == "__main__":
    main()
