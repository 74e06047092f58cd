"""Chains: runs that start from what another run, their parent, ended with, and what must hold between the two.

No JAX here.
"""

import contextlib
import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

from models.config import ModelConfig
from models.errors import InputError
from scaling.config import RunConfig
from scaling.data.store import open_store
from scaling.folder import read_config
from scaling.objectives import find
from scaling.result import RunResult, read_result
from scaling.trust import RUN_ID, check_no_link_out

OF_ITS_OWN = ("z_loss", "rope_theta")  # fields of the model that a child may choose: they touch no array


@dataclass(frozen=True)
class Parent:
    """A finished run that others start from."""

    folder: Path
    config: RunConfig
    result: RunResult

    @property
    def flops(self) -> float:
        """Training FLOPs of the chain up to its end."""
        return self.result.flops + self.result.flops_parents


def parent_of(config: RunConfig, folder: Path) -> Parent | None:
    """The parent of the run that lies, or will lie, in `folder`; None where it has none.

    Raises InputError where the parent is missing, has not finished, diverged, or does not go with this run.
    """
    check_wants(config)
    if not config.parent:
        return None
    place = folder_beside(folder, config.parent)
    if not (place / "config.json").exists():
        raise InputError(f"parent = {config.parent!r}: no such run in {place.parent}; train it there first")
    check_no_link_out(place)
    parent = read_config(place)
    if parent.run_id != config.parent:
        raise InputError(f"parent = {config.parent!r}: {place} holds another run ({parent.run_id})")
    check_child(config, parent)
    result = read_result(place)
    if result is None:
        raise InputError(f"parent = {config.parent!r}: has not finished ({place}); train it to its end first")
    if not result.finished:
        raise InputError(f"parent = {config.parent!r}: diverged at step {result.diverged_at_step}; choose another")
    return Parent(place, parent, result)


def check_wants(config: RunConfig) -> None:
    """Raises InputError where a run without a parent is one that needs it."""
    if config.parent:
        return
    if config.lora.rank:
        raise InputError(f"lora.rank = {config.lora.rank}: adapters stand on a trained model; give its run as parent")
    if find(config.objective.name, config.objective.options).reference:
        raise InputError(
            f"objective.name = {config.objective.name!r}: compares with the run it starts from; give that as parent"
        )


def folder_beside(folder: Path, run: str) -> Path:
    """Where the run of this id lies beside `folder`: in the folder of that name, else in one with a name of its own."""
    home = folder.absolute().parent
    if not (home / run).exists() and home.is_dir():
        for other in sorted(home.iterdir()):
            if not RUN_ID.fullmatch(other.name) and (other / "config.json").exists():
                with contextlib.suppress(InputError):
                    if read_config(other).run_id == run:
                        return other
    return home / run


def check_child(child: RunConfig, parent: RunConfig) -> None:
    """Raises InputError where `child` cannot take over the parameters of `parent`: another model or vocabulary.

    Opens their corpora where the vocabulary depends on these.
    """
    check_model(child, parent)
    corpora = [(config.data.source, config.data.tokenizer, config.data.valid_fraction) for config in (child, parent)]
    if child.data.tokenizer != "bytes" and corpora[0] != corpora[1]:
        mine, its = (identity(*corpus) for corpus in corpora)
        if mine != its:
            raise InputError(
                f"data.source = {child.data.source!r}: its {child.data.tokenizer!r} is not that of "
                f"{parent.data.source!r}, which the parent {parent.run_id} was trained on: another vocabulary; use "
                "data.tokenizer = bytes in both, or for lines jsonl:FILE?tokenizer=SOURCE OF THE PARENT"
            )


@functools.lru_cache(maxsize=64)
def identity(source: str, tokenizer: str, valid_fraction: float) -> str:
    """Of the tokenizer of a corpus: the same where token ids mean the same."""
    return open_store(source, tokenizer, valid_fraction=valid_fraction).tokenizer.identity


def check_model(child: RunConfig, parent: RunConfig) -> None:
    """Raises InputError where the configurations alone say that `child` cannot start from `parent`."""
    of = f"the parent {parent.run_id} has"
    for field in dataclasses.fields(ModelConfig):
        mine, its = getattr(child.model, field.name), getattr(parent.model, field.name)
        if mine != its and field.name not in OF_ITS_OWN:
            raise InputError(f"model.{field.name} = {mine!r}: {of} {its!r}; a child has its parent's model")
    if child.data.tokenizer != parent.data.tokenizer:
        raise InputError(
            f"data.tokenizer = {child.data.tokenizer!r}: {of} {parent.data.tokenizer!r}, another vocabulary"
        )
