"""The token store: what is in it, that it is built once and whole, and that validation stays out of training."""

import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.errors import InputError
from scaling.data import store as store_module
from scaling.data.order import batch_windows
from scaling.data.sources import open_source
from scaling.data.store import open_store
from scaling.data.tokenizers import clean

# tokens and UTF-8 bytes of training and validation, and their hashes
SOTU = [11_909_618, 276_382, 11_909_374, 276_377, "fae489d6d53c8fe1", "78ff70cc407fbcb2"]


def write_corpus(folder: Path, documents: int = 60, seed: int = 0) -> str:
    """Random words, so that no two documents share a window by chance; every tenth document comes twice."""
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyzéß漢"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(documents):
        words = ["".join(generator.choices(letters, k=generator.randint(2, 9))) for _ in range(150)]
        lines += [json.dumps({"text": " ".join(words)})] * (2 if i % 10 == 0 else 1)
    generator.shuffle(lines)
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return f"text:{folder}/*.jsonl"


@pytest.fixture
def spec(tmp_path):
    return write_corpus(tmp_path / "corpus")


def split_texts(store, name):
    return store.tokenizer.decode(getattr(store, name)).split("\0")[:-1]


def folders(cache):
    """What lies in the cache but its lock files: whole stores, and anything left behind."""
    return sorted(p.name for p in (cache / "stores").iterdir() if not p.name.endswith(".lock"))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:400"])
def test_the_store_holds_the_corpus(spec, tmp_path, tokenizer):
    store = open_store(spec, tokenizer, tmp_path, valid_fraction=0.1)
    documents = list(open_source(spec).documents())
    train, valid = split_texts(store, "train"), split_texts(store, "valid")
    assert sorted(train + valid) == sorted(documents)
    assert train == [text for text in documents if text in set(train)], "training keeps the order of the source"
    assert not set(train) & set(valid), "copies of a document must fall on one side"
    sizes = [sum(len(text.encode()) for text in side) for side in (train, valid)]
    assert [store.train_bytes, store.valid_bytes] == sizes
    assert 0.1 <= sizes[1] / sum(sizes) <= 0.2
    assert store.train.dtype == (np.uint8 if tokenizer == "bytes" else np.uint16)
    assert max(store.train.max(), store.valid.max()) < store.vocab_size


def test_a_tokenizer_is_trained_on_the_training_split_alone(spec, tmp_path, monkeypatch):
    taught = []

    def train_bpe(name, texts, path):
        taught.extend(texts)
        return store_module_train_bpe(name, taught, path)

    store_module_train_bpe = store_module.train_bpe
    monkeypatch.setattr(store_module, "train_bpe", train_bpe)
    store = open_store(spec, "bpe:300", tmp_path, valid_fraction=0.2)
    assert taught == split_texts(store, "train")


@pytest.mark.parametrize("seq_len", [1, 7, 64, 500])
def test_windows_cover_every_target_once(spec, tmp_path, seq_len):
    store = open_store(spec, "bytes", tmp_path)
    n = store.n_train_windows(seq_len)
    windows = store.train_windows(np.arange(n), seq_len)
    assert windows.dtype == np.int32
    assert windows.shape == (n, seq_len + 1)
    assert (windows[:, 1:].ravel() == store.train[1 : n * seq_len + 1]).all()
    assert (windows[:, :-1].ravel() == store.train[: n * seq_len]).all()
    assert len(store.train) - 1 - n * seq_len < seq_len, "no whole window is left out"
    valid = store.valid_windows(seq_len)
    assert valid.dtype == np.int32
    assert valid.shape == (store.n_valid_windows(seq_len), seq_len + 1)
    assert (valid[:, 1:].ravel() == store.valid[1 : valid.shape[0] * seq_len + 1]).all()


