"""Which files of a folder are read, by split, and files of every kind, shape and encoding."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasft.data.examples import Example, read_blocks, shape_block
from lorasft.data.folders import find_files, held_out_source, split_of
from lorasft.data.prepare import prepare
from lorasft.data.report import Report
from lorasft.errors import DataError, ErrorGroup
from lorasft.recipe import ChatSettings, DataSettings, DataSource

ROWS = [{"prompt": f"Say {n}.", "completion": f"{n}"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"prompt": name, "completion": "x"}) + "\n")
    return folder


def read(path: Path, **settings: Any) -> list[Example]:
    data, report = DataSettings(train=(str(path),), **settings), Report()
    blocks = [block for source in data.train for block in read_blocks(source, data)]
    examples = [example for block in blocks for example in shape_block(block, data, report=report)]
    report.raise_errors()
    return examples


def answers(path: Path, **settings: Any) -> list[str]:
    return [example.messages[-1]["content"] for example in read(path, **settings)]


SPLITS = [  # names in a folder -> those that are read for training, and for evaluation; None: refused
    (["train.jsonl", "validation.jsonl", "test.jsonl"], ["train.jsonl"], ["validation.jsonl"]),
    (["train.jsonl", "valid.jsonl"], ["train.jsonl"], ["valid.jsonl"]),
    (["Train_01.jsonl", "training-2.jsonl", "DEV.jsonl"], ["Train_01.jsonl", "training-2.jsonl"], ["DEV.jsonl"]),
    (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
     ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], ["data/test-00000-of-00001.jsonl"]),
    (["main/train/0000.jsonl", "main/test/0000.jsonl"], ["main/train/0000.jsonl"], ["main/test/0000.jsonl"]),
    (["math.jsonl", "math_test.jsonl"], ["math.jsonl"], ["math_test.jsonl"]),
    (["latest.jsonl", "contest.jsonl", "trained.jsonl"], ["contest.jsonl", "latest.jsonl", "trained.jsonl"],
     ["contest.jsonl", "latest.jsonl", "trained.jsonl"]),
    (["data/rows.jsonl", ".cache/x/train.jsonl", "notes.md"], ["data/rows.jsonl"], ["data/rows.jsonl"]),
    (["rows.jsonl", "rows.jsonl.gz", "old/train.jsonl"], ["rows.jsonl"], ["rows.jsonl"]),
    (["train.jsonl", "extra.jsonl"], None, None),
    (["train.jsonl", "train_test.jsonl"], None, None),
    (["a/x.jsonl", "b/y.jsonl"], None, None),
    (["test.jsonl", "validation.jsonl"], None, ["validation.jsonl"]),
    (["train.jsonl"], ["train.jsonl"], None),
]  # fmt: skip


@pytest.mark.parametrize(("names", "train", "held_out"), SPLITS, ids=[",".join(names) for names, *_ in SPLITS])
def test_a_folder_is_read_by_its_splits(
    tmp_path: Path, names: list[str], train: list[str] | None, held_out: list[str] | None
) -> None:
    folder = fill(tmp_path / "test" / "set", *names)  # what is above the folder says nothing
    plain = DataSource(path=str(folder))
    for source, expected in ((plain, train), (held_out_source(plain), held_out)):
        if expected is None:
            with pytest.raises(DataError) as error:
                find_files(source)
            assert error.value.hint and (error.value.where or "").startswith(str(folder))
        else:
            found, others = find_files(source)
            assert [str(file.relative_to(folder)) for file in found] == expected
            assert not set(found) & set(others)


def test_names_of_splits_are_whole_words() -> None:
    named = {"train": "train.x a-train-b.x train_sft.x my/train/0.x Training1.x dataTrain.x TRAIN.x",
             "test": "evalTest.x TestSet.x eval.x holdout.x test/a.x",
             "validation": "dev.x val-0.x", "": "latest.x contest/x.x retrain.x evaluate.x train_test.x"}  # fmt: skip
    assert all(split_of(Path(name)) == split for split, names in named.items() for name in names.split())


def test_what_is_named_outright_is_read(tmp_path: Path) -> None:
    fill(tmp_path, "test.jsonl", "train.jsonl", "train2.jsonl")
    assert answers(tmp_path / "test.jsonl") == ["x"]
    assert len(read(tmp_path / "te*.jsonl")) == 1
    assert len(read(tmp_path / "tr*.jsonl")) == 2 == len(read(tmp_path / "*.jsonl"))  # no test file among others
    with pytest.raises(DataError, match=r"test") as error:
        read(fill(tmp_path / "only", "test.jsonl"))
    assert "only/test.jsonl" in str(error.value.hint)
    with pytest.raises(DataError, match=r"no split: more.jsonl; train: train.jsonl"):
        read(fill(tmp_path / "mixed", "train.jsonl", "more.jsonl"))


README = """---
license: mit
configs:
- config_name: {first}
  data_files:
  - split: train
    path: [en/a-*, en/b.jsonl]
  - split: test
    path: en/c.jsonl
