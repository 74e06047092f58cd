"""Sources: what is read, in which order, what changes the version, and what is refused."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import InputError
from scaling.data.sources import open_source


@pytest.fixture
def corpus(tmp_path):
    """Six documents in five files of every kind that can be read."""
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / "a.txt").write_bytes("\ufefférst\r\nline".encode())
    (root / "b.jsonl").write_text('{"text": "second", "body": "2"}\n\n{"text": "thi\\u0000rd", "body": "3"}\n')
    pq.write_table(pa.table({"text": ["fourth", None, ""], "n": [1, 2, 3]}), root / "c.parquet")
    (root / "sub" / "d.txt.gz").write_bytes(gzip.compress(b"fifth"))
    (root / "sub" / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "sixth"}'))
    return root


def refusal(spec, tmp_path):
    """The message with which a spec is refused, when it is opened or when it is read."""
    with pytest.raises(InputError) as caught:
        list(open_source(spec, tmp_path / "cache").documents())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_are_read_in_the_order_of_their_names(corpus):
    documents = list(open_source(f"text:{corpus}/**/*").documents())
    assert documents == ["érst\r\nline", "second", "third", "fourth", "fifth", "sixth"]


def test_a_field_and_a_question_mark_in_a_glob(corpus):
    assert list(open_source(f"text:{corpus}/?.jsonl?field=body").documents()) == ["2", "3"]
    assert list(open_source(f"text:{corpus}/?.jsonl").documents()) == ["second", "third"]


def test_the_version_is_that_of_the_content(corpus, tmp_path):
    before = open_source(f"text:{corpus}/*.txt").version
    moved = corpus.rename(tmp_path / "elsewhere")
    assert open_source(f"text:{moved}/*.txt").version == before
    assert open_source(f"text:{moved}/a.txt").version == before
    assert open_source(f"text:{moved}/*.jsonl").version != open_source(f"text:{moved}/*.jsonl?field=body").version
    (moved / "a.txt").write_text("edited")
    assert open_source(f"text:{moved}/*.txt").version != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("soto", "did you mean 'sotu'"),
        ("txt:*.txt", "did you mean 'text'"),
        ("text:", "'text:' is incomplete, or has too much; write it as 'text:GLOB'"),
        ("text:{root}/*.csv", "matches no file"),
        ("text:{root}/a.txt?feild=body", "did you mean 'field'"),
        ("text:{root}/b.jsonl?field=bodi", "did you mean 'body'? (it has: text, body)"),
        ("text:{root}/c.parquet?field=words", "c.parquet has no column 'words' (it has: text, n)"),
        ("text:{root}/c.parquet?field=n", "column 'n' holds int64, not text"),
        ("text:{root}/bad.txt", "bad.txt is not UTF-8 text"),
        ("text:{root}/bad.txt.gz", "bad.txt.gz cannot be read"),
        ("text:{root}/bad.jsonl", "bad.jsonl, line 2 is not JSON"),
        ("text:{root}/list.jsonl", "list.jsonl, line 1 is not a JSON object"),
        ("text:{root}/number.jsonl", "line 1, field 'text' holds int, not text"),
        ("text:{root}/bad.parquet", "bad.parquet is not a parquet file"),
        ("text:{root}/note.md", "'note.md', which is none of .txt"),
        ("text:{root}/empty.txt", "holds no text"),
        ("tfds:no_such_dataset?dir={root}", "names no TFDS dataset"),
        ("tfds:mnist?dri={root}", "did you mean 'dir'"),
    ],
)
def test_bad_input_gets_one_line_that_helps(corpus, tmp_path, spec, message):
    (corpus / "bad.txt").write_bytes(b"caf\xe9 latin-1")
    (corpus / "bad.txt.gz").write_bytes(b"not gzip")
    (corpus / "bad.jsonl").write_text('{"text": "x"}\n{"text": ')
    (corpus / "list.jsonl").write_text("[1]\n")
    (corpus / "number.jsonl").write_text('{"text": 1}\n')
    (corpus / "bad.parquet").write_text("not parquet")
    (corpus / "note.md").write_text("x")
    (corpus / "empty.txt").write_text("\0")
    assert message in refusal(spec.format(root=corpus), tmp_path)


def test_sotu_is_whole_silent_and_needs_neither_network_nor_tensorflow(tmp_path):
    """Its array_record files are written from a cold cache, lost, and written again."""
    program = """if True:
        import json, shutil, socket, sys
        def refuse(*a, **k): raise AssertionError("network")
        socket.socket.connect = socket.getaddrinfo = refuse
        from pathlib import Path
        from scaling.data.sources import open_source
        cache = Path(sys.argv[1])
        source = open_source("sotu", cache)
        light = "tensorflow_datasets" not in sys.modules
        texts = list(source.documents())
        again = list(source.documents())
        heavy = [m for m in ("tensorflow", "jax", "flax") if m in sys.modules]
        print(json.dumps([light, heavy, len(texts), sum(map(len, texts)), texts[0][:16], again == texts]))
    """
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path / "cache")],
        env=os.environ | {"TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list(temporary.iterdir()) == []
    light, heavy, documents, characters, first, same = json.loads(done.stdout)
    assert light, "opening sotu must not pay for importing tensorflow_datasets"
    assert heavy == []
    assert same
    assert documents >= 249
    assert characters > 11e6
    assert first == "Fellow-Citizens "


def test_sotu_survives_damage_to_its_files(tmp_path, capsys):
    source = open_source("sotu", tmp_path)
    texts = list(source.documents())
    (records,) = tmp_path.rglob("*.array_record*")
    records.write_bytes(records.read_bytes()[:100_000])
    assert list(source.documents()) == texts
    assert "preparing it again" in capsys.readouterr().err


def test_sotu_clears_away_what_a_killed_process_left(tmp_path, capsys):
    source = open_source("sotu", tmp_path)
    leftover = tmp_path / "tfds" / source.version / "sotu" / "1.0.0.incompleteXYZ"
    leftover.mkdir(parents=True)
    assert sum(1 for _ in source.documents()) >= 249
    assert not leftover.exists()
    assert capsys.readouterr() == ("", "")


def build_tiny(folder: Path, file_format: str):
    import tensorflow_datasets as tfds

    class TinyLetters(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")
        code_path = Path(__file__)

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "label": np.int32})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("abcd"), "test": self._generate_examples("xy")}

        def _generate_examples(self, letters):
            for i, letter in enumerate(letters):
                yield i, {"text": f"é{letter}" * 9, "label": i}

    tfds.disable_progress_bar()
    TinyLetters(data_dir=folder, file_format=file_format).download_and_prepare()


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    build_tiny(folder, "array_record")
    return folder


def test_a_tfds_dataset_by_name(tfds_folder, tmp_path):
    train = open_source(f"tfds:tiny_letters?dir={tfds_folder}", tmp_path)
    assert list(train.documents()) == [f"é{c}" * 9 for c in "abcd"]
    test = open_source(f"tfds:tiny_letters:1.2.0?split=test&dir={tfds_folder}", tmp_path)
    assert list(test.documents()) == [f"é{c}" * 9 for c in "xy"]
    half = open_source(f"tfds:tiny_letters?split=train[:50%]&dir={tfds_folder}", tmp_path)
    assert list(half.documents()) == [f"é{c}" * 9 for c in "ab"]
    assert len({train.version, test.version, half.version}) == 3
    assert "tiny_letters/1.2.0" in train.version
    assert str(tfds_folder) not in train.version


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:tiny_letter?dir={root}", "did you mean 'tiny_letters'?"),
        ("tfds:tiny_letters:9.9.9?dir={root}", "tiny_letters"),
        ("tfds:tiny_letters?split=valid&dir={root}", "no split 'valid' (it has: "),
        ("tfds:tiny_letters?field=txt&dir={root}", "did you mean 'text'? (it has: "),
        ("tfds:tiny_letters?field=label&dir={root}", "holds int, not text"),
    ],
)
def test_bad_input_to_tfds(tfds_folder, tmp_path, spec, message):
    assert message in refusal(spec.format(root=tfds_folder), tmp_path)
