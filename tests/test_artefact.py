"""Artefacts and checkpoints: whole or absent, and never another run's."""

from __future__ import annotations

import json

import numpy as np
import pytest

import semid
from semid.artefact import fingerprint, read_artefact, read_config, write_artefact
from semid.errors import ArtefactError, OutputExistsError
from semid.output import atomic_file, atomic_folder
from semid.training.checkpoint import Checkpoint, run_key


def test_fingerprint_sees_names_shapes_and_values():
    base = {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert fingerprint(base) == fingerprint({"a": base["a"].astype(np.float64)})
    assert fingerprint(base) == fingerprint({"a": np.asfortranarray(base["a"])})
    assert fingerprint(base) != fingerprint({"b": base["a"]})
    assert fingerprint(base) != fingerprint({"a": base["a"].reshape(3, 2)})
    assert fingerprint(base) != fingerprint({"a": base["a"] + 1})


def test_fingerprint_is_the_same_on_every_platform():
    value = fingerprint({"a": np.array([1.5, -2.0], dtype=">f4"), "n": np.array([3])})
    assert value == fingerprint({"a": np.array([1.5, -2.0], dtype="<f4"), "n": np.array([3])})
    assert value == "25baef0a62712b5d07ed67e259322f7c5e8758b6a3fb755ad6522b0848a1f7f3"


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("x", encoding="utf8")
        raise RuntimeError
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as file:
        file.write_text("x", encoding="utf8")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_version(tmp_path):
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "old").write_text("x", encoding="utf8")
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "model", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "model" / "old").exists()
    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "new").write_text("y", encoding="utf8")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [".semid", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_existing_outputs_are_kept(tmp_path):
    with atomic_file(tmp_path / "a") as file:
        file.write_text("x", encoding="utf8")
    with pytest.raises(OutputExistsError, match="--overwrite"), atomic_file(tmp_path / "a"):
        pass
    with (
        pytest.raises(OutputExistsError, match="is a folder"),
        atomic_file(tmp_path, overwrite=True),
    ):
        pass


def test_configs_that_are_not_ours(tmp_path):
    with pytest.raises(ArtefactError, match="does not exist"):
        read_config(tmp_path / "nothing")
    with pytest.raises(ArtefactError, match=r"holds no config\.json"):
        semid.load(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf8")
    with pytest.raises(ArtefactError, match="not a semid config"):
        semid.load(tmp_path)
    document = {"format_version": 99, "kind": "rqkmeans"}
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf8")
    with pytest.raises(ArtefactError, match="format version 99"):
        semid.load(tmp_path)
    document = {"format_version": 1, "kind": "rqkmean"}
    (tmp_path / "config.json").write_text(json.dumps(document), encoding="utf8")
    with pytest.raises(ArtefactError, match="did you mean 'rqkmeans'"):
        semid.load(tmp_path)


def test_round_trip(tmp_path):
    tensors = {"a": np.arange(4.0, dtype=np.float32), "b": np.ones((2, 2), dtype=np.float32)}
    write_artefact(tmp_path / "m", config={"kind": "k"}, tensors=tensors, card="# hi")
    config, back = read_artefact(tmp_path / "m")
    assert config["kind"] == "k"
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)
    assert (tmp_path / "m" / "README.md").read_text(encoding="utf8") == "# hi"


def test_checkpoints(tmp_path):
    key = run_key({"levels": 3}, "data")
    assert key != run_key({"levels": 2}, "data")
    assert key != run_key({"levels": 3}, "other")
    run = Checkpoint(tmp_path / "x.partial", key=key)
    assert run.state is None
    assert not (tmp_path / "x.partial").exists()
    run.save({"a": np.arange(3)}, {"step": 1})
    run.save({"a": np.arange(4)}, {"step": 2})
    with pytest.raises(OutputExistsError, match="--resume"):
        Checkpoint(tmp_path / "x.partial", key=key)
    again = Checkpoint(tmp_path / "x.partial", key=key, resume=True)
    assert again.state is not None
    assert again.state[0]["a"].tolist() == [0, 1, 2, 3]
    assert again.state[1] == {"step": 2}
    with pytest.raises(ArtefactError, match="other settings or data"):
        Checkpoint(tmp_path / "x.partial", key="other", resume=True)
    file = tmp_path / "x.partial" / "state.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ArtefactError, match="checksum"):
        Checkpoint(tmp_path / "x.partial", key=key, resume=True)
    file.write_bytes(whole[:20])
    with pytest.raises(ArtefactError, match="cannot be read"):
        Checkpoint(tmp_path / "x.partial", key=key, resume=True)
    run.clear()
    assert not (tmp_path / "x.partial").exists()
