"""Everyday mistakes in arguments and flags: each is refused in one sentence that helps."""

# ruff: noqa: E501 - a command line a row
from __future__ import annotations

import ast
import copy
import functools
import pickle
import re
import typing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

import semid
from semid.cli.app import app, main
from semid.cli.flags import known_flags
from semid.data.ids import ItemIds
from semid.documents import code_span, escaped
from semid.errors import EmbeddingError, IdsError, UsageError, brief, printable
from semid.options import CheckedArguments, Options, argument_types
from semid.quantization.kmeans import KMeansOptions
from semid.recommenders.ranking.builder import RankingDataConfig
from semid.recommenders.ranking.features import CodeFeatures
from semid.recommenders.ranking.network import RankerConfig
from semid.recommenders.ranking.splits import Label
from semid.report import compare
from semid.reproduce.ranking_grid import Grid
from semid.training.options import TrainOptions

SOURCE = Path(semid.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")


@functools.cache
def tree() -> typing.Any:
    return typer.main.get_command(app)


def flags_of(command: str) -> set[str]:
    options = (
        parameter.opts + parameter.secondary_opts for parameter in tree().commands[command].params
    )
    return {flag for names in options for flag in names} | {"--help", "--debug", "--version"}


@pytest.fixture
def run(run, monkeypatch, tmp_path):
    """Run the program in an empty folder: exit code, and what it wrote to stderr."""
    monkeypatch.setattr("semid.cli.app.app", tree())  # built once, not for every call
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(*arguments)[::2]


def refusal(run, *arguments: object, code: int = 2) -> str:
    """Return the one sentence with which a command refuses."""
    got, text = run(*arguments)
    assert got == code, text
    lines = [line for line in text.splitlines() if line.lower().startswith("error: ")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


# Constructors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("RQKMeans", {"levels": "3"}, r"RQKMeans: levels='3' \(str\): give a whole number"),
        ("RQKMeans", {"levels": None}, r"levels=None"),
        ("RQKMeans", {"levels": True}, r"levels=True \(bool\)"),
        ("RQKMeans", {"levels": 3.0}, r"levels=3.0: give a whole number"),
        ("RQKMeans", {"levels": 100_000_000}, "give 1 to 256"),
        ("RQKMeans", {"levels": 2, "codebook_size": [8, 8.5]}, "codebook_size"),
        ("RQKMeans", {"codebook_size": "256"}, "a whole number or a list of whole numbers"),
        ("RQKMeans", {"validation_fraction": float("nan")}, "validation_fraction=nan"),
        ("RQKMeans", {"beam_width": 10**12}, "beam_width=.*give 1 to"),
        ("RQKMeans", {"normalize": 1}, r"normalize=1 \(int\): give True or False"),
        ("RQKMeans", {"threads": "2"}, "threads='2'"),
        ("RQKMeans", {"kmeans": {"max_iters": 3}}, "KMeansOptions.*'max_iters'; did you mean 'max_iter'"),
        ("RQKMeans", {"kmeans": {"max_iter": 0}}, "max_iter=0: give at least 1"),
        ("RQKMeans", {"kmeans": {"tol": 10**400}}, r"tol=.*share in \[0, 1\)"),
        ("RQKMeans", {"kmeans": 5}, r"kmeans=5 \(int\): give KMeansOptions or a mapping or None"),
        ("RQKMeans", {"center_": True}, "RQKMeans has no argument 'center_'; did you mean 'center'"),
        ("MoCVAE", {"levels": 3}, "MoCVAE has no argument 'levels'; did you mean 'n_codebooks'"),
        ("RQVAE", {"n_codebooks": 3}, "did you mean 'levels'"),
        ("RQVAE", {"epochs": 3}, r"did you mean training=\{'epochs': ...\}"),
        ("RQVAE", {"training": {"epoch": 3}}, "TrainOptions.*did you mean 'epochs'"),
        ("RQVAE", {"training": {"schedule": "cosin"}}, "did you mean 'cosine'"),
        ("RQVAE", {"training": {"epochs": 10**30}}, "epochs=.*at most 64 bits"),
        ("RQVAE", {"network": {"hidden": (-1,)}}, "hidden"),
        ("RQVAE", {"network": {"hidden": "64"}}, "hidden='64'"),
        ("RQVAE", {"logger": 3, "seed": "x"}, "seed='x'"),
        ("RQVAE", {"device": "gpu"}, "device='gpu'"),
        ("DRQVAE", {"temperature": 0}, "temperature=0"),
        ("BARQ", {"behavior_weight": 1e30}, "behavior_weight"),
        ("VQVAE", {"rule": "emma"}, "rule='emma'.*did you mean 'ema'"),
    ],
)  # fmt: skip
def test_constructors_name_class_argument_and_what_is_allowed(kind, arguments, message):
    with pytest.raises(UsageError, match=message):
        getattr(semid, kind)(**arguments)


