"""Checkpoints of a run through orbax: saved in the background, restored onto any mesh, a damaged one stepped over.

Orbax's files hold no checksum of the arrays themselves: a flipped bit that still decompresses would be read as a
weight. So every checkpoint carries a digest of its content, the same on any mesh, which is verified on reading.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from scaling.engine.digest import digests
from scaling.engine.hosts import agree

SPARE = 2**16  # bytes: of a checkpoint's metadata


class Checkpointer:
    """The checkpoints/ folder of one run. Orbax is imported at the first use, and the folder made at the first save.

    `keep`: how many of the newest are kept; None: all.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder = folder.absolute()
        self.keep = keep
        self._manager = None

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, ascending. Looks only: another process may be saving."""
        # One under way has another name: orbax renames its folder when all is written.
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isascii() and p.name.isdigit())

    def agreed_steps(self) -> list[int]:
        """`steps`, on all hosts as the first one sees them: a file server may show them different ones."""
        steps = self.steps()
        n = int(agree(len(steps))[0, 0])
        return agree(*(steps if jax.process_index() == 0 else [0] * n))[0].tolist() if n else []

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state` (a tree of arrays) as of `step` finished steps; returns once it is copied.

        Where all are kept, a step that is there already is left as it is: a run that is resumed passes it again.
        Raises OSError where there is no room, or the save before did not get to the disk; `close` does for the last.
        """
        import orbax.checkpoint as ocp

        if self.keep is None and agree(step in self.steps())[0, 0]:
            return
        # On a CPU orbax would read the very buffers that the next step is free to reuse.
        state = jax.tree.map(jnp.copy, state) if jax.default_backend() == "cpu" else state
        # Written with the checkpoint's own metadata: both are there or neither.
        extra = {"digest": digests(state)}
        with self._writing():
            self._open().wait_until_finished()
            self._check_space(state)
            state = ocp.args.StandardSave(state)
            saved = self._open().save(step, args=state, custom_metadata=extra, force=self.keep is None)
        if not saved:
            raise RuntimeError(f"checkpoint of step {step} was not saved: {self.folder} holds a later one")

    def restore(self, abstract: Any, report: Callable[[str], None]) -> tuple[int, Any] | None:
        """(steps finished, state) from the newest checkpoint that reads back whole, or None.

        `abstract`: a tree of ShapeDtypeStruct with shardings. A checkpoint that does not read is reported and set
        aside, as damaged-STEP beside the folder.
        """
        steps = self.agreed_steps()
        for step in reversed(steps):
            if (state := self.restore_step(step, abstract, report)) is not None:
                return step, state
        if steps:
            report("no whole checkpoint is left; starting from the beginning")
        return None

    def restore_step(self, step: int, abstract: Any, report: Callable[[str], None]) -> Any | None:
        """The state as of `step`, bit for bit as it was saved, or None, reported and set aside, where it is damaged."""
        import orbax.checkpoint as ocp

        reason, state = "", None
        try:
            state = self._read(step, ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(abstract))
        except (MemoryError, PermissionError):  # no fault of the checkpoint's
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
            if "RESOURCE_EXHAUSTED" in str(error):
                raise
            reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        if agree(state is None).any():  # all hosts go on from the same step
            where = reason or "as another host says"
            report(f"checkpoint of step {step} is damaged ({where}); falling back to the one before")
            self._set_aside(step)
            return None
        return state

    def read_part(self, step: int, abstract: Any) -> Any:
        """Some arrays of a checkpoint, those of `abstract` (a tree like the whole one's, with parts left out), checked
        by their digests. Sets nothing aside. Raises whatever orbax does where they are not whole, or not of that shape.
        """
        import orbax.checkpoint as ocp

        args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=args, partial_restore=True)
        return self._read(step, ocp.PyTreeCheckpointHandler(), args, part=True)

    def clear(self) -> None:
        """Removes all checkpoints of the run."""
        self.close()
        for folder in [self.folder, *self.folder.parent.glob("damaged-*")]:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Waits for saves under way and lets go of the folder."""
        if self._manager is not None:
            with self._writing():
                self._manager.close()
            self._manager = None

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what orbax and tensorstore raise for a write that failed into one OSError that names the folder."""
        try:
            yield
        except Exception as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            number = int(code[1]) if code else getattr(error, "errno", None)
            self._abandon()
            if number is None:
                raise
            raise OSError(number, f"checkpoint not written: {os.strerror(number)}", str(self.folder)) from error

    def _check_space(self, state: Any) -> None:
        """Raises OSError where the disk has no room for this process's part: before anything is half written."""
        parts = [shard for x in jax.tree.leaves(state) for shard in x.addressable_shards if shard.replica_id == 0]
        needed = sum(shard.data.nbytes for shard in parts) + SPARE
        full = shutil.disk_usage(self.folder).free < needed
        if agree(full).any():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _abandon(self) -> None:
        """Lets go of a manager whose save failed; its checkpoint stays unfinished and is cleared by the next save."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with suppress(Exception):  # it raises the same error again
                manager.close()

    def _read(self, step: int, handler: Any, args: Any, part: bool = False) -> Any:
        """The state of one checkpoint, or a part of it, as the arguments of orbax say.

        Raises whatever orbax does where it is not whole, ValueError for the digest.
        """
        import orbax.checkpoint as ocp

        quiet()
        path = self.folder / str(step)
        with ocp.Checkpointer(handler) as reader:
            state = reader.restore(path / "default", args=args)
        metadata = json.loads((path / "_CHECKPOINT_METADATA").read_text())
        expected = (metadata.get("custom_metadata") or {}).get("digest")
        if expected is None:  # written before there were digests
            return jax.block_until_ready(state)
        actual = digests(state)
        if part:
            expected = {name: value for name, value in expected.items() if name in actual}
        if wrong := sorted(name for name in expected.keys() | actual if expected.get(name) != actual.get(name)):
            raise ValueError(f"content of {wrong[0]} is not what was saved")
        return state

    def _set_aside(self, step: int) -> None:
        self.close()
        if jax.process_index() == 0:
            aside = self.folder.with_name(f"damaged-{step}")
            shutil.rmtree(aside, ignore_errors=True)
            with suppress(FileNotFoundError):  # another reader of these checkpoints has done so
                (self.folder / str(step)).rename(aside)
        agree(0)

    def _open(self):
        if self._manager is None:
            import orbax.checkpoint as ocp

            quiet()
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager


def quiet() -> None:
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what is wrong with a checkpoint, `restore` says