def test_no_validation_window_is_in_any_training_batch(spec, tmp_path):
    store = open_store(spec, "bytes", tmp_path, valid_fraction=0.1)
    T, n = 32, store.n_train_windows(32)
    stream = np.concatenate([batch_windows(n, 0, step, 16) for step in range(-(-n // 16))])
    assert set(stream.tolist()) == set(range(n)), "one epoch reads every training window"
    train = store.train.tobytes()
    for window in store.valid_windows(T):
        assert window.astype(np.uint8).tobytes() not in train


def test_sotu(tmp_path):
    store = open_store("sotu", "bytes", tmp_path)
    train, valid = split_texts(store, "train"), split_texts(store, "valid")
    assert (len(train), len(valid)) == (len(set(train)), len(set(valid)))
    assert not set(train) & set(valid)
    digests = [hashlib.sha256(tokens.tobytes()).hexdigest()[:16] for tokens in (store.train, store.valid)]
    assert [len(store.train), len(store.valid), store.train_bytes, store.valid_bytes, *digests] == SOTU, (
        "The default corpus gives other tokens than before: losses measured on it are no longer comparable. "
        "If that is meant (a new version of sotu, say), write the new numbers here and run the quickstart again."
    )
    assert store.bits_per_byte(np.log(256)) == pytest.approx(8 * len(store.valid) / store.valid_bytes)


def test_opening_again_reads_nothing_and_imports_nothing_heavy(spec, tmp_path):
    open_store("sotu", "bytes", tmp_path)
    open_store(spec, "bpe:300", tmp_path)
    program = """if True:
        import sys
        from pathlib import Path
        from scaling.data.store import open_store
        for source, tokenizer in (("sotu", "bytes"), (sys.argv[2], "bpe:300")):
            open_store(source, tokenizer, Path(sys.argv[1])).valid_windows(64)
        heavy = "jax flax tensorflow tensorflow_datasets tokenizers pandas pyarrow sotu scipy".split()
        print([m for m in heavy if m in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), spec], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_key_is_that_of_content_tokenizer_and_fraction(spec, tmp_path):
    key = open_store(spec, "bytes", tmp_path / "cache").key
    elsewhere = write_corpus(tmp_path / "elsewhere")
    assert open_store(elsewhere, "bytes", tmp_path / "cache").key == key
    others = [
        open_store(write_corpus(tmp_path / "other", seed=1), "bytes", tmp_path / "cache").key,
        open_store(spec, "bpe:300", tmp_path / "cache").key,
        open_store(spec, "bytes", tmp_path / "cache", valid_fraction=0.03).key,
    ]
    assert len({key, *others}) == 4


def test_the_cache_is_where_the_environment_says(spec, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALING_CACHE", str(tmp_path / "from-environment"))
    store = open_store(spec, "bytes")
    assert folders(tmp_path / "from-environment") == [store.key]


def test_bpe_gives_the_same_store_twice(spec, tmp_path):
    contents = []
    for name in ("one", "two"):
        store = open_store(spec, "bpe:400", tmp_path / name)
        folder = tmp_path / name / "stores" / store.key
        contents.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert set(contents[0]) == {"train.bin", "valid.bin", "meta.json", "tokenizer.json"}
    assert contents[0] == contents[1]


def test_a_corpus_of_one_document_gives_its_end(tmp_path):
    text = "".join(random.Random(3).choices("abc漢é ", k=5000))
    (tmp_path / "one.txt").write_text(text)
    store = open_store(f"text:{tmp_path}/one.txt", "bytes", tmp_path)
    (train,), (valid,) = split_texts(store, "train"), split_texts(store, "valid")
    assert train + valid == text
    assert 0.02 <= store.valid_bytes / len(text.encode()) < 0.021


def test_a_few_books_do_not_give_a_whole_one(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text("".join(random.Random(i).choices("abcdef ", k=4000)))
    (tmp_path / "3.txt").write_text((tmp_path / "0.txt").read_text())
    store = open_store(f"text:{tmp_path}/*.txt", "bytes", tmp_path)
    assert store.valid_bytes == 320
    assert split_texts(store, "valid")[0] not in "".join(split_texts(store, "train"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": "byte"}, "did you mean 'bytes'"),
        ({"tokenizer": "bpe:99"}, "take 257"),
        ({"tokenizer": "bpe:200000"}, "or smaller"),
        ({"valid_fraction": 0.0}, "valid_fraction: 0.0"),
        ({"valid_fraction": 0.5}, "valid_fraction: 0.5"),
        ({"valid_fraction": float("nan")}, "valid_fraction: nan"),
        ({"source": "nowhere"}, "source: unknown 'nowhere'"),
        ({"source": "text:{root}/empty.txt"}, "holds no text"),
        ({"source": "text:{root}/short.txt"}, "too short to split"),
        ({"source": "text:{root}/latin.txt"}, "latin.txt is not UTF-8"),
    ],
)
def test_bad_input_leaves_nothing(spec, tmp_path, change, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    arguments = {"source": spec, "tokenizer": "bytes"} | change
    arguments["source"] = arguments["source"].format(root=tmp_path)
    with pytest.raises(InputError) as caught:
        open_store(**arguments, cache_dir=tmp_path / "cache")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists() or folders(tmp_path / "cache") == []


def test_bad_windows(spec, tmp_path):
    store = open_store(spec, "bytes", tmp_path)
    with pytest.raises(InputError, match="seq_len: 0"):
        store.n_train_windows(0)
    with pytest.raises(InputError, match="longer than the validation split"):
        store.valid_windows(10**6)
    for index in (-1, store.n_train_windows(64)):
        with pytest.raises(IndexError):
            store.train_windows([0, index], 64)


def test_a_cache_that_cannot_be_written(spec, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="set SCALING_CACHE"):
        open_store(spec, "bytes", tmp_path / "file")


def test_a_source_that_changes_while_it_is_read(spec, tmp_path, monkeypatch):
    source = open_source(spec)
    texts = iter([source.read, lambda: list(source.read())[:-1]])
    changing = dataclasses.replace(source, read=lambda: next(texts)())
    monkeypatch.setattr(store_module, "open_source", lambda *_: changing)
    with pytest.raises(InputError, match="changed while it was read"):
        open_store(spec, "bytes", tmp_path)
    assert folders(tmp_path) == []


def damage_truncate(folder):
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])


def damage_json(folder):
    (folder / "meta.json").write_text('{"format": 1, ')


def damage_json_kind(folder):
    (folder / "meta.json").write_text("[]")


def damage_missing_meta(folder):
    (folder / "meta.json").unlink()


def damage_missing_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def damage_count(folder):
    meta = json.loads((folder / "meta.json").read_text())
    meta["valid"]["tokens"] += 1000
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_json, damage_json_kind, damage_missing_meta, damage_missing_tokenizer, damage_count],
)
def test_a_damaged_store_is_built_again(spec, tmp_path, capsys, damage):
    store = open_store(spec, "bpe:300", tmp_path)
    train, folder = np.array(store.train), tmp_path / "stores" / store.key
    damage(folder)
    assert (open_store(spec, "bpe:300", tmp_path).train == train).all()
    printed = capsys.readouterr().err
    assert "is damaged" in printed
    assert printed.count("\n") == 1
    open_store(spec, "bpe:300", tmp_path)
    assert capsys.readouterr().err == ""
    assert folders(tmp_path) == [store.key]


BUILDER = """if True:
    import hashlib, os, signal, sys
    from pathlib import Path
    from scaling.data import store
    spec, cache, die_at = sys.argv[1:]
    build, builds = store._build, []
    store._build = lambda *a: (builds.append(1), build(*a))
    def die(*a): os.kill(os.getpid(), signal.SIGKILL)
    if die_at == "split": store._pieces = die
    if die_at == "fsync": store._fsync = die
    if die_at == "rename": os.rename = die
    print("ready", flush=True)
    sys.stdin.read(1)
    opened = store.open_store(spec, "bpe:300", Path(cache))
    print(len(builds), opened.key, hashlib.sha256(opened.train.tobytes()).hexdigest())
"""


def builder(spec, cache, die_at="never"):
    command = [sys.executable, "-c", BUILDER, spec, str(cache), die_at]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_many_builders_at_once_build_one_store(spec, tmp_path):
    processes = [builder(spec, tmp_path) for _ in range(5)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("x")
        process.stdin.flush()
    answers = [process.communicate() for process in processes]
    assert [error for _, error in answers] == [""] * 5
    builds, keys, contents = zip(*(out.split() for out, _ in answers), strict=True)
    assert sum(map(int, builds)) == 1, "one builds, the others wait and open what it built"
    assert len(set(contents)) == 1
    assert folders(tmp_path) == [keys[0]]


@pytest.mark.parametrize("die_at", ["split", "fsync", "rename"])
def test_a_builder_killed_midway_leaves_nothing_mistaken_for_a_store(spec, tmp_path, die_at):
    process = builder(spec, tmp_path, die_at)
    process.communicate("x")
    assert process.returncode == -signal.SIGKILL
    (leftover,) = folders(tmp_path)
    assert ".tmp-" in leftover
    store = open_store(spec, "bpe:300", tmp_path)
    assert folders(tmp_path) == [store.key]
    assert (store.train == open_store(spec, "bpe:300", tmp_path / "fresh").train).all()


def test_clean_text_is_what_is_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"n\0ul {i} \ud800"}) for i in range(200)))
    store = open_store(f"text:{tmp_path}/a.jsonl", "bytes", tmp_path)
    texts = split_texts(store, "train") + split_texts(store, "valid")
    assert set(texts) == {clean(f"n\0ul {i} \ud800") for i in range(200)}
    assert store.train_bytes + store.valid_bytes == sum(len(text.encode()) for text in texts)
    assert os.path.getsize(tmp_path / "stores" / store.key / "train.bin") == len(store.train)