def test_positional_arguments_are_refused_by_name():
    with pytest.raises(UsageError, match=r"RQKMeans takes 0 arguments by position.*seed=\.\.\."):
        semid.RQKMeans(3)


def test_numbers_of_numpy_and_integers_for_floats_are_accepted():
    model = semid.RQKMeans(
        levels=np.int64(2), codebook_size=np.array([8, 4]), validation_fraction=0
    )
    assert model.codebook_sizes == (8, 4)
    assert {type(size) for size in model.codebook_sizes} == {int}
    assert type(KMeansOptions(max_iter=np.int32(3)).max_iter) is int


def test_checked_objects_copy_and_pickle():
    options = KMeansOptions(max_iter=3)
    assert pickle.loads(pickle.dumps(options)) == copy.deepcopy(options) == options
    assert copy.deepcopy(semid.RQKMeans(levels=2)).levels == 2


@pytest.mark.parametrize(
    "kind", [KMeansOptions, TrainOptions, RankingDataConfig, CodeFeatures, Grid, RankerConfig]
)
def test_options_refuse_unknown_names_and_wrong_types(kind):
    assert Options in kind.__mro__
    with pytest.raises(UsageError, match=f"{kind.__name__} has no argument 'nonsense'"):
        kind.of({"nonsense": 1})
    with pytest.raises(UsageError, match=f"give {kind.__name__}"):
        kind.of(3)
    name = next(iter(argument_types(kind)))
    with pytest.raises(UsageError, match=f"{kind.__name__}: {name}="):
        kind(**{name: object()})


def test_every_tokenizer_checks_its_arguments():
    for name in ("BARQ", "DRQVAE", "FSQ", "MoCVAE", "RQKMeans", "RQPVAE", "RQVAE", "VQVAE"):
        assert CheckedArguments in getattr(semid, name).__mro__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": (-1,)}, "--hidden"),
        ({"hidden": (10**9,)}, "--hidden"),
        ({"dropout": 1.5}, "--dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"drop": 0.1}, "did you mean 'dropout'"),
    ],
)
def test_ranking_models_check_their_options_before_any_data(options, message):
    with pytest.raises(UsageError, match=message):
        RankerConfig(options=options)


def test_labels_and_shares_out_of_range():
    for text in ("sampled(uniform,1000000000)", "sampled(uniform,0)", "sampled(uniform,10**9)"):
        with pytest.raises(UsageError, match="--label"):
            Label.parse(text)
    assert Label.parse("sampled(uniform,007)").negatives == 7
    with pytest.raises(UsageError, match="--fractions"):
        RankingDataConfig(fractions=(0.5, 0.5, 0.5))
    with pytest.raises(UsageError, match="fractions"):
        RankingDataConfig(fractions=(float("nan"), 0.5, 0.5))
    with pytest.raises(UsageError, match=r"history=.*0 to 10,000"):
        RankingDataConfig(history=10**9)


