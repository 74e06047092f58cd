"""Local files: `text:GLOB[?field=NAME]`, of plain text, JSON lines or parquet; their text is hashed when opened."""

import contextlib
import functools
import glob
import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError, did_you_mean
from scaling.data.sources import Source, first_line, options_of

USAGE = "text:GLOB"
SUFFIXES = (".txt", ".jsonl", ".parquet", ".txt.gz", ".jsonl.gz")


def source(spec: str, rest: str, cache: Path) -> Source:
    pattern, options = options_of(spec, rest, ("field",))
    field = options.get("field", "text")
    pattern = str(Path(pattern).expanduser())
    paths = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
    if not paths:
        raise InputError(f"source: {spec!r} matches no file; check the path (quote the * for your shell)")
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise InputError(f"source: {spec!r} matches {path.name!r}, which is none of {', '.join(SUFFIXES)}")
    root = fixed_part(pattern)
    files = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    digest = hashlib.sha256(field.encode())
    for name, path in files:
        with reading(path), open(path, "rb") as handle:
            digest.update(f"\0{name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}".encode())
    return Source(spec, f"text-{digest.hexdigest()}", functools.partial(read_files, [p for _, p in files], field))


def fixed_part(pattern: str) -> Path:
    """The folder of a glob before its first wildcard; names below it are the same wherever the folder lies."""
    parts = Path(pattern).parts
    wild = [i for i, part in enumerate(parts) if glob.has_magic(part)]
    return Path(*parts[: wild[0] if wild else -1])


def read_files(paths: list[Path], field: str) -> Iterator[str]:
    for path in paths:
        with reading(path):
            if path.name.endswith(".parquet"):
                yield from read_parquet(path, field)
                continue
            with open_bytes(path) as handle:
                if ".jsonl" in path.suffixes:
                    yield from read_jsonl(path, handle, field)
                else:
                    yield handle.read().decode("utf-8-sig")


def open_bytes(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    return open(path, "rb")


def read_jsonl(path: Path, lines: Iterator[bytes], field: str) -> Iterator[str]:
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
            raise InputError(f"source: {path}, line {i} has no field {field!r}{offer(field, row)}")
        if row[field] is None:
            continue
        if not isinstance(row[field], str):
            raise InputError(f"source: {path}, line {i}, field {field!r} holds {type(row[field]).__name__}, not text")
        yield row[field]


def read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"source: {path} is not a parquet file ({first_line(error)})") from error
    with table:
        if field not in table.schema_arrow.names:
            raise InputError(f"source: {path} has no column {field!r}{offer(field, table.schema_arrow.names)}")
        kind = table.schema_arrow.field(field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise InputError(f"source: {path}, column {field!r} holds {kind}, not text")
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)


def offer(field: str, names) -> str:
    return f"{did_you_mean(field, names)} (it has: {', '.join(names)}); choose one with ?field=NAME"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Names the file in what goes wrong while it is read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"source: {path} is not UTF-8 text ({error.reason}); convert it or leave it out") from error
    except (OSError, EOFError) as error:
        raise InputError(f"source: {path} cannot be read ({first_line(error)})") from error
