"""Options: one declaration gives constructors, checks, settings and scikit-learn's protocol."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from semid.errors import UsageError
from semid.options import Options, Parameters, declared_options, option


@dataclass(frozen=True, kw_only=True)
class Inner(Options):
    rounds: int = option(25, ge=1, help="Maximum number of rounds.")
    widths: tuple[int, ...] = option((4, 2), ge=1)
    rule: str = option("ema", choices=("ema", "gradient"))


@dataclass(kw_only=True, eq=False, repr=False)
class Base(Parameters):
    kind: ClassVar[str] = "base"

    size: int | Sequence[int] = option(256, ge=2, le=2**32, help="Codewords per level.")
    seed: int = option(0)
    inner: Inner | Mapping[str, Any] | None = option(None, nested={"rounds": 7})
    threads: int | None = option(None, ge=1, setting=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fitted = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.size,) if isinstance(self.size, int) else tuple(self.size)


@dataclass(kw_only=True, eq=False, repr=False)
class Derived(Base):
    size: int | Sequence[int] = option(16, ge=2)
    weight: float = option(0.5, ge=0, lt=1)

    def _problems(self) -> list[str]:
        return ["weight and seed do not go together"] if self.weight == self.seed != 0 else []


def test_arguments_are_stored_as_given():
    size, inner = np.array([8, 4]), {"rounds": 3}
    model = Derived(size=size, inner=inner)
    assert model.size is size
    assert model.inner is inner
    assert model.sizes == (8, 4)
    assert model.fitted is False


def test_settings_are_complete_and_json_able():
    import json

    model = Derived(size=np.array([8, 4]), weight=np.float64(0.25), threads=3)
    inner = {"rounds": 7, "widths": [4, 2], "rule": "ema"}
    assert model.settings == {"size": [8, 4], "seed": 0, "inner": inner, "weight": 0.25}
    assert Derived(**json.loads(json.dumps(model.settings))).settings == model.settings
    given = Derived(inner=Inner())  # an object is complete: no defaults of the field
    assert given.settings["inner"]["rounds"] == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"siez": 3}, "Derived has no argument 'siez'; did you mean 'size'"),
        ({"rounds": 3}, r"did you mean inner=\{'rounds': ...\}"),
        ({"size": "3"}, r"size='3' \(str\): give a whole number or a list of whole numbers"),
        ({"size": [8, 1]}, "size=.*give at least 2"),
        ({"size": np.array([8, 1])}, "size=.*give at least 2"),
        ({"weight": 1.0}, r"weight=1.0: give a share in \[0, 1\)"),
        ({"weight": float("nan")}, "weight=nan"),
        ({"threads": 0}, "threads=0: give at least 1, or None"),
        ({"inner": {"rounds": 0}}, "rounds=0"),
        ({"inner": {"rule": "emma"}}, "did you mean 'ema'"),
        ({"size": 1, "weight": 2}, "size=1.*weight=2"),
        ({"weight": 0.5, "seed": 2**70}, "64 bits"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        Derived(**arguments)


def test_values_are_checked_together():
    with pytest.raises(UsageError, match="do not go together"):
        Derived(weight=0.5).set_params(seed=1, weight=1.0)
    assert Derived(seed=2**63).seed == 2**63


def test_the_protocol_of_scikit_learn():
    base = pytest.importorskip("sklearn.base")
    inner = Inner(rounds=3)
    model = Derived(size=[8, 4], inner=inner, threads=2)
    clone = base.clone(model)
    assert clone.size == [8, 4]
    assert clone.get_params()["inner__rounds"] == 3
    assert model.get_params(deep=False)["inner"] is inner
    model.set_params(inner__rounds=9, inner__rule="gradient", weight=0.1)
    assert model.settings["inner"] == {"rounds": 9, "widths": [4, 2], "rule": "gradient"}
    assert inner.rounds == 3
    for wrong in ({"nonsense": 1}, {"inner__nonsense": 1}, {"inner__rounds": 0}, {"size": 1}):
        with pytest.raises(UsageError):
            model.set_params(weight=0.2, **wrong)
        assert model.weight == 0.1


def test_copies_and_pickles_are_equal():
    model = Derived(size=[8, 4], weight=0.1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.settings == model.settings
    assert repr(model) == "Derived(size=[8, 4], weight=0.1)"


def test_fields_carry_what_the_command_line_shows():
    declared = declared_options(Derived)
    assert list(declared) == ["size", "seed", "inner", "threads", "weight"]
    assert declared_options(Inner)["rounds"].help == "Maximum number of rounds."
    assert declared["size"].ge == 2
    assert Inner.of({"rounds": 2}, defaults={"rule": "gradient"}).rule == "gradient"
    assert Inner(widths=[8]).to_dict() == {"rounds": 25, "widths": [8], "rule": "ema"}