- config_name: fr
  data_files: {{train_sft: fr/a.jsonl, train_gen: fr/b.jsonl}}
---
# A set
"""


def test_a_snapshot_is_read_as_its_readme_says(tmp_path: Path) -> None:
    fill(tmp_path, "en/a-0.jsonl", "en/b.jsonl", "en/c.jsonl", "fr/a.jsonl", "fr/b.jsonl", "outside.jsonl")
    (tmp_path / "README.md").write_text(README.format(first="default"))

    def names(**values: Any) -> list[str]:
        return [str(file.relative_to(tmp_path)) for file in find_files(DataSource(path=str(tmp_path), **values))[0]]

    assert names() == ["en/a-0.jsonl", "en/b.jsonl"] and names(split="test") == ["en/c.jsonl"]
    assert names(config="fr", split="train_gen") == ["fr/b.jsonl"]
    with pytest.raises(DataError, match=r"train_gen: b.jsonl; train_sft: a.jsonl"):
        names(config="fr")
    with pytest.raises(DataError, match="default, fr"):
        names(config="de")
    (tmp_path / "README.md").write_text(README.format(first="en"))
    with pytest.raises(DataError, match="en, fr"):
        names()
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: a\n  data_dir: fr\n---\n")
    assert names() == ["fr/a.jsonl", "fr/b.jsonl"]
    for odd in ("../*/*.jsonl", "/etc/*.jsonl", "[{split: train}]", "3", "[[a]]", "''"):  # says nothing
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: a\n  data_files: {odd}\n---\n")
        assert names() == ["outside.jsonl"]


def test_other_files_are_named_and_offered(tmp_path: Path, tiny: Any) -> None:
    fill(tmp_path / "set", "train.jsonl", "validation.jsonl", "test.jsonl")

    def made(evaluated: Any) -> Any:
        data = DataSettings(train=(str(tmp_path / "set"),), eval=evaluated)
        return prepare(data, ChatSettings(), tokenizer=tiny, folder=tmp_path / "cache")

    alone, both = made(None), made((str(tmp_path / "set"),))
    assert len(alone.train) == len(both.train) == 1 == len(both.held_out) and alone.held_out is None
    (notice,) = alone.report.notices()
    assert all(text in notice for text in ("test.jsonl", "validation.jsonl", "data.eval="))
    assert [Path(file).name for file in both.report.files_not_read] == ["test.jsonl"]


@pytest.mark.parametrize("splits", [False, True])
def test_what_datasets_saved_to_disk(tmp_path: Path, splits: bool) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    saved: Any = datasets.DatasetDict({"train": rows, "test": rows.select([0])}) if splits else rows
    saved.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2, "test": 1} if splits else 2)
    assert answers(tmp_path / "saved") == ["0", "1", "2"]
    held_out = held_out_source(DataSource(path=str(tmp_path / "saved")))
    assert len(find_files(held_out)[0]) == (1 if splits else 2)


def _columns(kind: Callable[[list[str]], Any]) -> str:
    return json.dumps({key: kind([row[key] for row in ROWS]) for key in ROWS[0]})


SHAPES = [
    ("a.json", json.dumps(ROWS, indent=1)),
    ("a.json", LINES),
    ("a.jsonl", json.dumps(ROWS)),
    ("a.json", json.dumps({"version": 1, "data": ROWS}, indent=2)),
    ("a.json", json.dumps({"rows": ROWS})),
    ("a.jsonl", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
    ("a.jsonl", "".join(json.dumps(row) for row in ROWS)),
    ("a.json", _columns(list)),
    ("a.json", _columns(lambda cells: {str(n): cell for n, cell in enumerate(cells)})),  # as pandas writes it
    ("a.json", json.dumps({str(n): row for n, row in enumerate(ROWS)})),
    ("a.json", json.dumps({f"row-{n}": row for n, row in enumerate(ROWS)})),
    ("a.json", json.dumps({"data": {f"row-{n}": row for n, row in enumerate(ROWS)}})),
    ("a.ndjson", LINES),
    ("a.jsonl", "\ufeff" + LINES),
    ("a.csv", "prompt;completion\nSay 0.;0\nSay 1.;1\n\"Say; 2.\";2\n"),
    ("a.tsv", "prompt\tcompletion\nSay 0.\t0\nSay 1.\t1\nSay, 2.\t2\n"),
    ("a.csv", "prompt,completion,note\nSay 0.,0,a;b\nSay 1.,1,\nSay 2.,2,\t\n"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), SHAPES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_rows_of_every_shape(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert answers(tmp_path / name) == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["jsonl.gz", "json.zst", "csv.bz2"])
def test_compressed_text(tmp_path: Path, kind: str) -> None:
    import pyarrow

    text = "prompt,completion\na,0\nb,1\nc,2\n" if kind.startswith("csv") else LINES
    with pyarrow.output_stream(str(tmp_path / f"a.{kind}")) as file:
        file.write(text.encode())
    assert answers(tmp_path / f"a.{kind}") == ["0", "1", "2"]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-20])
    with pytest.raises(DataError, match=r"cannot read this as \.jsonl"):
        read(tmp_path / "cut.jsonl.gz")


ONE_ROW = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}], "data": [{"prompt": "b"}]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "x"}]},
    {"prompt": "a", "completion": "x", "examples": ["assert f(1)"]},
]


@pytest.mark.parametrize("row", ONE_ROW)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_file_of_one_row_is_that_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
    assert answers(tmp_path / "a.json") == ["x"]


def test_a_file_of_another_shape_gets_one_error(tmp_path: Path) -> None:
    broken = json.dumps({"data": ROWS}, indent=2)[:-4]
    for name, text in (
        ("cut.json", broken),
        ("comma.jsonl", "\n".join(json.dumps(row, indent=1) + "," for row in ROWS)),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError) as error:
            read(tmp_path / name)
        assert "one object per line" in str(error.value.hint) and name in str(error.value.where)
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        with pytest.raises(DataError, match="git-lfs"):
            read(tmp_path / name)
    (tmp_path / "splits.json").write_text(json.dumps({"train": ROWS, "test": ROWS}))
    with pytest.raises(DataError, match="lists under train, test"):
        read(tmp_path / "splits.json")
    (tmp_path / "splits.json").write_text(json.dumps({"data": {"train": ROWS}}))
    with pytest.raises(DataError, match="lists under train"):
        read(tmp_path / "splits.json")
    (tmp_path / "split.json").write_text(json.dumps({"columns": ["prompt", "completion"], "data": [["a", "b"]]}))
    with pytest.raises(DataError, match="lists under data"):
        read(tmp_path / "split.json")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "comple\n' + LINES)  # a row that is cut off is a bad row
    assert answers(tmp_path / "bad.jsonl", on_bad_row="drop") == ["0", "1", "2"]


@pytest.mark.parametrize("text", ["Größe", "naïve – “quoted” 5 €"])
@pytest.mark.parametrize("kind", ["a.jsonl", "a.csv", "a.json"])
def test_advice_on_encodings_gives_the_text_that_was_written(tmp_path: Path, text: str, kind: str) -> None:
    row = {"prompt": text, "completion": "x"}
    written = {"a.jsonl": json.dumps(row, ensure_ascii=False) + "\n", "a.csv": f"prompt,completion\n{text},x\n"}
    content = written.get(kind, json.dumps([row], ensure_ascii=False)).encode("cp1252")
    (tmp_path / kind).write_bytes(content)
    with pytest.raises(DataError, match="utf-8") as error:
        read(tmp_path / kind)
    assert "iconv -f cp1252 -t utf-8" in str(error.value.hint)  # latin1 has neither dashes nor quotes
    (tmp_path / kind).write_text(content.decode("cp1252"), encoding="utf-8")
    assert read(tmp_path / kind)[0].messages[0]["content"] == text


def test_cells_of_csv_are_text(tmp_path: Path) -> None:
    cells = ["NA", "null", "007", "1e5", r"a\nb", "None", "true", "a\n\ufeffb"]
    (tmp_path / "a.csv").write_text("prompt,completion\n" + "".join(f'"{cell}","{cell}"\n' for cell in cells))
    assert answers(tmp_path / "a.csv") == cells


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "a.arrow"])
def test_rows_that_are_too_large_are_bad_rows(tmp_path: Path, kind: str) -> None:
    import datasets

    rows = [*ROWS, {"prompt": "a" * (9 << 20), "completion": "large"}, {"prompt": "b", "completion": "3"}]
    if kind == "a.jsonl":
        (tmp_path / kind).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "a.parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / kind)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        kind = "saved/data-00000-of-00001.arrow"
    with pytest.raises((DataError, ErrorGroup), match="over 8,388,608") as error:
        read(tmp_path / kind)
    assert str(error.value.where).endswith(f"{kind}:4")
    assert answers(tmp_path / kind, on_bad_row="drop") == ["0", "1", "2", "3"]
