"""Any TFDS dataset that needs no TensorFlow: `tfds:NAME[/CONFIG][:VERSION][?split=...&field=...&dir=...]`."""

import contextlib
import functools
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

from models.errors import InputError, did_you_mean
from scaling.data.cache import locked
from scaling.data.sources import Source, first_line, options_of

USAGE = "tfds:NAME"


def source(spec: str, rest: str, cache: Path) -> Source:
    import tensorflow_datasets as tfds

    name, options = options_of(spec, rest, ("split", "field", "dir"))
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
        raise InputError(f"source: {spec!r} cannot be opened by TFDS ({first_line(error)})") from error
    if not builder.data_path.exists():
        with locked(cache / "tfds" / ".prepare.lock"):
            prepare(spec, builder)
    features = builder.info.features
    if not hasattr(features, "keys") or field not in features:
        names = ", ".join(features.keys()) if hasattr(features, "keys") else type(features).__name__
        raise InputError(f"source: {spec!r} has no field {field!r}{did_you_mean(field, features)} (it has: {names})")
    try:
        size = builder.info.splits[split]
        version = f"tfds-{builder.info.full_name}-{split}-{field}-{size.num_examples}-{sizes(builder.info.splits)}"
        data = builder.as_data_source(split)
    except NotImplementedError as error:
        raise InputError(
            f"source: {spec!r} is stored as {builder.info.file_format.value}, which needs TensorFlow; "
            "prepare it with file_format='array_record'"
        ) from error
    except Exception as error:
        splits = ", ".join(builder.info.splits)
        raise InputError(f"source: {spec!r} has no split {split!r} (it has: {splits})") from error
    return Source(spec, version, functools.partial(read_field, spec, data, field))


def prepare(spec: str, builder) -> None:
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_andprepare(file_format="array_record")
    except ModuleNotFoundError as error:
        raise InputError(
            f"source: {spec!r} needs {error.name} to be prepared; install it with: pip install {error.name}"
        ) from error
    except Exception as error:  # the dataset's own code can raise anything
        raise InputError(
            f"source: {spec!r} could not be prepared ({first_line(error)}); prepare it once with TFDS and "
            "file_format='array_record', and name its folder with dir=FOLDER"
        ) from error


def sizes(splits) -> str:
    """A hash of the bytes and examples of every shard, so that a dataset written anew under one version is noticed."""
    listed = [[name, splits[name].num_bytes, list(splits[name].shard_lengths)] for name in sorted(splits)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]


def read_field(spec: str, data, field: str) -> Iterator[str]:
    for i in range(len(data)):
        try:
            text = data[i][field]
            text = text.decode() if isinstance(text, bytes) else text
        except UnicodeDecodeError as error:
            raise InputError(f"source: {spec!r}, example {i}, field {field!r} is not UTF-8 ({error.reason})") from error
        except Exception as error:
            raise InputError(f"source: {spec!r}, example {i} cannot be read ({first_line(error)})") from error
        if not isinstance(text, str):
            raise InputError(f"source: {spec!r}, field {field!r} holds {type(text).__name__}, not text")
        yield text