@pytest.mark.parametrize(
    "ids", [["a", "\ud800"], [1, 2**70], ["a", 1], [1.5, 2.5], [b"\xff", b"a"]]
)
def test_ids_that_are_no_ids(ids):
    with pytest.raises(IdsError):
        ItemIds(ids)
    with pytest.raises(IdsError):
        semid.open_embeddings(np.ones((2, 3), np.float32), ids=ids)


def test_embeddings_of_another_width_are_refused_everywhere(clustered):
    model = semid.RQKMeans(levels=2, codebook_size=8).fit(clustered)
    ids, narrow = model.encode(clustered), clustered[:, :-1]
    for call in (
        lambda: model.latent(narrow),
        lambda: semid.make_unique(ids, method="reassign", tokenizer=model, embeddings=narrow),
    ):
        with pytest.raises(EmbeddingError, match="fitted on width"):
            call()


def test_any_integer_of_64_bits_is_a_seed(clustered):
    for seed in (2**63, -(2**63)):
        model = semid.MoCVAE(
            n_codebooks=2, codebook_size=4, projection=True, seed=seed,
            network={"latent": 2, "hidden": (4,)}, training={"epochs": 1},
        )  # fmt: skip
        assert len(model.fit(clustered[:200]).codebooks) == 2


# Numeric options of the command line -----------------------------------------------------------

# With inputs that do not exist, an accepted value is refused for the input.
CALLS = {
    "embed": "nowhere.parquet --model nowhere -o out.parquet",
    "fit": "nowhere.parquet -o out",
    "encode": "nowhere nowhere.parquet -o out.parquet",
    "report": "nowhere nowhere.parquet -o r.html",
    "compare": "nowhere nowhere2 nowhere.parquet -o c.html",
    "refine": "nowhere nowhere.parquet -o out",
    "unique": "nowhere.parquet --method reassign --model nowhere --embeddings nowhere.parquet -o u.parquet",
    "drift": "nowhere nowhere.parquet nowhere.parquet",
    "refresh": "nowhere nowhere.parquet --catalogue nowhere.parquet -o out",
    "rank": "nowhere.parquet --label click>=1 -o out",
    "rank-grid": "nowhere.parquet --embeddings nowhere.parquet --label click>=1 -o out",
    "retrieve": "nowhere.parquet --ids nowhere.parquet -o out",
    "recommend": "nowhere --histories nowhere.parquet -o out.parquet",
    "serve": "nowhere --model nowhere",
    "export": "nowhere.parquet --to torcheasyrec --model nowhere --embeddings nowhere.parquet -o e.parquet",
    "check": "nowhere.parquet nowhere.parquet --interactions nowhere.parquet",
    "audit": "nowhere.json --interactions nowhere.parquet -o out.html",
    "advise": "nowhere.parquet --interactions nowhere.parquet",
    "prepare": "amazon nowhere.json.gz -o out",
    "reproduce": "drq --recipe nowhere.toml",
    "demo": "-o nowhere",
}  # fmt: skip
BESIDE = {  # what an option needs beside it
    ("encode", "novel_beyond"): "--catalogue nowhere.parquet",
    ("fit", "temperature"): "--tokenizer drqvae --contrastive-weight 0.1",
    ("rank", "scale"): "--ids nowhere.parquet",
    ("rank", "fusion_rank"): "--fusion on",
    ("rank-grid", "fusion_rank"): "--fusion on",
}
for _flag in known_flags("retrieve"):
    if "composed" not in _flag.tokenizers:
        BESIDE["retrieve", _flag.name] = f"--model {_flag.tokenizers[-1]}"
BESIDE["retrieve", "decay"] += " --embeddings nowhere.parquet"
BESIDE["rank", "ties_seed"] = BESIDE["rank-grid", "ties_seed"] = "--history 3"
_pairs = "--tokenizer drqvae --contrastive-weight 0.1 --interactions nowhere.parquet"
BESIDE["fit", "ties_seed"] = _pairs
BESIDE["export", "ties_seed"] = "--candidates 1 --interactions nowhere.parquet"
for _name in ("workers", "cpus_per_worker", "store_bytes", "wait_seconds"):
    BESIDE["fit", _name] = BESIDE["encode", _name] = "--engine ray"
