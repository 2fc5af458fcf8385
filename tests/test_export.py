"""Exports: each read back, by its own consumer where that can be installed."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import semid
from catalogue_cases import drawn_neural, drawn_tokenizer, parallel_tokenizer, rows
from cli_cases import run
from semid.catalogue.uniqueness import make_unique
from semid.codes import SemanticIds
from semid.data.ids import ItemIds
from semid.errors import (
    ArtefactError,
    FingerprintError,
    InputError,
    InteractionsError,
    OutputExistsError,
    UsageError,
)
from semid.exports.encoders import CodesGraph
from semid.exports.formats import EXPORTS, export, import_ids
from semid.exports.id_files import level_letter, parse_text, sid_text
from semid.exports.sequences import crc32c

NAMES = [f"item-{n}" for n in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    return drawn_tokenizer(sizes=(4, 8, 8))


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.encode(rows(), ids=ItemIds(NAMES))


@pytest.fixture(scope="module")
def appended(ids):
    return make_unique(ids).ids


def test_letters_go_past_e():
    assert [level_letter(n) for n in (0, 4, 5, 25, 26, 27, 701, 702)] == [
        "a", "e", "f", "z", "aa", "ab", "zz", "aaa",
    ]  # fmt: skip


def test_lcrec_round_trip(ids, appended, tokenizer, tmp_path):
    for name, given in (("plain", ids), ("unique", appended)):
        path = export("lcrec", tmp_path / f"{name}.index.json", ids=given)
        document = json.loads(path.read_text())
        assert list(document) == [str(n) for n in range(60)]
        first = zip("abcd", given.codes[0].tolist(), strict=False)
        assert document["0"] == [f"<{letter}_{code}>" for letter, code in first]
        back = import_ids("lcrec", path, items=NAMES, tokenizer=tokenizer)
        assert np.array_equal(back.codes, given.codes)
        assert back.items == given.items
        assert np.array_equal(back.encoded, ids.codes)
        back.check_codebook(tokenizer.codebook_fingerprint)
    alone = import_ids("lcrec", path)
    assert np.array_equal(alone.codes, appended.codes)
    with pytest.raises(FingerprintError):
        alone.check_codebook(tokenizer.codebook_fingerprint)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "row numbers"),
        ("{", "JSON"),
        ('{"1": ["<a_1>"]}', "row '0'"),
        ('{"0": ["<b_1>"]}', "'<a_NUMBER>'"),
        ('{"0": ["<a_1>", "<b_2>"], "1": ["<a_1>"]}', "row '1' has 1 tokens"),
        ('{"0": []}', "at least one"),
    ],
)
def test_lcrec_refuses_other_files(text, said, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ArtefactError, match=said):
        import_ids("lcrec", tmp_path / "x.json")


def test_grid_round_trip(ids, appended, tokenizer, tmp_path):
    for name, given in (("plain", ids), ("unique", appended)):
        path = export("grid", tmp_path / f"{name}.pt", ids=given)
        tensor = torch.load(path, weights_only=True)
        assert tensor.dtype == torch.int64
        assert tensor.shape == (given.levels, 60)
        back = import_ids("grid", path, items=ItemIds(NAMES), tokenizer=tokenizer)
        assert np.array_equal(back.codes, given.codes)
    torch.save({"a": 1}, tmp_path / "dict.pt")
    (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:100])
    for name in ("dict.pt", "cut.pt", "missing.pt"):
        with pytest.raises(ArtefactError, match=name):
            import_ids("grid", tmp_path / name)
    with pytest.raises(InputError, match="3 item ids for 60 rows"):
        import_ids("grid", path, items=["a", "b", "c"])
    with pytest.raises(InputError):
        import_ids("grid", path, tokenizer=drawn_tokenizer(sizes=(2, 2, 2)))


def test_openonerec_round_trip(ids, tmp_path):
    numbered = SemanticIds(
        ItemIds([str(7 * n) for n in range(60)]), ids.codes, ids.residual_norms, ids.info
    )
    export("openonerec", tmp_path / "numbers", ids=numbered)
    table = pq.read_table(tmp_path / "numbers" / "pid_codes.parquet")
    assert table.column_names == ["pid", "codes"]
    assert table["pid"].to_pylist() == [7 * n for n in range(60)]
    assert table["codes"].to_pylist() == ids.codes.tolist()
    texts = pq.read_table(tmp_path / "numbers" / "sid_text.parquet")["sid"].to_pylist()
    assert [parse_text(text) for text in texts] == ids.codes.tolist()
    assert sid_text((1, 2, 3)) == "<|sid_begin|><s_a_1><s_b_2><s_c_3><|sid_end|>"
    with pytest.raises(InputError, match="is not an id"):
        parse_text("<|sid_begin|><s_b_1><|sid_end|>")
    padded = ItemIds([f"{n:03d}" for n in range(60)])  # "007" is another id than "7"
    renamed = SemanticIds(padded, ids.codes, ids.residual_norms, ids.info)
    export("openonerec", tmp_path / "padded", ids=renamed)
    table = pq.read_table(tmp_path / "padded" / "pid_codes.parquet")
    assert table["item_id"].to_pylist() == [f"{n:03d}" for n in range(60)]
    export("openonerec", tmp_path / "names", ids=ids)
    table = pq.read_table(tmp_path / "names" / "pid_codes.parquet")
    assert table["pid"].to_pylist() == list(range(60))
    assert table["item_id"].to_pylist() == NAMES


def test_torcheasyrec_round_trip_with_candidates(ids, tokenizer, tmp_path):
    x = rows()
    export(
        "torcheasyrec", tmp_path / "t.parquet", ids=ids, tokenizer=tokenizer, embeddings=x,
        embedding_ids=ItemIds(NAMES), candidates=3,
    )  # fmt: skip
    table = pq.read_table(tmp_path / "t.parquet")
    assert table["codes"].to_pylist() == ids.codes.tolist()
    flat = np.array(table["candidate_codes"].to_pylist())  # as its tools read it: no nested lists
    assert flat.shape == (60, 3 * 3)
    candidates = flat.reshape(60, 3, 3)
    assert np.array_equal(candidates[:, 0], ids.codes)
    left = [
        np.linalg.norm(x - tokenizer.quantize(candidates[:, place]), axis=1) for place in range(3)
    ]
    assert (left[0] <= left[1]).all()
    assert (left[1] <= left[2]).all()
    export("torcheasyrec", tmp_path / "plain.parquet", ids=ids)
    assert pq.read_table(tmp_path / "plain.parquet").column_names == ["item_id", "codes"]
    with pytest.raises(UsageError, match="--embeddings"):
        export("torcheasyrec", tmp_path / "no.parquet", ids=ids, candidates=2)


def test_fuxictr_table_and_yaml(ids, tmp_path):
    export("fuxictr", tmp_path / "f", ids=ids)
    table = pq.read_table(tmp_path / "f" / "items.parquet").to_pydict()
    assert np.array_equal(np.stack([table[f"sid_{n}"] for n in (1, 2, 3)], axis=1), ids.codes)
    for depth in (2, 3):
        numbers = np.array(table[f"sid_prefix_{depth}"])
        same_number = numbers[:, None] == numbers[None]
        same_prefix = (ids.codes[:, None, :depth] == ids.codes[None, :, :depth]).all(-1)
        assert np.array_equal(same_number, same_prefix)
    text = (tmp_path / "f" / "feature_cols.yaml").read_text()
    yaml = pytest.importorskip(
        "yaml", reason="reading the snippet as FuxiCTR does: pip install pyyaml"
    )
    columns = yaml.safe_load(text)["feature_cols"]
    assert [column["name"] for column in columns] == [c for c in table if c != "item_id"]
    assert all(column["type"] == "categorical" and column["active"] for column in columns)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the consumer and what it imports
def test_fuxictr_reads_table_and_yaml(ids, tmp_path):
    pytest.importorskip("fuxictr", reason="pip install fuxictr")
    yaml = pytest.importorskip("yaml", reason="pip install pyyaml")
    processors = pytest.importorskip(
        "fuxictr.preprocess", reason="fuxictr lacks what it depends on", exc_type=ImportError
    )
    export("fuxictr", tmp_path / "f", ids=ids)
    table = pq.read_table(tmp_path / "f" / "items.parquet")
    labels = pa.array([n % 2 for n in range(60)], pa.float32())
    pq.write_table(table.append_column("label", labels), tmp_path / "samples.parquet")
    columns = yaml.safe_load((tmp_path / "f" / "feature_cols.yaml").read_text())["feature_cols"]
    processor = processors.FeatureProcessor(
        feature_cols=columns,
        label_col={"name": "label", "dtype": "float"},
        dataset_id="sids",
        data_root=str(tmp_path),
    )
    lazy = processor.preprocess(
        processor.read_data(str(tmp_path / "samples.parquet"), data_format="parquet")
    )
    processor.fit(lazy, min_categr_count=1)
    found = processor.transform(lazy.collect().to_pandas())
    read = processors.FeatureMap("sids", str(tmp_path / "sids"))
    read.load(processor.json_file, {})
    assert list(read.features) == [column["name"] for column in columns]
    for name, spec in read.features.items():
        ours, theirs = table[name].to_numpy(), np.asarray(found[name])
        assert spec["vocab_size"] == len(np.unique(ours)) + 2  # padding and the unknown
        assert np.array_equal(ours[:, None] == ours, theirs[:, None] == theirs)


def test_faiss_index_holds_equal_codes(ids, tokenizer, tmp_path):
    faiss = pytest.importorskip("faiss", reason="pip install faiss-cpu")
    path = export("faiss", tmp_path / "i.faiss", ids=ids, tokenizer=tokenizer)
    index = faiss.read_index(str(path))
    bits = np.array([2, 3, 3], dtype=np.int32)
    assert index.ntotal == 60
    x = rows()
    computed = faiss.unpack_bitstrings(index.rq.compute_codes(x), bits)
    assert np.array_equal(computed, ids.codes)
    np.testing.assert_allclose(
        index.reconstruct_n(0, 60), tokenizer.decode(ids), rtol=1e-5, atol=1e-5
    )
    _, found = index.search(tokenizer.decode(ids), 1)
    assert np.array_equal(ids.codes[found[:, 0]], ids.codes)
    odd = drawn_tokenizer(sizes=(4, 6))
    with pytest.raises(UsageError, match="powers of two"):
        export("faiss", tmp_path / "odd", ids=odd.encode(x), tokenizer=odd)
    side = parallel_tokenizer()
    with pytest.raises(UsageError, match="parallel"):
        export("faiss", tmp_path / "odd", ids=side.encode(x), tokenizer=side)
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["i.faiss"]


TOKENIZERS = {
    "greedy": lambda: drawn_tokenizer(sizes=(4, 8, 8)),
    "prepared": lambda: prepared(),
    "beam": lambda: beam(),
    "parallel": lambda: parallel_tokenizer(),
    "rqpvae": lambda: drawn_neural(semid.RQPVAE),
    "rqpvae-fused": lambda: drawn_neural(semid.RQPVAE, inputs=(4, 2), center=True, beam_width=2),
    "mocvae": lambda: drawn_neural(semid.MoCVAE, normalize=True),
    "mocvae-maps": lambda: drawn_neural(semid.MoCVAE, projection=True),
    "drqvae": lambda: drawn_neural(semid.DRQVAE),
}


def prepared():
    tokenizer = drawn_tokenizer(sizes=(8, 8))
    tokenizer.center = tokenizer.normalize = True
    tokenizer._set_tensors(
        {**tokenizer._tensors(), "preprocess.mean": np.full(6, 0.25, np.float32)}
    )
    return tokenizer


def beam():
    tokenizer = drawn_tokenizer(sizes=(8, 8, 8))
    tokenizer.beam_width = 4
    return tokenizer


def check_codes(codes: np.ndarray, tokenizer, x: np.ndarray) -> None:
    """Equal to those of `encode`, but where two codewords are equally near to float32 rounding."""
    expected = tokenizer.encode(x).codes
    other = np.flatnonzero((codes != expected).any(axis=1))
    assert len(other) <= 0.01 * len(x)
    for row in other:
        level = int(np.argmax(codes[row] != expected[row]))
        assert tokenizer.hierarchical
        assert tokenizer.beam_width == 1
        left = tokenizer.latent(x[[row]])[0].astype(np.float64)
        for before in range(level):
            left -= tokenizer.codebooks[before][codes[row, before]]
        book = tokenizer.codebooks[level]
        near = [np.linalg.norm(left - book[c[row, level]]) for c in (codes, expected)]
        assert abs(near[0] - near[1]) < 1e-5 * near[0]


@pytest.mark.parametrize("make", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_graph_gives_the_codes_of_encode(make):
    tokenizer, x = make(), rows(500, seed=4)
    check_codes(CodesGraph(tokenizer)(torch.from_numpy(x)).numpy(), tokenizer, x)
    assert len(np.unique(tokenizer.encode(x).codes, axis=0)) > 8  # the codes say something


EXPORTED = ["prepared", "beam", "rqpvae-fused", "mocvae-maps", "drqvae"]


@pytest.mark.parametrize("name", EXPORTED)
def test_torch_export_round_trip(name, tmp_path):
    tokenizer, x = TOKENIZERS[name](), rows(90, seed=4)
    path = export("torch-export", tmp_path / "encoder.pt2", tokenizer=tokenizer)
    program = torch.export.load(path).module()
    for batch in (1, 5, 90):
        check_codes(program(torch.from_numpy(x[:batch])).numpy(), tokenizer, x[:batch])


# Every graph is traced above; ONNX costs a minute each, so one with and one without a network.
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("prepared", "drqvae") else pytest.param(name, marks=pytest.mark.slow)
        for name in EXPORTED
    ],
)
def test_onnx_round_trip(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="pip install 'semid[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'semid[onnx]'")
    tokenizer, x = TOKENIZERS[name](), rows(90, seed=4)
    path = export("onnx", tmp_path / "encoder.onnx", tokenizer=tokenizer)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["embeddings"]
    for batch in (1, 5, 90):
        (codes,) = session.run(["codes"], {"embeddings": x[:batch]})
        check_codes(codes, tokenizer, x[:batch])
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["encoder.onnx"]


def test_a_tokenizer_joins_by_its_encoder_module(tmp_path):
    class Own(type(drawn_tokenizer())):
        def encoder_module(self):
            return torch.nn.Sequential(torch.nn.Identity())

    tokenizer = drawn_tokenizer()
    tokenizer.__class__ = Own
    codes = CodesGraph(tokenizer)(torch.from_numpy(rows())).numpy()
    assert np.array_equal(codes, tokenizer.encode(rows()).codes)


def test_huggingface_in_a_model(appended, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'semid[transformers]'")
    tokenizers = pytest.importorskip("tokenizers")
    from semid.exports.huggingface import HuggingFaceExport

    export("huggingface", tmp_path / "hf", ids=appended, tokenizer=tokenizer)
    read = HuggingFaceExport.read(tmp_path / "hf")
    words = {"[PAD]": 0, "[EOS]": 1, "buy": 2, "next": 3, "[UNK]": 4}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]")),
        pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]",
    )  # fmt: skip
    fast.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    config = transformers.LlamaConfig(
        vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    token_ids = read.add_tokens(fast, model)
    text = f"buy {read.text('item-7')} next {read.text('item-8')}"
    sid = [[token_ids[n][c] for n, c in enumerate(appended.codes[r])] for r in (7, 8)]
    assert fast(text)["input_ids"] == [2, *sid[0], 3, *sid[1]]
    assert fast(read.text(["item-8", "item-7"]))["input_ids"] == [*sid[1], *sid[0]]
    before = model.get_input_embeddings().weight.detach().clone()
    read.initialize(model, token_ids)
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[:5], before[:5])
    rows_ = after[torch.tensor(token_ids[1])].double()
    book = torch.from_numpy(tokenizer.codebooks[1]).double()
    ours, theirs = torch.cdist(rows_, rows_).ravel(), torch.cdist(book, book).ravel()
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.7
    untied = model.get_output_embeddings().weight.detach()
    assert not torch.equal(untied[torch.tensor(token_ids[1])], before[torch.tensor(token_ids[1])])
    prompt = torch.tensor([fast("buy next")["input_ids"]])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, num_beams=8,
        num_return_sequences=8,
        logits_processor=[read.processor(token_ids, prompt_length=2, end_token=1)],
    )  # fmt: skip
    known = {tuple(row) for row in appended.codes.tolist()}
    inverse = [{token: code for code, token in enumerate(level)} for level in token_ids]
    for row in out[:, 2:6].tolist():
        assert tuple(inverse[n][token] for n, token in enumerate(row)) in known
    # After a begin token, in prompts of two lengths; `buy` begins an id here.
    prompt = torch.tensor([[0, 3, 2], [3, 4, 2], [0, 0, 3], [0, 2, sid[0][0]]])
    processor = read.processor(token_ids, begin_token=2, end_token=1)
    out = model.generate(
        prompt, attention_mask=(prompt > 0).long(), max_new_tokens=4, do_sample=True,
        logits_processor=[processor],
    )  # fmt: skip
    written = processor.written(out)
    assert (read.index.leaves(written)[[0, 1, 3]] >= 0).all()
    assert written[3, 0] == appended.codes[7, 0]
    assert 2 in out[2, 3:] or (written[2] == -1).all()
    with pytest.raises(UsageError, match="add_tokens"):
        read.initialize(model, token_ids[:2])
    (tmp_path / "hf" / "added_tokens.json").unlink()
    with pytest.raises(ArtefactError, match="no Hugging Face export"):
        HuggingFaceExport.read(tmp_path / "hf")


@pytest.fixture(scope="module")
def log():
    """Return a log of eleven users with repeats, an unknown item and users that are too short."""
    generator = np.random.default_rng(4)
    users = [f"user {n}" for n in range(11) for _ in range(1 if n == 3 else n + 2)]
    items = [NAMES[row] for row in generator.integers(0, 60, len(users))]
    items[::7] = ["unheard of"] * len(items[::7])
    rows = {"user_id": users, "item_id": items, "timestamp": generator.permutation(len(users))}
    return pa.table(rows).take(generator.permutation(len(users)))


def histories_by_hand(log) -> dict[str, list[int]]:
    """Return the rows of the known items of each user with at least three, oldest first."""
    rows = sorted(log.to_pylist(), key=lambda row: row["timestamp"])
    expected: dict[str, list[int]] = {}
    for row in rows:
        if row["item_id"] in NAMES:
            expected.setdefault(row["user_id"], []).append(NAMES.index(row["item_id"]))
    return {user: items for user, items in expected.items() if len(items) >= 3}


def test_lcrec_sequences_round_trip(ids, log, tmp_path, caplog):
    path = export("lcrec-sequences", tmp_path / "Demo.inter.json", ids=ids, interactions=log)
    expected = histories_by_hand(log)
    assert 3 < len(expected) < 11
    assert json.loads(path.read_text()) == expected
    assert f"{11 - len(expected)} of 11 users have fewer than 3 interactions" in caplog.text
    # The numbers are the keys of the ids, so both files together give each history's tokens.
    export("lcrec", tmp_path / "Demo.index.json", ids=ids)
    index = json.loads((tmp_path / "Demo.index.json").read_text())
    user, rows_ = next(iter(expected.items()))
    assert ["".join(index[str(row)]) for row in json.loads(path.read_text())[user]] == [
        "".join(f"<{level_letter(n)}_{c}>" for n, c in enumerate(ids.codes[row])) for row in rows_
    ]
    # semid reads the histories again, and writes the same.
    numbered = SemanticIds(ItemIds.range(60), ids.codes, ids.residual_norms, ids.info)
    again = export("lcrec-sequences", tmp_path / "again.json", ids=numbered, interactions=path)
    assert json.loads(again.read_text()) == expected


def read_tfrecord(path):
    """Read a file of examples by means of others: gzip, and messages that protobuf parses."""
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name, **fields):
        entry = file.message_type.add(name=name)
        for field_name, (number, kind, type_name, label) in fields.items():
            declared = entry.field.add(name=field_name, number=number, type=kind, label=label)
            if type_name:
                declared.type_name = type_name
        return entry

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("Int64List", value=(1, field.TYPE_INT64, "", many))
    message("Feature", int64_list=(3, field.TYPE_MESSAGE, ".t.Int64List", one))
    features = message("Features", feature=(1, field.TYPE_MESSAGE, ".t.Features.Entry", many))
    entry = features.nested_type.add(name="Entry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=one)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, type_name=".t.Feature", label=one
    )
    message("Example", features=(1, field.TYPE_MESSAGE, ".t.Features", one))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    parser = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))
    data = gzip.decompress(path.read_bytes())
    examples = []
    while data:
        length = int.from_bytes(data[:8], "little")
        for content, checksum in (
            (data[:8], data[8:12]),
            (data[12 : 12 + length], data[12 + length : 16 + length]),
        ):
            unmasked = (int.from_bytes(checksum, "little") - 0xA282EAD8) % 2**32
            assert (unmasked >> 17 | unmasked << 15) % 2**32 == crc32c(content)
        parsed = parser.FromString(data[12 : 12 + length])
        lists = {name: list(f.int64_list.value) for name, f in parsed.features.feature.items()}
        examples.append(lists)
        data = data[16 + length :]
    return examples


def test_crc32c_of_known_answers():
    """RFC 3720, B.4."""
    assert crc32c(b"") == 0
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF] * 32)) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_grid_sequences_round_trip(ids, log, tmp_path):
    path = export("grid-sequences", tmp_path / "grid", ids=ids, interactions=log)
    expected = histories_by_hand(log)
    users = pq.read_table(path / "users.parquet").to_pylist()
    assert {row["user_id"] for row in users} == set(expected)
    names = {row["user"]: row["user_id"] for row in users}
    assert sorted(names) == list(range(len(expected)))
    for split, end in (("training", -2), ("evaluation", -1), ("testing", None)):
        files = sorted((path / split).iterdir())
        assert all(file.name.endswith(".tfrecord.gz") for file in files)
        examples = [example for file in files for example in read_tfrecord(file)]
        assert len(files) == len(examples) == len(expected)  # up to 64 files, none empty
        read = {names[example["user_id"][0]]: example["sequence_data"] for example in examples}
        assert read == {user: rows_[:end] for user, rows_ in expected.items()}
    # Columns of the tensor of ids, as GRID takes them: large rows need more than one byte.
    many = np.arange(70_000)
    wide = SemanticIds(
        ItemIds.range(70_000),
        np.stack([many % 300, many // 300], axis=1),
        np.zeros(70_000, np.float32),
        replace(ids.info, codebook_sizes=(300, 300)),
    )
    histories = {f"{user}": [user, 127 + user, 128, 16_384, 69_999] for user in range(130)}
    (tmp_path / "many.json").write_text(json.dumps(histories))
    path = export(
        "grid-sequences", tmp_path / "wide", ids=wide, interactions=tmp_path / "many.json"
    )
    files = sorted((path / "testing").iterdir())
    assert len(files) == 64
    assert [e["sequence_data"] for f in files for e in read_tfrecord(f)] == [*histories.values()]


def test_sequences_say_what_is_missing(ids, log, tmp_path):
    for name in ("lcrec-sequences", "grid-sequences"):
        with pytest.raises(UsageError, match="--interactions"):
            export(name, tmp_path / "x", ids=ids)
        with pytest.raises(InteractionsError, match="no order"):
            export(name, tmp_path / "x", ids=ids, interactions=log.drop(["timestamp"]))
        with pytest.raises(InteractionsError, match=r"none of the 2 users .* has 3 interactions"):
            short = {"user_id": ["a", "a", "b"], "item_id": NAMES[:3], "timestamp": [1, 2, 3]}
            export(name, tmp_path / "x", ids=ids, interactions=pa.table(short))
    with pytest.raises(UsageError, match=r"interactions=.* does not apply to lcrec"):
        export("lcrec", tmp_path / "x", ids=ids, interactions=log)
    assert not list(tmp_path.iterdir())


def test_sequences_on_the_command_line(ids, log, tmp_path, capsys):
    ids.write(tmp_path / "ids.parquet")
    pq.write_table(log.rename_columns(["who", "what", "when"]), tmp_path / "log.parquet")
    command = (
        f"export {tmp_path / 'ids.parquet'} --to lcrec-sequences -o {tmp_path / 'x.inter.json'} "
        f"--interactions {tmp_path / 'log.parquet'} --user-column who --item-column what"
    ).split()
    assert run(*command) == 1  # no order
    assert run(*command, "--time-column", "when") == 0
    assert json.loads((tmp_path / "x.inter.json").read_text()) == histories_by_hand(log)
    assert run(*command[:6], "--overwrite", "--ties", "file") == 2
    assert "--ties" in capsys.readouterr().err


def test_doors_are_guarded(ids, tokenizer, tmp_path, caplog):
    with pytest.raises(UsageError, match="did you mean 'lcrec'"):
        export("lcrek", tmp_path / "x", ids=ids)
    with pytest.raises(UsageError, match="--from"):
        import_ids("faiss", tmp_path / "x")
    with pytest.raises(UsageError, match="ids file"):
        export("lcrec", tmp_path / "x")
    for name in ("faiss", "huggingface", "onnx", "torch-export"):
        with pytest.raises(UsageError, match="--model"):
            export(name, tmp_path / "x", ids=ids)
    with pytest.raises(FingerprintError):
        export("faiss", tmp_path / "x", ids=ids, tokenizer=drawn_tokenizer(seed=5, sizes=(4, 8, 8)))
    for name in EXPORTS:
        (tmp_path / "there").write_text("precious")
        history = {"interactions": {}} if name.endswith("-sequences") else {}
        with pytest.raises(OutputExistsError, match="--overwrite"):
            export(name, tmp_path / "there", ids=ids, tokenizer=tokenizer, **history)
        assert (tmp_path / "there").read_text() == "precious"
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    export("lcrec", tmp_path / "dup.json", ids=ids)
    assert "semid unique" in caplog.text
    export("lcrec", tmp_path / "dup.json", ids=ids, overwrite=True)


def test_another_package_adds_a_format(ids, tmp_path, monkeypatch):
    (tmp_path / "outside_format.py").write_text(
        "from semid.exports.formats import ExportFormat\n"
        "def write(path, *, ids, header):\n"
        "    path.write_text(header + str(len(ids)))\n"
        "COUNT = ExportFormat(write, options=('header',))\n"
    )
    info = tmp_path / "outside_format-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside_format\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[semid.exports]\ncount = outside_format:COUNT\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "count" in EXPORTS
    path = export("count", tmp_path / "out.txt", ids=ids, header="n=")
    assert path.read_text() == f"n={len(ids)}"
    with pytest.raises(UsageError, match="did you mean 'header'"):
        export("count", tmp_path / "two.txt", ids=ids, heading="n=")
    with pytest.raises(UsageError, match="can be written, not read"):
        import_ids("count", path)
    with pytest.raises(UsageError, match="does not apply to grid"):
        export("grid", tmp_path / "two.txt", ids=ids, header="n=")
