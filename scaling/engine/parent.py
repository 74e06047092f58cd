"""The final parameters of a finished run, read from its last checkpoint and placed on a mesh."""

from typing import Any

from models.errors import InputError
from scaling.chain import Parent
from scaling.engine.checkpoint import Checkpointer
from scaling.engine.hosts import agree


def parameters(parent: Parent, abstract: Any) -> Any:
    """The parameters that `abstract` names, a tree of ShapeDtypeStruct with shardings. On several hosts all call it.

    Raises InputError, on all hosts, where they do not read back whole.
    """
    step, reason, params = parent.config.steps, "", None
    try:
        params = Checkpointer(parent.folder / "checkpoints").read_part(step, {"params": abstract})["params"]
    except (MemoryError, PermissionError):  # no fault of the checkpoint's
        raise
    except Exception as error:  # orbax and tensorstore raise many kinds for a damaged file
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
    if agree(params is None).any():
        raise InputError(
            f"parent = {parent.config.run_id!r}: its checkpoint of step {step} in {parent.folder} is missing or "
            f"damaged ({reason or 'as another host says'}); remove its result.json and train it again"
        )
    return params