for _flag in known_flags("fit"):
    if "rqkmeans" not in _flag.tokenizers:
        BESIDE.setdefault(("fit", _flag.name), f"--tokenizer {_flag.tokenizers[-1]}")

HUGE = "1" + "0" * 30
VALUES = ("-1", "0", "nan", "inf", "1e30", HUGE, "text")
SEEDS = {"seed", "data_seed", "ties_seed"}
ZERO = {
    "behavior_weight", "contrastive_weight", "uniformity_weight", "kl_weight", "balance_strength",
    "validation_fraction", "tolerance", "tol", "latent", "rounds", "annealing_rounds", "max_churn",
    "cold_items", "cold_slots", "history", "dropout", "decay", "core", "candidates", "warmup", "weight_decay",
    "checkpoint_seconds", "commitment_weight", "pretrain_epochs", "revive_below", "rotation_iter", "em_tol",
    "port", "batch_wait", "watch", "behind", "embedding_penalty",
}  # fmt: skip
UNLIMITED = {
    "learning_rate", "weight_decay", "clip_norm", "commitment_weight", "checkpoint_seconds", "embedding_penalty",
}  # fmt: skip


def numeric_options() -> list[tuple[str, str]]:
    options = []
    for info in app.registered_commands:
        command = info.name or info.callback.__name__
        hints = typing.get_type_hints(info.callback)
        for parameter in tree().commands[command].params:
            hint = hints.get(parameter.name)
            if {int, float} & {hint, *typing.get_args(hint)}:
                options.append((command, parameter.name))
    return options


def test_every_command_with_numbers_is_walked():
    assert {command for command, _ in numeric_options()} == set(CALLS)


@pytest.mark.parametrize(("command", "name"), numeric_options())
def test_numbers_out_of_range_are_refused(run, tmp_path, command, name):
    if command == "demo":
        (tmp_path / "nowhere").mkdir()
    accepted = {"-1", "0"} if name in SEEDS else {"0"} if name in ZERO else set()
    accepted |= {"1e30", HUGE} if name in UNLIMITED else set()
    flag = f"--{name.replace('_', '-')}"
    for value in VALUES:
        call = f"{command} {CALLS[command]} {BESIDE.get((command, name), '')} {flag}={value}"
        got, text = run(*call.split())
        lines = [line for line in text.splitlines() if line.lower().startswith("error: ")]
        assert len(lines) == 1, (value, text)
        if name in SEEDS and value == HUGE:  # models keep 64 bits, what is drawn now takes any
            assert "nowhere" in lines[0] or "64 bits" in lines[0], text
        elif value in accepted:
            assert "nowhere" in lines[0] or name == "candidates", (
                value,
                text,
            )  # 0 candidates need no embeddings
        else:
            assert got == 2, (value, text)
            assert flag in lines[0] or name in lines[0], (value, text)


# Flags that messages name --------------------------------------------------------------------

FOREIGN = {"--object-store-memory", "--porcelain"}  # of ray start and git status


def strings_of(path: Path) -> list[str]:
    """Return the strings of a module that are not docstrings, f-strings with their texts joined."""
    module = ast.parse(path.read_text(encoding="utf8"))
    skipped = set()
    for node in ast.walk(module):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            skipped |= {
                id(each.value) for each in body
                if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)
            }  # fmt: skip
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(each) for each in node.values}
    texts = []
    for node in ast.walk(module):
        if isinstance(node, ast.JoinedStr):
            parts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
            texts.append("".join(parts))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in skipped
        ):
            texts.append(node.value)
    return texts


