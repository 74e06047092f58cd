"""Tokenizers: what is encoded comes back, and training one twice gives one tokenizer."""

import os
import subprocess
import sys

import numpy as np
import pytest

from models.errors import InputError
from scaling.data.tokenizers import Bytes, clean, token_dtype, train_bpe, vocab_size

TEXTS = [
    "plain",
    "  spaces\t\n\r\n  ",
    "naïve café, 漢字, 🙂",
    "don't 1234",
    "<|endoftext|>",
    "",
    "a\0b",
    "lone \ud800 half",
]
PROSE = [f"the {a} {b} and the {b} {a}" for a in ("quick", "brown", "lazy") for b in ("fox", "dog", "thing")] * 4


def test_sizes():
    assert vocab_size("bytes") == 256
    assert vocab_size("bpe:257") == 257
    assert [token_dtype(n).name for n in (256, 257, 65536, 65537)] == ["uint8", "uint16", "uint16", "uint32"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte", "did you mean 'bytes'?"),
        ("bpe", "did you mean 'bpe:1024'?"),
        ("bep:512", "did you mean 'bpe:512'?"),
        ("bpe:-5", "unknown 'bpe:-5'"),
        ("bpe:256", "take 257"),
        ("bpe:999999999", "take 257"),
        ("", "known: 'bytes'"),
    ],
)
def test_bad_names(spec, message):
    with pytest.raises(InputError) as caught:
        vocab_size(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trips(text, tmp_path):
    for tokenizer in (Bytes(), train_bpe("bpe:280", PROSE, tmp_path / "tokenizer.json")):
        ids = tokenizer.encode(text)
        assert 0 not in ids, "id 0 must never stand for text"
        assert tokenizer.decode(ids) == clean(text)
        assert [i.tolist() for i in tokenizer.encode_many([text, text])] == [ids.tolist()] * 2
        assert tokenizer.decode(np.append(ids, 0)) == clean(text) + "\0"


def test_bpe_uses_its_merges(tmp_path):
    tokenizer = train_bpe("bpe:280", PROSE, tmp_path / "tokenizer.json")
    assert tokenizer.encode(" the fox").max() >= 257
    assert len(tokenizer.encode(PROSE[0])) < len(PROSE[0])
    assert max(tokenizer.encode(text).max() for text in PROSE) < 280


def test_bpe_is_the_same_whatever_the_process_and_its_threads(tmp_path):
    program = "import sys; from scaling.data.tokenizers import *; train_bpe('bpe:285', eval(sys.argv[1]), sys.argv[2])"
    for threads in ("1", "3"):
        environment = os.environ | {"PYTHONHASHSEED": threads, "RAYON_NUM_THREADS": threads}
        command = [sys.executable, "-c", program, repr(PROSE), str(tmp_path / threads)]
        subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


def test_too_little_text_for_the_vocabulary(tmp_path):
    with pytest.raises(InputError, match=r"take 'bpe:2\d\d' or smaller"):
        train_bpe("bpe:5000", ["aab"] * 3, tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()
