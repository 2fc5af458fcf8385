"""Small studies from end to end: runs, resume, the page, and `semid reproduce`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import semid
from cli_cases import run
from semid import RQVAE, SyntheticCatalogue
from semid.data.embeddings import open_embeddings
from semid.data.interactions import TRAIN, split_users
from semid.errors import UsageError
from semid.reproduce.claims import Rows
from semid.reproduce.datasets import open_data
from semid.reproduce.drq import DRQ as DRQ_PAPER
from semid.reproduce.drq_runs import DrqExperiment, training_share
from semid.reproduce.ledger import Ledger, read_runs
from semid.reproduce.plain import PlainRQVAE
from semid.reproduce.recipe import DataSet, read_experiment
from semid.reproduce.study import Study

DRQ = """
paper = "drq"
seeds = 2
levels = 2
geometry_sample = 300
flip_sample = 60
replicates = 10
behavior_head = true
[neural]
network = { latent = 6, hidden = [12], pretrain_epochs = 1 }
training = { epochs = 1, batch_size = 256 }
[[tokenizers]]
name = "RQ-KMeans"
kind = "rqkmeans"
[[tokenizers]]
name = "DRQ-VAE+CL"
kind = "drqvae"
behavior = true
options = { contrastive_weight = 0.1, pairs_per_step = 32 }
[[tokenizers]]
name = "RQ-VAE (plain)"
kind = "plain-rqvae"
[[data]]
name = "synthetic"
synthetic = 700
codebook_size = 8
"""
MOC = """
paper = "moc"
seeds = 1
width = 3
fusion_rank = 2
model = { hidden = [6], dropout = 0.0 }
training = { epochs = 1, batch_size = 4096 }
probe = { epochs = 1 }
[tokenizer]
network = { latent = 6, hidden = [12], pretrain_epochs = 1 }
training = { epochs = 1, batch_size = 256 }
[[stages]]
name = "main"
models = ["dcnv2"]
methods = ["none", "vqvae", "me", "moc", "random"]
scales = [2]
analyze = 1
[[stages]]
name = "kept"
kind = "kept"
methods = ["moc"]
scales = [2]
[[stages]]
name = "parts"
models = ["dcnv2"]
methods = ["moc"]
scales = [2]
fusion = [false]
parts = ["alone", "first"]
[[stages]]
name = "ratings"
models = ["dcnv2"]
methods = ["none"]
fusion = [false]
variant = "stars"
[[stages]]
name = "penalties"
models = ["dcnv2"]
methods = ["moc"]
scales = [1, 2]
fusion = [false]
variant = "regularized"
seeds = 2
analyze = 1
[[variants]]
name = "stars"
label = "stars>3"
[[variants]]
name = "regularized"
width = 2
embedding_penalty = [100.0, 0.001]
[[data]]
name = "synthetic"
synthetic = 700
codebook_size = 8
"""

RETRIEVAL = """
paper = "retrieval"
seeds = 2
training = { epochs = 1 }
[[ids]]
name = "learned"
kind = "rqkmeans"
options = { levels = 2 }
unique = "append"
[[ids]]
name = "behavior"
kind = "drqvae"
behavior = true
[ids.options]
levels = 2
contrastive_weight = 0.1
pairs_per_step = 32
network = { latent = 6, hidden = [12], pretrain_epochs = 1 }
training = { epochs = 1, batch_size = 256 }
[[models]]
name = "popularity"
kind = "popularity"
[[models]]
name = "sasrec"
kind = "sasrec"
options = { width = 8 }
[[models]]
name = "composed"
kind = "composed"
options = { width = 8 }
[[models]]
name = "generative"
kind = "generative"
options = { width = 8, layers = 1, beams = 5 }
training = { epochs = 2 }
[[stages]]
models = ["popularity", "composed", "sasrec"]
ids = ["learned"]
[[stages]]
models = ["generative"]
ids = ["learned"]
ties = ["file"]
seeds = 1
[[stages]]
models = ["sasrec", "composed"]
ids = ["learned", "behavior"]
ties = ["shuffle"]
seeds = 1
[[data]]
name = "synthetic"
synthetic = 700
codebook_size = 8
"""


@pytest.fixture
def recipes(tmp_path):
    for name, text in (("drq", DRQ), ("moc", MOC), ("retrieval", RETRIEVAL)):
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path


def test_a_study_of_drq(recipes, capsys):
    out = recipes / "out"
    given = ["reproduce", "drq", "--recipe", recipes / "drq.toml", "-o", out, "--quiet"]
    assert run(*given, "--estimate", "--list") == 0
    shown = capsys.readouterr().out
    assert "6 runs, 0 done, 6 to do" in shown
    assert "nothing has run yet to judge by" in shown
    assert shown.splitlines()[2] == "  synthetic, RQ-KMeans, seed 0"
    assert run(*given, "--only", "seed 0") == 0
    rows = read_runs(out / "drq" / "runs.jsonl")
    names = ["RQ-KMeans", "DRQ-VAE+CL", "RQ-VAE (plain)"]
    assert [(r["tokenizer"], r["seed"]) for r in rows] == [(name, 0) for name in names]
    assert run(*given, "--estimate") == 0
    shown = capsys.readouterr().out
    assert "6 runs, 3 done, 3 to do" in shown
    assert "hours of one process at the speed of the runs done on machines with" in shown
    assert run(*given) == 0
    rows = read_runs(out / "drq" / "runs.jsonl")
    assert len(rows) == len({r["key"] for r in rows}) == 6
    kmeans, contrastive, plain = rows[:3]
    # The same head for all, into one space: fitted once per seed.
    heads = [row["behavior"]["retention"]["behavior head(codes)"]["50"] for row in rows]
    assert len(set(heads)) == len(heads)
    assert all(map(np.isfinite, heads))
    assert len(list((out / "drq" / "spaces").glob("*.npy"))) == 2
    # What the codewords of a network sum to is another space than what they decode to.
    assert "latent(codes)" in plain["behavior"]["retention"]
    assert "latent(codes)" not in kmeans["behavior"]["retention"]
    # The last epoch, whatever it is like, and no claim's rival.
    assert plain["kind"] == "plain-rqvae"
    assert "RQ-VAE (plain)" not in DRQ_PAPER.facts(Rows(rows))["others"]
    # Without a decoder there is nothing to lose before quantization.
    assert kmeans["decoder(z)"]["relative_error"] == 0.0
    assert kmeans["behavior"]["retention"]["decoder(z)"]["50"] == 1.0
    assert kmeans["flips"]["latent_is_input"]
    assert contrastive["decoder(z)"]["relative_error"] > 0
    assert contrastive["latent"] == 6
    assert len(contrastive["overlap"]) == 2
    assert "contrastive pairs" in contrastive["protocol"]
    page = (out / "drq" / "drq-tables.md").read_text()
    assert "| RQ-KMeans | 2 |" in page
    assert "| RQ-VAE | not run |" in page
    assert (out / "drq" / "drq.html").exists()
    # Another setting is another run, never a silent mixture.
    (recipes / "drq.toml").write_text(DRQ.replace("flip_sample = 60", "flip_sample = 50"))
    assert run(*given, "--estimate") == 0
    assert "6 runs, 0 done" in capsys.readouterr().out


def test_the_plain_rqvae_can_collapse():
    x = SyntheticCatalogue(items=1500, dim=16, seed=0).matrix()
    training = {"epochs": 6, "batch_size": 256, "patience": 1}
    options = {"codebook_size": 32, "training": training}
    network = {"latent": 8, "hidden": [16]}
    usual = RQVAE(**options, network={**network, "pretrain_epochs": 1}).fit(x)
    plain = PlainRQVAE(**options, network=network).fit(x)
    used = [len(np.unique(one.encode(x).codes[:, 0])) for one in (usual, plain)]
    assert 0 < used[1] <= 20 < 26 <= used[0]
    # All epochs run, and the last is returned though an earlier one may have been better.
    assert plain.report.details["training"]["best_epoch"] == 5
    assert plain.report.details["training"]["epochs"] == 6
    again = PlainRQVAE(**options, network=network).fit(x)
    assert all(map(np.array_equal, plain.codebooks, again.codebooks))


def test_a_study_of_moc(recipes, capsys):
    out = recipes / "out"
    given = ["reproduce", "moc", "--recipe", recipes / "moc.toml", "-o", out, "--quiet"]
    assert run(*given) == 0
    assert "has no column 'stars'" in capsys.readouterr().err
    every = read_runs(out / "moc" / "runs.jsonl")
    rows = [row for row in every if not row["variant"]]
    cells = [
        (r["method"], r["scale"], r["fusion"], r.get("part", ""))
        for r in rows
        if r["run"] == "rank"
    ]
    whole = [("none", 0), ("vqvae", 1), ("me", 2), ("moc", 2), ("random", 2)]
    assert cells[:10] == [(*c, f, "") for c in whole for f in (False, True)]
    assert sorted(cells[10:]) == [("moc", 2, False, p) for p in ("alone 1", "alone 2", "first 1")]
    by = {(r["method"], r["fusion"]): r for r in rows if r["run"] == "rank" and "part" not in r}
    assert len(by["moc", False]["analysis"]["correlation"]) == 2
    assert "analysis" not in by["none", False]
    assert by["me", True]["analysis_fused"]["spectrum"]["dimensions"] == 6
    # A part of the codes reads fewer tables; the ledger was told which.
    parts = [r for r in rows if r.get("part")]
    assert all(r["parameters"]["codes"] < by["moc", False]["parameters"]["codes"] for r in parts)
    assert by["none", False]["parameters"]["codes"] == 0
    (kept,) = [r for r in rows if r["run"] == "kept"]
    assert kept["kept"]["error"] > 0
    page = (out / "moc" / "moc-tables.md").read_text()
    for part in ("Without a penalty", "Information kept", "Singular values", "penalty |"):
        assert part in page
    assert "has no column 'stars'" in page
    again = json.loads((out / "moc" / "runs.jsonl").read_text().splitlines()[0])
    assert run(*given) == 0
    assert len(read_runs(out / "moc" / "runs.jsonl")) == len(every)
    assert again["key"] == rows[0]["key"]
    # The penalty with the best validation AUC of seed 0 is that of both seeds; all were tried.
    penalized = [row for row in every if row["variant"] == "regularized"]
    first, second = (row for row in penalized if row["scale"] == 2)
    tried = {one["embedding_penalty"]: one for one in first["tried"]}
    assert list(tried) == [100.0, 0.001]
    assert first["embedding_penalty"] == max(
        tried, key=lambda penalty: tried[penalty]["validation_auc"]
    )
    assert first["auc"] == tried[first["embedding_penalty"]]["auc"]
    assert second["embedding_penalty"] == first["embedding_penalty"]
    assert second["tried"] == first["tried"]
    assert first["analysis"]
    # One code takes the penalty of two, and is trained with it.
    one = next(row for row in penalized if row["scale"] == 1)
    assert one["tried"] == first["tried"]
    assert one["auc"] not in [each["auc"] for each in tried.values()]
    assert "width=2 " in first["protocol"]
    assert second["auc"] != first["auc"]
    # On another machine the ledger says what was chosen; nothing is tried again.
    shutil.rmtree(out / "moc" / "tuned")
    kept = [json.dumps(row) + "\n" for row in every if row is not second]
    (out / "moc" / "runs.jsonl").write_text("".join(kept))
    assert run(*given) == 0
    last = read_runs(out / "moc" / "runs.jsonl")[-1]
    assert last["key"] == second["key"]
    assert last["auc"] == second["auc"]
    assert not list((out / "moc" / "tuned").iterdir())


def test_a_study_of_retrieval(recipes):
    out = recipes / "out"
    given = ["reproduce", "retrieval", "--recipe", recipes / "retrieval.toml", "-o", out, "--quiet"]
    assert run(*given, "--threads", 1) == 0
    rows = read_runs(out / "retrieval" / "runs.jsonl")
    cells = [(r["model"], r["tokenizer"], r["ties"], r["seed"]) for r in rows]
    both = ("file", "shuffle")
    first = [(m, t) for t in both for m in ("popularity", "composed", "sasrec")]
    assert cells[:6] == [(m, "learned" if m == "composed" else "", t, 0) for m, t in first]
    # A second seed of a model without training would be the same run.
    assert {c[0] for c in cells if c[3] == 1} == {"composed", "sasrec"}
    assert cells[-1][:4] == ("composed", "behavior", "shuffle", 0)
    by = dict(zip(cells, rows, strict=True))
    # Whoever ran before the control of its seed has nothing to be paired with.
    assert by["composed", "learned", "file", 0]["less_control"] is None
    value, low, high = by["composed", "behavior", "shuffle", 0]["less_control"]["recall_10"]
    control = by["sasrec", "", "shuffle", 0]
    own = by["composed", "behavior", "shuffle", 0]
    gap = own["metrics"]["recall_10"] - control["metrics"]["recall_10"]
    assert value == pytest.approx(gap, abs=1e-5)
    assert low <= value <= high
    assert len(own["curve"]) == own["epochs"] == 1
    assert by["generative", "learned", "file", 0]["epochs"] == 2
    assert own["unique_ids"] < own["items"]
    assert own["beam_agreement"] is None
    assert 0.3 < by["generative", "learned", "file", 0]["beam_agreement"] <= 1
    assert by["composed", "learned", "file", 0]["unique_ids"] == own["items"]
    assert not list((out / "retrieval" / "states").iterdir())
    # Ids that no behavior went into are those of both orders.
    assert len(list((out / "retrieval" / "tokenizers").glob("*.parquet"))) == 3
    page = (out / "retrieval" / "retrieval-tables.md").read_text()
    assert "| composed on learned | 2 |" in page
    assert "| composed on behavior | 1 |" in page
    assert "sasrec, file order - sasrec" in (out / "retrieval" / "retrieval.json").read_text()
    assert "Everything in the recipe has run." in page


def test_a_misspelled_name_of_a_stage_is_refused(recipes):
    text = RETRIEVAL.replace('ids = ["learned"]', 'ids = ["lerned"]')
    (recipes / "retrieval.toml").write_text(text)
    with pytest.raises(UsageError, match="lerned"):
        read_experiment(recipes / "retrieval.toml")


def test_a_union_joins_the_logs_of_others(tmp_path):
    from semid.data.synthetic import SyntheticCatalogue

    for number, name in enumerate(("a", "b")):
        files = SyntheticCatalogue(items=60 + number, seed=number).write(tmp_path / name)
        table = pq.read_table(files.interactions)
        ids = [f"{name}:{x}" for x in table.column("item_id").to_pylist()]
        pq.write_table(
            table.set_column(1, "item_id", [ids]), tmp_path / name / "interactions.parquet"
        )
    names = [f"a:P{n:07d}" for n in range(60)] + [f"b:P{n:07d}" for n in range(61)]
    names += [f"c:{n}" for n in range(30)]
    import pyarrow as pa

    (tmp_path / "all").mkdir()
    pq.write_table(pa.table({"item_id": names}), tmp_path / "all" / "items.parquet")
    np.save(
        tmp_path / "all" / "embeddings.npy",
        np.random.default_rng(0).normal(size=(len(names), 4)).astype(np.float32),
    )
    spec = DataSet(name="union", folder="all", logs=("a", "b"))
    opened = open_data(spec, tmp_path, Ledger(tmp_path / "ledger"))
    log = opened.log()
    assert log.order_column == "position"
    assert {str(u).split(":")[0] for u in log.user_ids.to_pylist()} == {"a", "b"}
    pool = opened.pool(log)
    kept = pool.ids.strings().to_pylist()
    assert kept == [n for n in names if n in set(log.item_ids.to_pylist())]
    assert not any(n.startswith("c:") for n in kept)
    with pytest.raises(UsageError, match="2 logs"):
        _ = opened.interactions


def test_data_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match="needs --data"):
        Study("drq", output=tmp_path)
    with pytest.raises(UsageError, match=r"lacks .*items\.parquet"):
        Study("moc", data=tmp_path, output=tmp_path)
    with pytest.raises(UsageError, match="no run's title"):
        Study("drq-quick", output=tmp_path, only=["nothing like it"])
    assert read_experiment("drq-quick").data[0].synthetic


def test_a_share_of_the_training_users():
    log = SyntheticCatalogue(items=900, seed=2).interactions()
    part, names = split_users(log.user_ids), np.array(log.user_ids.to_pylist())

    def users(share):
        return set(names[np.unique(training_share(log, share).users)])

    train, others = set(names[part == TRAIN]), set(names[part != TRAIN])
    assert users(1.0) == train | others
    assert others < users(0.1) < users(0.3) < users(1.0)  # those who judge are all there
    assert 0.2 < len(users(0.3) & train) / len(train) < 0.4


def test_a_study_of_behavior(tmp_path):
    given = DRQ.replace('"drq"', '"behavior"').split("[[data]]")[0]
    contrastive = given.split("[[tokenizers]]")[2].replace('CL"', 'CL, 30 % of the users"')
    shop = 'name = "shop"\nfolder = "shop"\ncodebook_size = 8\nties = "shuffle"\nrelations = true\n'
    recipe = tmp_path / "behavior.toml"
    recipe.write_text(f"{given}[[tokenizers]]\nusers = 0.3{contrastive}[[data]]\n{shop}")
    folder = tmp_path / "shop"
    catalogue = SyntheticCatalogue(items=700, seed=0)
    catalogue.write(folder)
    with pytest.raises(UsageError, match=r"relations\.parquet"):  # said before anything runs
        Study(recipe, data=tmp_path, output=tmp_path)
    rng = np.random.default_rng(0)
    names = np.array(catalogue.ids.strings().to_pylist())
    pairs = {"item_id": rng.choice(names, 200), "related_item_id": rng.choice(names, 200)}
    kinds = ["also_bought"] * 120 + ["also_viewed"] * 80
    pq.write_table(pa.table({**pairs, "relation": kinds}), folder / "relations.parquet")
    study = Study(recipe, data=tmp_path, output=tmp_path)
    study.run()
    rows = study.rows()
    by_name = {row["tokenizer"]: row for row in rows if row["seed"] == 0}
    assert len(rows) == 2 * len(by_name) == 8
    # A smaller log changes what is learned, and not who judges.
    full, part = by_name["DRQ-VAE+CL"], by_name["DRQ-VAE+CL, 30 % of the users"]
    assert "ties shuffled" in full["protocol"]
    assert full["behavior"]["pairs"] == part["behavior"]["pairs"]
    assert full["decoder(codes)"]["mse"] != part["decoder(codes)"]["mse"]
    # The figures on relations are those of a diagnosis.
    kmeans = by_name["RQ-KMeans"]
    embeddings = open_embeddings(folder / "embeddings.npy", ids=folder / "items.parquet")
    tokenizer = semid.RQKMeans(levels=2, codebook_size=8, seed=0).fit(embeddings)
    diagnosis = semid.diagnose(
        tokenizer, embeddings, relations=folder / "relations.parquet", explorer=False
    )
    for kind, results in diagnosis.relations.items():
        measured = kmeans["relations"][kind]
        assert measured["aucs"]["weighted"] == pytest.approx(results.aucs.aucs["weighted"].value)
        rate = results.discrete.depths[-1].rates[50].value
        assert measured["discrete"]["50"] == pytest.approx(rate)
    assert len(diagnosis.relations) == 2
    page = study.page()
    found = kmeans["relations"]["also_bought"]["pairs"]["pairs"]
    assert 110 < found <= 120  # some are of one item with itself
    assert f"| RQ-KMeans, also bought | 2 | {found} |" in page.tables_markdown()
    [curve] = page.sections[0][3][0].traces  # of the one tokenizer with a part of the users
    assert list(curve["x"]) == [0.3, 1]
    assert curve["y"][0] != curve["y"][1]


@pytest.mark.parametrize("name", ["barq", "family"])
def test_rows_of_the_benchmarks_recipes_are_tokenizers(name, tmp_path):
    recipe = read_experiment(Path(__file__).parents[1] / "benchmarks" / f"{name}.toml")
    experiment = DrqExperiment(recipe, None, tmp_path)
    for data in recipe.data:
        bits = {}
        for row in recipe.tokenizers:
            if row.data and data.name not in row.data:
                continue
            assert (row.name, row.variant) not in bits, "two rows of one name on one data set"
            tokenizer = experiment.tokenizer(row, data, seed=3)
            assert tokenizer.seed == 3
            bits[row.name, row.variant] = np.log2(tokenizer.codebook_sizes).sum()
        # One table compares what costs as much, but for rows that say how many codes they have.
        full = recipe.levels * np.log2(data.codebook_size)
        assert all(abs(n / full - 1) < 0.02 for k, n in bits.items() if "codes" not in k[1])


PREDICT = """
paper = "predict"
seeds = 1
geometry_sample = 200
flip_sample = 50
[neural]
network = { latent = 6, hidden = [12], pretrain_epochs = 1 }
training = { epochs = 1, batch_size = 256 }
[[tokenizers]]
name = "learned"
kind = "rqkmeans"
options = { levels = 2 }
[[tokenizers]]
name = "behavior"
kind = "drqvae"
behavior = true
options = { levels = 2, contrastive_weight = 0.1, pairs_per_step = 32 }
[[tokenizers]]
name = "shuffled"
kind = "rqkmeans"
control = "shuffled"
options = { levels = 2 }
[[tokenizers]]
name = "random"
kind = "codebooks"
control = "random"
options = { levels = 2 }
[[tokenizers]]
name = "hash"
kind = "codebooks"
control = "hash"
options = { levels = 2, codebook_size = 16 }
[[tokenizers]]
name = "category"
kind = "codebooks"
control = "category"
options = { levels = 3 }
[[models]]
name = "composed"
kind = "composed"
options = { width = 8, layers = 1 }
training = { epochs = 1 }
[[models]]
name = "dcnv2"
kind = "dcnv2"
training = { epochs = 1 }
[[stages]]
models = ["composed"]
[[stages]]
models = ["dcnv2"]
tokenizers = ["learned", "random"]
[[data]]
name = "synthetic"
synthetic = 700
codebook_size = 8
ties = "shuffle"
"""


@pytest.fixture(scope="module")
def predict_rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    recipe = folder / "predict.toml"
    recipe.write_text(PREDICT, encoding="utf8")
    study = Study(recipe, output=folder)
    assert study.run() == {}
    return study


def test_numbers_and_outcomes_stand_in_one_row(predict_rows):
    study = predict_rows
    rows = {(row["model"], row["tokenizer"]): row for row in study.rows()}
    assert len(rows) == len(study.jobs) == 8
    assert study.run() == {}  # nothing is repeated
    assert len(study.rows()) == 8
    learned, random = rows["composed", "learned"], rows["composed", "random"]
    # Codes of meaningless origin keep nothing of behavior, and their numbers say so.
    for name in ("retention", "weighted AUC", "behavior alignment, depth 1", "neighbors kept"):
        assert learned["numbers"][name] > random["numbers"][name] + 0.05, name
    assert learned["numbers"]["relative error"] < 0.6 < random["numbers"]["relative error"]
    assert rows["composed", "category"]["numbers"]["weighted AUC"] > 0.7
    assert rows["composed", "shuffled"]["numbers"]["weighted AUC"] < 0.6
    assert rows["composed", "shuffled"]["numbers"]["relative error"] < 0.6  # of the wrong rows
    # No encoder, no flips; the same numbers beside every recommender.
    assert random["numbers"]["flips of ids, input"] is None
    assert learned["numbers"]["flips of ids, input"] >= 0
    assert rows["dcnv2", "learned"]["numbers"] == learned["numbers"]
    assert 0 < rows["dcnv2", "learned"]["metrics"]["auc"] < 1
    # Groups of users add up to the whole.
    groups = learned["user_groups"]
    mean = sum(groups["ndcg_10"]) / sum(groups["users"])
    assert mean == pytest.approx(learned["metrics"]["ndcg_10"], rel=1e-4)
    assert {"head", "tail", "cold"} <= learned["slices"].keys()


def test_given_codes_are_those_of_the_control(predict_rows):
    study = predict_rows
    opened = study.experiment.open("synthetic")
    source = opened.embeddings
    spec = study.experiment.tokenizers["hash"]
    tok = study.experiment._tokenizer(opened, spec, source, 0)
    ids = tok.encode(source)
    assert (ids.codes == tok.given[0]).all()
    again = study.experiment._tokenizer(opened, spec, source, 0)
    assert (again.given[0] == tok.given[0]).all()
    # The mean of what a code's items leave is the best codeword: errors of means are 0.
    rows = source.rows(np.arange(len(source)))
    residual = rows - rows.mean(0)
    for level, book in enumerate(tok.codebooks):
        code = int(ids.codes[0, level])
        mine = ids.codes[:, level] == code
        assert np.allclose(book[code], residual[mine].mean(0), atol=1e-5)
        residual = residual - book[ids.codes[:, level]]
    assert np.allclose(ids.residual_norms, np.linalg.norm(residual, axis=1), atol=1e-4)
    assert np.allclose(tok.decode(ids), rows - residual, atol=1e-4)
