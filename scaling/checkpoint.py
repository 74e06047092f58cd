"""Checkpoints of a run through orbax: saved in the background, restored onto any mesh, a damaged one stepped over."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


class Checkpointer:
    """The checkpoints/ folder of one run. Orbax is imported, and the folder made, at the first save."""

    def __init__(self, folder: Path, keep: int | None) -> None:
        self.folder = folder.absolute()
        self.keep = keep
        self._manager = None

    def save(self, step: int, state: Any) -> None:
        """Starts saving `state` (a tree of arrays) as of `step` finished steps; returns once it is copied."""
        import orbax.checkpoint as ocp

        # On a CPU orbax would read the very buffers that the next step is free to reuse.
        state = jax.tree.map(jnp.copy, state) if jax.default_backend() == "cpu" else state
        if not self._open().save(step, args=ocp.args.StandardSave(state)):
            raise RuntimeError(f"checkpoint of step {step} was not saved: {self.folder} holds a later one")

    def restore(self, abstract: Any, report: Callable[[str], None]) -> tuple[int, Any] | None:
        """(steps finished, state) from the newest checkpoint that reads back whole, or None.

        `abstract`: a tree of ShapeDtypeStruct with shardings. A checkpoint that does not read is reported and set
        aside, as damaged-STEP beside the folder.
        """
        if not self.folder.is_dir():
            return None
        import orbax.checkpoint as ocp

        for step in sorted(self._open().all_steps(), reverse=True):
            try:
                state = self._open().restore(step, args=ocp.args.StandardRestore(abstract))
                return step, jax.block_until_ready(state)
            except (MemoryError, PermissionError):  # no fault of the checkpoint's
                raise
            except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
                if "RESOURCE_EXHAUSTED" in str(error):
                    raise
                reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
                report(f"checkpoint of step {step} is damaged ({reason}); falling back to the one before")
                self.close()
                aside = self.folder.with_name(f"damaged-{step}")
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(step)).rename(aside)
        report("no whole checkpoint is left; starting from the beginning")
        return None

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints, in order; only looks."""
        return sorted(int(p.name) for p in self.folder.glob("*") if p.name.isdigit())

    def restore_step(self, step: int, abstract: Any, report: Callable[[str], None]) -> Any | None:
        """The state as of `step`, or None, reported, where it does not read back. Changes nothing in the folder."""
        import orbax.checkpoint as ocp

        try:
            with ocp.StandardCheckpointer() as reader:
                return jax.block_until_ready(reader.restore(self.folder / str(step) / "default", abstract))
        except (MemoryError, PermissionError):
            raise
        except Exception as error:
            report(f"{self.folder / str(step)} is damaged ({type(error).__name__}); not used")
            return None

    def clear(self) -> None:
        """Removes all checkpoints of the run."""
        self.close()
        for folder in [self.folder, *self.folder.parent.glob("damaged-*")]:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Waits for saves under way and lets go of the folder."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _open(self):
        if self._manager is None:
            import orbax.checkpoint as ocp

            logging.getLogger("absl").setLevel(logging.CRITICAL)  # what is wrong with a checkpoint, `restore` says
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep, create=True, enable_async_checkpointing=True, cleanup_tmp_directories=True
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager
