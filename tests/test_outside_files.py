"""Files that come from outside: one sentence for whatever is wrong, and never other ids."""

from __future__ import annotations

import copy
import gzip
import json
import logging
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

import semid
from catalogue_cases import codes_info, drawn_tokenizer, rows
from cli_cases import run
from semid.artefact import CHECKSUM, fingerprint, write_artefact
from semid.catalogue.additions import add_items, check_model
from semid.catalogue.bundle import CatalogueBundle
from semid.codes import CodesInfo, SemanticIds
from semid.data.ids import ItemIds
from semid.data.releases import read_amazon, read_movielens
from semid.documents import checksum
from semid.errors import ArtefactError, IdsError, InputError, SemidError, UsageError
from semid.exports.formats import export, import_ids
from semid.exports.huggingface import HuggingFaceExport
from semid.reproduce.recipe import read_experiment
from semid.tokenizers.factory import make_tokenizer, read_recipe

V1 = Path(__file__).parent / "data" / "v1"
NAMES = [f"i{n}" for n in range(40)]
ARTEFACTS = ("rqkmeans", "rqvae", "head", "ranker")
INFO = codes_info((4, 8))
WRONG = (None, True, -1, 10**12, 1.5, "x", [[]], {"x": 1})
DEEP = b"[" * 100_000


def ids_of(codes: Any, items: Any = None, info: CodesInfo = INFO) -> SemanticIds:
    norms = np.zeros(len(codes), np.float32)
    return SemanticIds(ItemIds(NAMES[: len(codes)] if items is None else items), codes, norms, info)


def same(a: SemanticIds, b: SemanticIds) -> bool:
    return a.items == b.items and np.array_equal(a.codes, b.codes) and a.info == b.info


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place three levels deep; of lists the first, of tables in tables the first three."""
    if path:
        yield path
    if len(path) == 3:
        return
    if isinstance(document, dict):
        names = list(document)
        for name in names if len(path) < 2 else names[:3]:
            yield from places(document[name], (*path, name))
    elif isinstance(document, list) and document:
        yield from places(document[0], (*path, 0))


def altered(document: Any) -> Iterator[Any]:
    """The document with another value at every place, and without it."""
    for *above, last in places(document):
        for value in (*WRONG, "missing"):
            changed = copy.deepcopy(document)
            inner = changed
            for name in above:
                inner = inner[name]
            if value == "missing":
                del inner[last]
            else:
                inner[last] = value
            yield changed


def damaged(data: bytes) -> Iterator[bytes]:
    """The bytes cut, flipped and replaced."""
    yield from (data[: len(data) * part // 4] for part in range(4))
    generator = np.random.default_rng(1)
    for place in generator.integers(0, len(data), 25):
        yield data[:place] + bytes([data[place] ^ 1 << (place % 8)]) + data[place + 1 :]
    yield from (DEEP, b"\xff\xfe", b"null", b"[]", b'{"a": Infinity}', b'{"a": 1e999}', b"{" * 9)
    yield b'{"format_version": 1, "format_version": 1, "kind": "rqkmeans"}'


def survives(read: Any, *arguments: Any) -> Any:
    """Return what is read, or None where it was refused on purpose."""
    try:
        return read(*arguments)
    except SemidError:
        return None


# Format version 1 -----------------------------------------------------------------------------


def test_what_version_1_wrote_still_matches():
    x = np.load(V1 / "x.npy")
    ids = SemanticIds.read(V1 / "ids.parquet")
    neural, kmeans = semid.load(V1 / "rqvae"), semid.load(V1 / "rqkmeans")
    assert neural.weights_fingerprint == ids.info.weights_fingerprint
    assert same(neural.encode(x, ids=NAMES), ids)
    bundle = CatalogueBundle(V1 / "bundle")
    assert not same(bundle.read(), kmeans.encode(x, ids=NAMES).take(np.arange(40)))  # quantiles
    assert np.array_equal(bundle.read().codes, kmeans.encode(x).codes)
    check_model(bundle.read(), kmeans)
    assert np.isfinite(semid.load(V1 / "head").predict(ids)).all()
    scores = semid.load(V1 / "ranker").predict({"user_id": ["u1", "u2"], "item_id": ["i1", "i2"]})
    assert scores.logit.tolist() == [-0.022309452295303345, -0.03089057095348835]


def test_a_model_of_version_1_keeps_its_fingerprint_when_saved_again(tmp_path):
    ids = SemanticIds.read(V1 / "ids.parquet")
    semid.load(V1 / "rqvae").save(tmp_path / "again")
    again = semid.load(tmp_path / "again")
    check_model(ids, again)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["format_version"] == 2
    shutil.copytree(V1 / "bundle", tmp_path / "bundle")
    bundle = CatalogueBundle(tmp_path / "bundle")
    kmeans = semid.load(V1 / "rqkmeans")
    more = add_items(bundle.read(), kmeans, np.load(V1 / "x.npy")[:3] + 1, ids=["a", "b", "c"])
    assert bundle.append(more.ids) == 3
    assert len(bundle.read()) == 43


# Fingerprints ---------------------------------------------------------------------------------


def test_settings_that_change_codes_belong_to_the_fingerprint(tmp_path):
    plain, unit = drawn_tokenizer(), drawn_tokenizer()
    unit.normalize = True
    assert plain.codebook_fingerprint == unit.codebook_fingerprint
    assert plain.weights_fingerprint != unit.weights_fingerprint
    ids = plain.encode(rows(), beam_width=2)
    assert ids.info.weights_fingerprint == plain.weights_fingerprint
    plain.save(tmp_path / "m")
    assert semid.load(tmp_path / "m").weights_fingerprint == plain.weights_fingerprint


@pytest.mark.parametrize("resigned", [False, True])
def test_an_edited_config_is_refused(tmp_path, resigned):
    drawn_tokenizer().save(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    for name, value in (("normalize", True), ("codebook_size", [4, 9]), ("center", True)):
        document = json.loads(file.read_text())
        document["settings"][name] = value
        if resigned:
            del document[CHECKSUM]
            document[CHECKSUM] = checksum(document)
        (tmp_path / "edited").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "m" / "model.safetensors", tmp_path / "edited")
        (tmp_path / "edited" / "config.json").write_text(json.dumps(document))
        with pytest.raises(ArtefactError):
            semid.load(tmp_path / "edited")


def test_every_flipped_bit_of_ids_is_noticed(tmp_path):
    ids = ids_of(np.stack([np.arange(40) % 4, np.arange(40) % 8], 1))
    ids.write(tmp_path / "ids.parquet")
    whole = (tmp_path / "ids.parquet").read_bytes()
    file = tmp_path / "flipped.parquet"
    refused = 0
    for place in range(4, len(whole) - 8, 7):
        file.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << (place % 8)]) + whole[place + 1 :]
        )
        read = survives(SemanticIds.read, file)
        refused += read is None
        assert read is None or same(read, ids)
    assert refused > len(whole) // 28


# Documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARTEFACTS)
def test_wrong_configs(name, tmp_path):
    shutil.copytree(V1 / name, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    valid = file.read_bytes()
    for document in altered(json.loads(valid)):
        file.write_text(json.dumps(document))
        survives(semid.load, tmp_path / "m")
    for data in damaged(valid):
        file.write_bytes(data)
        survives(semid.load, tmp_path / "m")
    file.write_bytes(valid)
    tensors = tmp_path / "m" / "model.safetensors"
    for data in damaged(tensors.read_bytes()):
        tensors.write_bytes(data)
        assert survives(semid.load, tmp_path / "m") is None


def test_wrong_manifests(tmp_path):
    shutil.copytree(V1 / "bundle", tmp_path / "b")
    file = tmp_path / "b" / "manifest-000002.json"
    valid = file.read_bytes()
    bundle = CatalogueBundle(tmp_path / "b")
    before = bundle.read()
    for document in altered(json.loads(valid)):
        file.write_text(json.dumps(document))
        read = survives(bundle.read)
        assert read is None or same(read, before)
    for data in damaged(valid):
        file.write_bytes(data)
        survives(bundle.read)


@pytest.mark.parametrize("name", ["/etc/passwd", "../b/parts/x.parquet", "parts/../x", "C:\\x"])
def test_manifests_name_files_of_their_bundle_alone(tmp_path, name):
    shutil.copytree(V1 / "bundle", tmp_path / "b")
    file = tmp_path / "b" / "manifest-000002.json"
    document = json.loads(file.read_text())
    document["parts"][0]["file"] = name
    file.write_text(json.dumps(document))
    with pytest.raises(ArtefactError, match="no file of this bundle"):
        CatalogueBundle(tmp_path / "b").read()


def test_wrong_metadata_of_ids():
    table = pq.read_table(V1 / "ids.parquet")
    document = json.loads(table.schema.metadata[b"semid"])
    for changed in altered(document):
        read = survives(
            SemanticIds.from_arrow,
            table.replace_schema_metadata({b"semid": json.dumps(changed).encode()}),
        )
        assert read is None or np.array_equal(read.codes, SemanticIds.from_arrow(table).codes)
    with pytest.raises(ArtefactError, match="nested too deeply"):
        SemanticIds.from_arrow(table.replace_schema_metadata({b"semid": DEEP}))


@pytest.mark.parametrize("read", [read_recipe, read_experiment])
def test_wrong_recipes(tmp_path, read):
    file = tmp_path / "r.toml"
    texts = [b"\xff", b"a = " + DEEP, b"tokenizer = 3", b"tokenizer = [", b"paper = 1", b""]
    for data in texts:
        file.write_bytes(data)
        with pytest.raises(UsageError):
            read(file)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"levels": "3"}, "levels='3' .str.: give a whole number"),
        ({"levels": 10**9}, "levels=1000000000: give 1 to 256"),
        ({"seed": float("inf")}, "seed=inf: give a whole number"),
        ({"network": {"hiden": [4]}}, "did you mean 'hidden'"),
        ({"network": {"hidden": ["4"]}}, r"hidden=\['4'\]"),
        ({"training": 3}, "training=3 .int.: give TrainOptions or a mapping"),
        ({"normalize": 1}, "normalize=1 .int.: give True or False"),
    ],
)
def test_wrong_values_of_recipes(values, said):
    with pytest.raises(UsageError, match=said):
        make_tokenizer("rqvae", values)


def test_recipes_keep_the_defaults_of_their_tokenizer():
    objective = make_tokenizer("barq", {"objective.temperature": 0.1}).settings["objective"]
    assert (objective["temperature"], objective["contrastive_weight"]) == (0.1, 1.0)


def test_wrong_hugging_face_folders(tmp_path):
    tokenizer = drawn_tokenizer()
    export("huggingface", tmp_path / "h", ids=tokenizer.encode(rows()), tokenizer=tokenizer)
    file = tmp_path / "h" / "added_tokens.json"
    valid = file.read_bytes()
    whole = HuggingFaceExport.read(tmp_path / "h")
    for document in altered(json.loads(valid)):
        file.write_text(json.dumps(document))
        export_read = survives(HuggingFaceExport.read, tmp_path / "h")
        # Only another text of a token can be read: shapes, types and fingerprint are checked.
        assert export_read is None or list(map(len, export_read.tokens)) == [
            len(level) for level in whole.tokens
        ]
        assert export_read is None or same(export_read.ids, whole.ids)
    for data in damaged(valid):
        file.write_bytes(data)
        export_read = survives(HuggingFaceExport.read, tmp_path / "h")
        assert export_read is None or same(export_read.ids, whole.ids)
    file.write_bytes(DEEP)
    assert survives(HuggingFaceExport.read, tmp_path / "h") is None


# Memory ---------------------------------------------------------------------------------------

HUGE = {
    "rqkmeans": {("settings", "levels"): 10**9, ("dim",): 10**12, ("codebook_sizes", 0): 10**12},
    "rqvae": {
        ("settings", "network", "hidden"): [20_000, 20_000],
        ("settings", "network", "latent"): 10**9,
        ("settings", "codebook_size"): [2**31, 2**31],
    },
    "head": {("levels",): 10**9},
    "ranker": {
        ("architecture", "options", "hidden"): [50_000, 50_000],
        ("architecture", "width"): 10**9,
        ("schema", "history"): 10**9,
        ("schema", "id_size"): 10**12,
        ("codes", "sizes"): [10**12, 5, 5],
        ("architecture", "model"): "dcnv2",
    },
}


@pytest.mark.parametrize(
    ("name", "path"), [(name, path) for name in HUGE for path in HUGE[name]], ids=str
)
def test_sizes_that_a_config_declares_take_no_memory(name, path, tmp_path):
    shutil.copytree(V1 / name, tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    document = inner = json.loads(file.read_text())
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = HUGE[name][path]
    if path[-1] == "model":
        document["architecture"]["options"] = {"layers": 10**9}
    file.write_text(json.dumps(document))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtefactError):
        semid.load(tmp_path / "m")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


# Tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex64])
def test_tensors_of_types_that_numpy_lacks(dtype, tmp_path):
    drawn_tokenizer().save(tmp_path / "m")
    try:
        tensors = {"codebooks.0": torch.zeros(4, 6).to(dtype)}
        save_file(tensors, tmp_path / "m" / "model.safetensors")
    except KeyError:
        pytest.skip(f"this version of safetensors writes no {dtype}")
    with pytest.raises(ArtefactError, match="holds"):
        semid.load(tmp_path / "m")


def test_tensors_that_are_not_finite(tmp_path):
    tokenizer = drawn_tokenizer()
    tokenizer.save(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    tensors = tokenizer._tensors()
    tensors["codebooks.0"] = np.full((4, 6), np.nan, np.float32)
    del config["tensors"], config["tensors_fingerprint"], config[CHECKSUM]
    write_artefact(tmp_path / "n", config=config, tensors=tensors, card="")
    with pytest.raises(ArtefactError, match="NaN"):
        semid.load(tmp_path / "n")


def test_scalars_keep_their_shape_and_fingerprint(tmp_path):
    tensors = {"scale": np.array(2.0, np.float32)}
    write_artefact(tmp_path / "m", config={"kind": "k"}, tensors=tensors, card="")
    document = json.loads((tmp_path / "m" / "config.json").read_text())
    assert document["tensors"] == {"scale": []}
    assert document["tensors_fingerprint"] == fingerprint(tensors)


@pytest.mark.parametrize("shape", ["(-3, 4)", "(2.0, 4)", "(True, 4)", "('a', 4)", "(" * 5000])
def test_npy_headers(tmp_path, shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    (tmp_path / "x.npy").write_bytes(data)
    with pytest.raises(SemidError, match=r"\.npy file"):
        semid.open_embeddings(tmp_path / "x.npy")


# Codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "codes",
    [
        np.array([[2**32, 5]]),
        np.array([[-1, 5]]),
        np.array([[65_536, 5]]),
        np.array([[2**63, 5]], np.uint64),
        np.array([[0.5, 5.0]]),
        np.array([[1, 5]], complex),
        np.array([[True, False]]),
        np.array([[1, None]], object),
    ],
)
def test_what_is_no_code_is_refused(codes, tmp_path):
    with pytest.raises(InputError):
        ids_of(codes)
    with pytest.raises(InputError):
        drawn_tokenizer().decode(codes)
    if codes.dtype.kind in "iufcb":
        for array in (codes, codes.T):
            with np.errstate(all="ignore"):
                torch.save(torch.from_numpy(array.copy()), tmp_path / "t.pt")
            with pytest.raises(SemidError):
                import_ids("grid", tmp_path / "t.pt", tokenizer=drawn_tokenizer())


def parquet_of(codes: pa.Array) -> pa.Table:
    columns = {"item_id": NAMES[: len(codes)], "codes": codes, "residual_norm": [0.0] * len(codes)}
    return pa.table(columns).replace_schema_metadata(INFO.to_metadata())


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        (pa.array([[1, 2], [1, None]]), "nulls"),
        (pa.array([[1, 2], None]), "nulls"),
        (pa.array([[1, 2, 3], [1]]), r"lists of \[1, 3\]"),
        (pa.array([[1.0, 2.0]]), "lists of integers"),
        (pa.array([["1", "2"]]), "lists of integers"),
        (pa.array([12]), "lists of integers"),
        (pa.array([[2**32, 2]]), "level 0 of codes holds code 4294967296"),
        (pa.array([[-1, 2]]), "level 0 of codes holds code -1"),
    ],
)
def test_codes_in_parquet(codes, said):
    with pytest.raises(SemidError, match=said):
        SemanticIds.from_arrow(parquet_of(codes))
    assert SemanticIds.from_arrow(parquet_of(pa.array([[1, 2]]))).codes.tolist() == [[1, 2]]


# Bundles --------------------------------------------------------------------------------------


TYPES = {
    "string": pa.array(NAMES),
    "large": pa.array(NAMES, pa.large_string()),
    "category": pa.array(NAMES).dictionary_encode(),
    "int32": pa.array(range(40), pa.int32()),
    "int64": pa.array(range(40)),
    "digits": pa.array([str(n) for n in range(40)]),
}


@pytest.mark.parametrize("first", TYPES)
@pytest.mark.parametrize("second", TYPES)
def test_item_types_of_versions(first, second, tmp_path):
    """A version is either written and read, or refused before it is written."""
    tokenizer, x = drawn_tokenizer(), rows(40)
    one, two = TYPES[first].slice(0, 20), TYPES[second].slice(20)
    bundle = CatalogueBundle.create(tmp_path / "b", tokenizer.encode(x[:20], ids=ItemIds(one)))

    def grow(begin: int) -> SemanticIds:
        new = x[20 + begin : 30 + begin]
        ids = ItemIds(two.slice(begin, 10))
        bundle.append(add_items(bundle.read(), tokenizer, new, ids=ids).ids)
        return bundle.read()

    if "int" in first and second in ("string", "large", "category"):
        with pytest.raises(IdsError, match="give both the same type"):
            grow(0)
        assert bundle.versions() == [1]
        return
    grow(0)
    grow(10)
    read = CatalogueBundle(tmp_path / "b").read()
    assert [read.items[n] for n in range(40)] == [str(v) for v in (*one.tolist(), *two.tolist())]
    assert np.array_equal(read.codes, tokenizer.encode(x).codes)


def test_ids_keep_their_text_in_another_type():
    with pytest.raises(IdsError, match="'007' would change"):
        add_items(
            drawn_tokenizer().encode(rows(5)), drawn_tokenizer(), rows(1), ids=ItemIds(["007"])
        )


def test_a_folder_of_ids_with_different_item_types(tmp_path):
    codes = np.array([[0, 7], [3, 1]])
    (tmp_path / "ids").mkdir()
    for number, name in enumerate(("string", "category", "large")):
        part = ids_of(codes, TYPES[name].slice(2 * number, 2))
        part.write(tmp_path / "ids" / f"part-{number}.parquet")
    assert SemanticIds.read(tmp_path / "ids").items.strings().to_pylist() == NAMES[:6]


# Imports --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"0": ["<a_99999999999999999999>"]}', "number below 2"),
        ('{"0": ["<a_4294967296>"]}', "below 2"),
        ('{"0": "<a_1>|<b_2>"}', "'<b_NUMBER>' is expected"),
        ('{"0": 7}', "a list of tokens"),
        ('{"0": ["<a_\\u0661>"]}', "'<a_NUMBER>'"),
        ('{"0": ["<a_1>"], "0": ["<a_2>"]}', "occurs twice"),
        ('{"0": [Infinity]}', "not a number of JSON"),
        ('{"0": ["\\ud800"]}', "surrogate"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_lcrec(text, said, tmp_path):
    (tmp_path / "x.json").write_text(text, encoding="utf8")
    with pytest.raises(SemidError, match=said):
        import_ids("lcrec", tmp_path / "x.json")


def test_lcrec_ids_in_one_text(tmp_path):
    (tmp_path / "x.json").write_text('{"0": "<a_1><b_2>", "1": "<a_1><b_3>"}')
    assert import_ids("lcrec", tmp_path / "x.json").codes.tolist() == [[1, 2], [1, 3]]


def test_the_sides_of_a_grid_tensor(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    codes = torch.randint(0, 4, (12_101, 3), generator=torch.Generator().manual_seed(0))
    for tensor in (codes, codes.T.contiguous()):
        torch.save(tensor, tmp_path / "t.pt")
        caplog.clear()
        assert np.array_equal(import_ids("grid", tmp_path / "t.pt").codes, codes.numpy())
        assert "12101 items with 3 codes each" in caplog.text
        assert "--orientation" in caplog.text
    caplog.clear()
    few = codes[:2]  # two items with three codes: only the model or the ids can tell
    torch.save(few, tmp_path / "t.pt")
    model = drawn_tokenizer(sizes=(4, 4, 4))
    assert np.array_equal(import_ids("grid", tmp_path / "t.pt", tokenizer=model).codes, few)
    assert np.array_equal(import_ids("grid", tmp_path / "t.pt", items=["x", "y"]).codes, few)
    read = import_ids("grid", tmp_path / "t.pt", orientation="items-first")
    assert np.array_equal(read.codes, few)
    assert not caplog.text
    with pytest.raises(UsageError, match="'levels-first', 'items-first'"):
        import_ids("grid", tmp_path / "t.pt", orientation="sideways")
    assert np.array_equal(
        import_ids("auto", tmp_path / "t.pt", orientation="items-first").codes, few
    )
    with pytest.raises(UsageError, match="does not apply to lcrec"):
        import_ids("lcrec", tmp_path / "t.pt", orientation="items-first")


@pytest.mark.parametrize("name", ["x.json", "x.npy", "x.csv", "own.parquet"])
def test_only_a_tensor_has_an_orientation(tmp_path, name):
    (tmp_path / "x.json").write_text('{"0": ["<a_1>", "<b_2>"]}')
    np.save(tmp_path / "x.npy", np.ones((3, 2), np.int64))
    (tmp_path / "x.csv").write_text("item_id,codes\na,1 2\n")
    import_ids("lcrec", tmp_path / "x.json").write(tmp_path / "own.parquet")
    import_ids("auto", tmp_path / name)
    with pytest.raises(UsageError, match=f"does not apply to '.*{name}'; leave it out"):
        import_ids("auto", tmp_path / name, orientation="levels-first")


def test_wrong_grid_files(tmp_path):
    file = tmp_path / "t.pt"
    torch.save(torch.arange(12).reshape(3, 4) % 3, file)
    valid = file.read_bytes()
    before = import_ids("grid", file).codes
    for data in (*damaged(valid), b"0 1 2\n3 4 5\n"):
        file.write_bytes(data)
        read = survives(import_ids, "grid", file)
        assert read is None or np.array_equal(read.codes, before)
    strange = [
        torch.zeros(1, dtype=torch.int64).expand(3, 10**12),
        torch.zeros(3, 4, dtype=torch.bool),
        torch.zeros(3, 4, dtype=torch.complex64),
        torch.eye(3).to(torch.int64).to_sparse(),
        {"codes": torch.zeros(3, 4)},
        Path("pickled"),
    ]
    for value in strange:
        torch.save(value, file)
        with pytest.raises(ArtefactError):
            import_ids("grid", file)


# Releases -------------------------------------------------------------------------------------

REVIEW = {"reviewerID": "u", "asin": "i", "overall": 5.0, "unixReviewTime": 1}


def test_wrong_amazon_reviews(tmp_path):
    file = tmp_path / "r.json"
    for document in altered(REVIEW):
        file.write_text(json.dumps(document) + "\n")
        survives(lambda: read_amazon(file, core=0))
    for line in (DEEP, b"\xff", b'{"reviewerID": "\\ud800", "asin": "i"}', b"(" * 5000):
        file.write_bytes(line + b"\n")
        with pytest.raises(InputError):
            read_amazon(file, core=0)
    for name, value in (("overall", float("nan")), ("unixReviewTime", float("inf"))):
        file.write_text(json.dumps({**REVIEW, name: value}))
        with pytest.raises(InputError, match="line 1 "):
            read_amazon(file, core=0)
    file.write_text(json.dumps({**REVIEW, "reviewerID": None}))
    with pytest.raises(InputError, match="holds the id None"):
        read_amazon(file, core=0)
    packed = gzip.compress((json.dumps(REVIEW) + "\n").encode() * 500)
    (tmp_path / "r.json.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match="download it again"):
        read_amazon(tmp_path / "r.json.gz", core=0)
    file.write_text(json.dumps(REVIEW))
    described = {"asin": "i", "title": "t", "brand": "b", "categories": [["a", "b"]]}
    for document in altered(described):
        (tmp_path / "meta.json").write_text(json.dumps(document))
        survives(lambda: read_amazon(file, items=tmp_path / "meta.json", core=0))


def test_wrong_movielens(tmp_path):
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n1,A,x\n")
    ratings = tmp_path / "ratings.csv"
    head = b"userId,movieId,rating,timestamp\n"
    ratings.write_bytes(head + b"1,1,4.0,10\n\n")
    assert len(read_movielens(tmp_path).interactions) == 1
    for line in (b"1,1,nan,10", b"1,1,4.0,1" + b"0" * 30, b"1,1,x,1", b"\xff,1,1,1", b",1,1,1"):
        ratings.write_bytes(head + line + b"\n")
        with pytest.raises(InputError):
            read_movielens(tmp_path)


# The program ----------------------------------------------------------------------------------


def test_category_ids_in_a_bundle(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    x = rows(40)
    drawn_tokenizer().save("m")
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), x.shape[1])
    table = pa.table({"item_id": TYPES["category"], "embedding": embeddings})
    for day, (start, count) in enumerate(((0, 20), (20, 10), (30, 10))):
        pq.write_table(table.slice(start, count), f"day{day}.parquet")
    assert run("encode", "m", "day0.parquet", "-o", "ids.parquet", "-q") == 0
    catalogue = "ids.parquet"
    for day in (1, 2):
        given = ("--catalogue", catalogue, "-o", "pub", "-q")
        assert run("encode", "m", f"day{day}.parquet", *given) == 0
        catalogue = "pub"
    assert run("export", "pub", "--to", "lcrec", "-o", "p.json") == 0
    assert np.array_equal(import_ids("lcrec", "p.json").codes, drawn_tokenizer().encode(x).codes)


def test_imports_say_what_they_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(torch.zeros(30, 3, dtype=torch.int64), "g.pt")
    assert run("import", "g.pt", "--from", "grid", "-o", "i.parquet") == 0
    printed = capsys.readouterr()
    assert "imported 30 items with 3 codes each" in printed.out
    assert "--orientation levels-first" in printed.err
    again = ("--orientation", "levels-first", "-o", "j.parquet")
    assert run("import", "g.pt", "--from", "grid", *again) == 0
    printed = capsys.readouterr()
    assert "imported 3 items with 30 codes each" in printed.out
    assert not printed.err
    Path("h.json").write_text('{"0": ["<a_99999999999999999999>"]}')
    assert run("import", "h.json", "--from", "lcrec", "-o", "k.parquet") == 1
    assert "number below 2**32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "encode {} x.npy -o out.parquet",
        "encode {} parts --processes 1 -o out",
        "report {} x.npy -o out.html",
        "compare {} {}2 x.npy -o out.html",
        "refine {} x.npy -o out",
        "refresh {} x.npy --catalogue ids.parquet -o out",
        "drift {} x.npy x.npy",
        "unique ids.parquet --method reassign --model {} --embeddings x.npy -o out.parquet",
        "import lcrec.json --from lcrec --model {} -o out.parquet",
        "export --to onnx --model {} -o out.onnx",
    ],
)
def test_a_model_that_gives_no_codes(command, tmp_path, monkeypatch, capsys):
    """Where a tokenizer is needed, a ranking model or a decode head is refused by name."""
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(60, 4)).astype("f4")
    np.save("x.npy", x)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), 4)
    Path("parts").mkdir()
    pq.write_table(pa.table({"embedding": vectors}), "parts/a.parquet")
    ids = semid.RQKMeans(levels=2, codebook_size=4).fit(x).encode(x)
    ids.write("ids.parquet")
    export("lcrec", "lcrec.json", ids=ids)
    for name in ("head", "head2"):
        shutil.copytree(V1 / "head", name)
    assert run(*command.format("head", "head").split()) == 1
    error = capsys.readouterr().err
    assert "'head' holds a DecodeHead" in error, error