def test_flags_in_messages_exist():
    known = set().union(*(flags_of(command) for command in tree().commands)) | FOREIGN
    unknown = {
        (str(path.relative_to(SOURCE)), flag)
        for path in SOURCE.rglob("*.py")
        for text in strings_of(path)
        for flag in FLAG.findall(text)
        if flag not in known and not re.search(rf"var\({flag}|{flag}:", text)  # CSS
    }
    assert not unknown


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(300, 8)).astype("f4")
    names = [f"i{n}" for n in range(300)]
    np.save(folder / "x.npy", x)
    np.save(folder / "narrow.npy", x[:, :5])
    far = x.copy()
    far[7] = 1e20
    np.save(folder / "far.npy", far)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 8)
    pq.write_table(pa.table({"item_id": names, "embedding": vectors}), folder / "x.parquet")
    pq.write_table(
        pa.table({"item_id": names, "price": generator.random(300)}), folder / "items.parquet"
    )
    log = {
        "user_id": [f"u{n % 40}" for n in range(300)],
        "item_id": names,
        "timestamp": list(range(300)),
        "label": [n % 2 for n in range(300)],
        "note": [float(n) for n in range(300)],
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    odd = {"uid": log["user_id"], "sku": names, "at": log["timestamp"], "rating": ["good"] * 300}
    pq.write_table(pa.table(odd), folder / "odd.parquet")
    model = semid.RQKMeans(levels=2, codebook_size=8).fit(folder / "x.parquet")
    model.save(folder / "m")
    semid.RQKMeans(levels=2, codebook_size=4).fit(folder / "x.parquet").save(folder / "m2")
    model.encode(folder / "x.parquet").write(folder / "ids.parquet")
    return folder


FAILURES = [  # command, arguments, a part of the sentence
    ("fit", "x.npy --embedding-column e -o o", "--embedding-column"),
    ("fit", "far.npy --codebook-size 8 -o o", "item '7', row 7"),
    ("fit", "x.npy --codebook-size 4096 -o o", "300"),
    ("fit", "x.parquet --id-column sku -o o", "--id-column"),
    ("fit", "x.parquet --tokenizer barq -o o", "--interactions"),
    ("fit", "x.parquet --tokenizer barq --codebook-size 8 --interactions odd.parquet -o o", "--user-column"),
    ("fit", "x.parquet --interactions log.parquet -o o", "--interactions"),
    ("fit", "x.parquet --user-column uid -o o", "--user-column"),
    ("retrieve", "log.parquet --ids ids.parquet --seeds 2 --log jsonl:run.jsonl -o o", "--log"),
    ("fit", "x.parquet --tokenizer rqvae --log jsonl:. -o o", "is a folder"),
    ("fit", "x.parquet --tokenizer drqvae --temperature 0.1 -o o", "--temperature"),
    ("fit", "x.parquet --tokenizer barq --behavior-weight 0 --epochs 3 -o o", "--epochs"),
    ("fit", "x.parquet --full-pass -o o", "--sample-per-code"),
    ("fit", "x.parquet --epochs 3 -o o", "--epochs"),
    ("fit", "x.parquet --workers 3 -o o", "--workers"),
    ("encode", "m far.npy -o o.parquet", "item '7', row 7"),
    ("encode", "m narrow.npy -o o.parquet", "width 5"),
    ("encode", "m x.npy --novel-beyond 0.5 -o o.parquet", "--catalogue"),
    ("report", "m far.npy -o r.html", "item '7', row 7"),
    ("report", "m narrow.npy -o r.html", "width 5"),
    ("report", "m x.parquet --interactions odd.parquet -o r.html", "--user-column"),
    ("report", "m x.parquet --interactions odd.parquet --user-column uid -o r.html", "--item-column"),
    ("report", "m x.parquet --interactions odd.parquet --user-column uid --item-column sku --time-column when -o r.html", "--time-column"),
    ("report", "m x.parquet --time-column at -o r.html", "--interactions"),
    ("compare", "m m2 x.parquet --interactions odd.parquet -o c.html", "--user-column"),
    ("compare", "m m2 narrow.npy -o c.html", "width 5"),
    ("refresh", "m x.parquet --catalogue ids.parquet --interactions odd.parquet -o o", "--user-column"),
    ("refresh", "m x.npy --catalogue ids.parquet -o o", "none of the 300"),
    ("refine", "m narrow.npy -o o", "width"),
    ("drift", "m narrow.npy x.npy", "width 5"),
    ("unique", "ids.parquet --method reassign --model m --embeddings narrow.npy -o o.parquet", "no embedding"),
    ("unique", "ids.parquet --method reassign --model m --embeddings narrow.npy --ids x.parquet -o o.parquet", "width 5"),
    ("unique", "ids.parquet --model m -o o.parquet", "--model"),
    ("export", "ids.parquet --to lcrec --embeddings x.npy -o o.json", "--embeddings"),
    ("export", "ids.parquet --to onnx -o o.onnx", "--model"),
    ("import", "x.npy --from lcrec --id-column a -o o.parquet", "--ids"),
    ("advise", "x.parquet --ties file", "--interactions"),
    ("advise", "x.parquet", "300 items are too few"),
    ("reproduce", "drq --list", "--estimate"),
    ("reproduce", "drq --from nowhere --processes 3", "--processes"),
    ("rank", "odd.parquet -o o", "--user-column"),
    ("rank", "log.parquet --label click>=1 -o o", "--label"),
    ("rank", "log.parquet --label label>=1 --categorical color -o o", "--categorical"),
    ("rank", "log.parquet --label label>=1 --categorical note -o o", "--dense"),
    ("rank", "log.parquet --label label>=1 --items items.parquet --item-columns price -o o", "--item-columns"),
    ("rank", "log.parquet --label label>=1 --items items.parquet --item-columns color -o o", "--item-columns"),
    ("rank", "log.parquet --label label>=1 --items items.parquet --multi-columns color -o o", "--multi-columns"),
    ("rank", "log.parquet --label label>=1 --item-columns brand -o o", "--items"),
    ("rank", "log.parquet --fractions nan,.5,.5 -o o", "--fractions"),
    ("rank", "log.parquet --hidden=-1 -o o", "--hidden"),
    ("rank", "log.parquet --hidden 8,x -o o", "--hidden"),
    ("rank", "log.parquet --label sampled(uniform,1000000000) -o o", "--label"),
    ("rank-grid", "log.parquet --scales 1,2 -o o", "--embeddings"),
    ("rank-grid", "log.parquet --embeddings x.parquet --scales 1,-2 -o o", "scales"),
    ("rank", "log.parquet --code-mode prefix -o o", "--ids"),
    ("rank", "log.parquet --fusion-rank 3 -o o", "--fusion"),
    ("rank", "log.parquet --split leave-last-out --fractions .6,.2,.2 -o o", "--fractions"),
    ("rank", "log.parquet --stream --label label>=1 --time-column timestamp -o o", "--time-column"),
    ("rank", "log.parquet --device gpu -o o", "--device"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "arguments", "part"), FAILURES)
def test_messages_name_flags_that_the_command_has(
    run, files, tmp_path, monkeypatch, command, arguments, part
):
    output = {"-o", "--output"}
    words = arguments.split()
    words = [
        str(files / word) if (files / word).exists() and word != "." and before not in output else word
        for before, word in zip(["", *words], words, strict=False)
    ]  # fmt: skip
    got, text = run(command, *words, *(["-q"] if "--quiet" in flags_of(command) else []))
    assert got in (1, 2), text
    assert part in text, text
    assert not re.search("internal error|Traceback", text), text
    named = set(FLAG.findall(re.sub(r"'semid [^']*'", "", text)))
    assert named <= flags_of(command), named - flags_of(command)
    assert list(tmp_path.iterdir()) == []  # a refused command leaves nothing behind


def test_columns_of_interactions_have_flags_in_every_command_that_reads_them(run, files, tmp_path):
    columns = ("--user-column", "uid", "--item-column", "sku", "--time-column", "at")
    log = ("--interactions", files / "odd.parquet")  # its ratings are texts, which nobody reads
    for command, arguments in {
        "report": (files / "m", files / "x.parquet", "-o", "r.json"),
        "compare": (files / "m", files / "m2", files / "x.parquet", "-o", "c.json"),
        "refresh": (files / "m", files / "x.parquet", "--catalogue", files / "ids.parquet", "-o", "next"),
        "fit": (
            files / "x.parquet", "--tokenizer", "drqvae", "--contrastive-weight", 0.1, "--epochs", 1,
            "--codebook-size", 8, "--latent", 4, "-o", "model",
        ),
    }.items():  # fmt: skip
        code, text = run(command, *arguments, *log, *columns, "-q")
        assert code == 0, text


def test_a_log_is_written_where_there_are_epochs(run, files, tmp_path):
    code, text = run(
        "fit", files / "x.parquet", "--tokenizer", "rqvae", "--epochs", 2, "--codebook-size", 8,
        "--latent", 4, "--log", "jsonl:run.jsonl", "-o", "model", "-q",
    )  # fmt: skip
    assert code == 0, text
    assert (tmp_path / "run.jsonl").read_text(encoding="utf8").count("\n") >= 2
    refusal(run, "fit", files / "x.parquet", "--tokenizer", "rqvae", "--codebook-size", 4096,
            "--log", "jsonl:none.jsonl", "-o", "other", "-q", code=1)  # fmt: skip
    assert not (tmp_path / "none.jsonl").exists()


# What reaches the terminal and the pages ---------------------------------------------------------


def test_foreign_messages_become_one_line():
    assert brief(ValueError("first\n  second\nthird")) == "first"
    assert brief(ValueError("\n\n  later \n")) == "later"
    assert brief(KeyError()) == "KeyError"
    assert len(brief(ValueError("x" * 1000))) == 200
    assert brief(ValueError("\x1b[31mred")) == "\\x1b[31mred"


def test_control_characters_are_escaped():
    assert printable("größe 漢字 a\tb") == "größe 漢字 a\tb"
    assert printable("a\x1b[2Jb\r\x07\u202ec\ud800") == "a\\x1b[2Jb\\r\\x07\\u202ec\\ud800"


def test_names_with_control_characters_do_not_steer_the_terminal(run, files, tmp_path):
    for name in ("\x1b[31mred.parquet", "a\rb.parquet"):
        code, text = run("fit", name, "-o", "o", "-q")
        assert code == 2
        assert name not in text
        assert "\x1b[31mred" not in text


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), KeyError("x"), ZeroDivisionError()])
def test_other_exceptions_become_one_sentence(run, monkeypatch, files, error):
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("semid.tokenizers.factory.make_tokenizer", broken)
    code, text = run("fit", files / "x.parquet", "-o", "o")
    assert code == 1
    assert text.startswith(f"internal error: {type(error).__name__}: ")
    assert "--debug" in text
    assert len(text.splitlines()) == 1
    with pytest.raises(type(error)):
        main(["fit", str(files / "x.parquet"), "-o", "o", "--debug"])


def test_file_systems_that_cannot_be_reached(run, monkeypatch):
    import fsspec

    class Broken(fsspec.AbstractFileSystem):
        protocol = "broken"

        def info(self, path: str, **_: object) -> None:
            raise RuntimeError(f"no route to {path}\nTraceback of another library\n...")

        ls = info

    fsspec.register_implementation("broken", Broken, clobber=True)
    for uri in ("broken://host/items", "nosuchscheme://host/items"):
        line = refusal(run, "fit", uri, "-o", "o", "-q")
        assert uri in line


def test_markdown_keeps_names_apart():
    assert escaped("a|b\n`c` <d>") == "a\\|b \\`c\\` \\<d\\>"
    assert code_span("plain") == "`plain`"
    assert code_span("a `b` c") == "``a `b` c``"


def test_a_comparison_escapes_the_names_of_models(files):
    models = {"a|b": semid.load(files / "m"), "c`d": semid.load(files / "m2")}
    text = compare(models, files / "x.parquet", replicates=0).to_markdown()
    heads = [line for line in text.splitlines() if "a\\|b" in line and line.startswith("|")]
    assert heads
    assert all(line.count("|") - line.count("\\|") == 4 for line in heads[:1])
