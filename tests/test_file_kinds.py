"""Files of another kind than a reader reads: each is named, and the message says what to do."""

import bz2
import gzip
import io
import json
import shutil
import sqlite3

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
import torch

from cli_cases import run
from semid.data.embeddings import open_embeddings
from semid.data.files import HEAD_BYTES, recognize
from semid.data.interactions import read_interactions
from semid.data.items import load_ids, read_items
from semid.errors import EmbeddingError, IdsError, InteractionsError, UsageError

TABLE = pa.table({"user_id": ["u", "v"], "item_id": ["a", "b"]})
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = "<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def saved(save, array):
    file = io.BytesIO()
    save(file, array)
    return file.getvalue()


WRITERS = {
    "npy": lambda p: write(p, saved(np.save, np.ones((2, 2), np.float32))),
    "zip": lambda p: write(p, saved(np.savez, np.ones(2))),
    "torch": lambda p: torch.save(torch.ones(2), p),
    "pickle": lambda p: pd.to_pickle([1, 2], p, compression=None),
    "orc": lambda p: orc.write_table(TABLE, p),
    "sqlite": lambda p: sqlite3.connect(p).execute("create table t (a)").connection.close(),
    "gzip": lambda p: write(p, gzip.compress(b"user_id,item_id\nu,a\n")),
    "bzip2": lambda p: write(p, bz2.compress(b"user_id,item_id\nu,a\n")),
    "lfs": lambda p: write(p, LFS),
    "annex": lambda p: write(p, "/annex/objects/SHA256E-s10--4d7a.parquet\n"),
    "page": lambda p: write(p, PAGE),
    "access": lambda p: write(p, '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "jsonl": lambda p: write(p, '{"item_id": "a"}\n{"item_id": "b"}\n'),
    "json": lambda p: write(p, json.dumps({"0": ["<a_1>"]}, indent=1)),
    "list": lambda p: write(p, '["a", "b"]'),
    "utf16": lambda p: write(p, "a\nb\n".encode("utf-16")),
    "empty": lambda p: write(p, ""),
}
WORDS = {
    "npy": r"a NumPy array \(\.npy\)",
    "zip": "a zip archive",
    "torch": "a zip archive",
    "pickle": "a Python pickle, which is never loaded",
    "orc": r"an ORC file; convert it: .*orc\.read_table",
    "sqlite": "an SQLite database",
    "gzip": r"compressed with gzip; decompress it first, for example with: gunzip",
    "bzip2": r"compressed with bzip2; .*bunzip2",
    "lfs": "a Git LFS pointer, not the data; fetch the data with: git lfs pull",
    "annex": "a git-annex pointer, not the data; .*git annex get",
    "page": "a page of HTML or XML; .*download the file again",
    "access": "a page of HTML or XML; .*download the file again",
    "jsonl": r"JSON lines .*pyarrow\.json\.read_json",
    "json": r"JSON; convert it: pandas\.read_json",
    "list": r"JSON; convert it: pandas\.read_json",
    "utf16": "text in UTF-16; save it as UTF-8",
    "empty": r"empty",
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_reader_says_what_a_file_is(kind, tmp_path):
    path = tmp_path / "data.bin"
    WRITERS[kind](path)
    readers = [
        (open_embeddings, ".parquet", EmbeddingError),
        (read_interactions, ".parquet", InteractionsError),
        (read_interactions, ".inter", InteractionsError),
        (read_interactions, ".csv", InteractionsError),
        (read_items, ".parquet", IdsError),
        (read_items, ".csv", IdsError),
        (load_ids, ".parquet", IdsError),
        (load_ids, ".csv", IdsError),
        (load_ids, ".txt", IdsError),
    ]
    if kind != "npy":
        readers.append((open_embeddings, ".npy", EmbeddingError))
    for read, suffix, error in readers:
        named = path.with_suffix(suffix)
        shutil.copy(path, named)
        with pytest.raises(error, match=f"'.*data{suffix}' is {WORDS[kind]}") as refused:
            read(named)
        assert "copy it again" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a\nb\n", "text"),
        ("ORC-1\nPAR1\n", "text"),
        ("PAR1\n", "text"),
        ("[abc]\n[d]\n", "text"),
        ("a,b\nc\n", "text"),
        ("a,b\nc,d\n", "comma"),
        ("a\tb\nc\td\n", "tab"),
        ("a;b\nc;d\n", "semicolon"),
        ('"x,y"\nz\n', "text"),
        ("é" * HEAD_BYTES, "text"),
        ("a" + "é" * HEAD_BYTES, "text"),
        ("a,b\n" * HEAD_BYTES, "comma"),
    ],
)
def test_text_is_told_from_tables(text, kind):
    assert recognize(text.encode()[:HEAD_BYTES]).name == kind


def test_truncated_parquet_stays_truncated_parquet(tmp_path):
    pq.write_table(TABLE, tmp_path / "x.parquet")
    write(tmp_path / "x.parquet", (tmp_path / "x.parquet").read_bytes()[:50])
    with pytest.raises(InteractionsError, match="truncated, damaged"):
        read_interactions(tmp_path / "x.parquet")


def test_tables_with_another_name(tmp_path):
    pq.write_table(TABLE, tmp_path / "x.csv")
    with pytest.raises(InteractionsError, match=r"is Parquet; rename it to end in \.parquet"):
        read_interactions(tmp_path / "x.csv")
    for separator, word in (
        ("\t", r"tab-separated .*\.tsv"),
        (";", "semicolon-separated .*commas"),
    ):
        TABLE.to_pandas().to_csv(tmp_path / "x.csv", sep=separator, index=False)
        with pytest.raises(InteractionsError, match=word):
            read_interactions(tmp_path / "x.csv")
    TABLE.to_pandas().to_csv(tmp_path / "ml.dat", sep="\t", index=False)
    with pytest.raises(InteractionsError, match=r"tab-separated text with 2 columns; .*\.tsv"):
        read_interactions(tmp_path / "ml.dat")
    TABLE.to_pandas().to_csv(tmp_path / "x.csv.gz", index=False, compression=None)
    with pytest.raises(InteractionsError, match=r"comma-separated .*rename it to end in \.csv"):
        read_interactions(tmp_path / "x.csv.gz")


def test_globs_and_folders_of_npy_files(tmp_path, capsys):
    for number in range(2):
        np.save(tmp_path / f"part-{number}.npy", np.ones((2, 2), np.float32))
    with pytest.raises(EmbeddingError, match=r"NumPy array .*numpy\.concatenate"):
        open_embeddings(f"{tmp_path}/part-*.npy")
    with pytest.raises(UsageError, match=r"holds no Parquet files: .*numpy\.concatenate"):
        open_embeddings(tmp_path)
    with pytest.raises(UsageError, match=r"NumPy array \(\.npy\); give a table in Parquet or CSV"):
        read_interactions(tmp_path)
    assert run("fit", f"{tmp_path}/part-*.npy", "-o", tmp_path / "m", "-q") == 1
    assert "is a NumPy array" in capsys.readouterr().err
    write(tmp_path / "x.parquet", LFS)
    with pytest.raises(EmbeddingError, match=r"'file://.*x\.parquet' is a Git LFS pointer"):
        open_embeddings(f"file://{tmp_path}/x.parquet")


def test_ids_of_lcrec_are_read_in_the_order_of_their_rows(tmp_path, capsys):
    path = write(tmp_path / "Games.item2id", "B00B\t1\nB00A\t0\r\nB00C\t2\n")
    assert load_ids(path).strings().to_pylist() == ["B00A", "B00B", "B00C"]
    index = write(tmp_path / "Games.index.json", '{"0": ["<a_1>"], "1": ["<a_2>"], "2": ["<a_3>"]}')
    output = tmp_path / "ids.parquet"
    assert run("import", index, "--from", "lcrec", "--ids", path, "-o", output) == 0
    assert "imported 3 items" in capsys.readouterr().out
    assert pq.read_table(output)["item_id"].to_pylist() == ["B00A", "B00B", "B00C"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.item2id", "a\t1\nb\t1\n", r"tab-separated text with 2 columns.*--ids '.*x.tsv:COLUMN'"),
        ("x.item2id", "a\t1\nb\t2\n", "tab-separated"),
        ("x.item2id", "1\ta\n0\tb\n", "tab-separated"),
        ("x.txt", "a,1\nb,2\n", r"comma-separated text with 2 columns.*--ids '.*x.csv:COLUMN'"),
        ("x.txt", "a\tx\t1\nb\ty\t2\n", "tab-separated text with 3 columns"),
        ("x.txt", "a\t1\nb\n", r"1 lines with a tab \(first: line 1\)"),
        ("x.jsonl", '{"item_id": "a"}\n', "JSON lines"),
    ],
)
def test_ids_in_tables_without_a_header(name, text, message, tmp_path):
    with pytest.raises(IdsError, match=message):
        load_ids(write(tmp_path / name, text))


def test_ids_with_separators_are_one_id_per_line(tmp_path):
    path = write(tmp_path / "ids.txt", "Smith, J.\nJones\n[abc]\n")
    assert load_ids(path).strings().to_pylist() == ["Smith, J.", "Jones", "[abc]"]
