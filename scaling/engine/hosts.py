"""Training over several hosts: joining them through `jax.distributed`, agreeing between them, and losing one.

When a host dies or hangs, JAX ends every other process from inside, by SIGABRT with a stack trace. So each host's
process is run by a small supervisor that imports no JAX: it turns that end into one clear line, a status in the run's
folder and exit code 75, and passes signals on.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.errors import InputError
from scaling.engine.lease import Busy, Lost
from scaling.exit_codes import BAD_INPUT, DONE, FAILED, PREEMPTED
from scaling.failure import Failure, write_failure
from scaling.trust import open_log

PARENT = "SCALING_PARENT"  # set in a process that ends with its parent: the id of that
# Becomes the command that its arguments name. Slurm's notice before a time limit may reach all processes of a step.
BOUND = f"""
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
os.environ["{PARENT}"] = sys.argv[1]
os.execvp(sys.argv[2], sys.argv[2:])
"""
KINDS = (Lost, Busy, InputError, OSError, Exception)  # of errors, that hosts can tell each other: the first that fits
LONGEST = 500  # bytes of their message
SUPERVISED = "SCALING_SUPERVISED"  # set in the process that trains: the file in which it notes that it has joined


@dataclass(frozen=True)
class Hosts:
    """Which processes train together. Raises InputError where the parts do not fit."""

    coordinator: str | None = None  #: HOST:PORT of process 0; None: found out by JAX (Slurm, TPU pod)
    processes: int | None = None
    process: int | None = None  #: this one's number, from 0
    timeout: int = 60  #: seconds without a sign of life after which a host counts as lost; also for joining

    def __post_init__(self) -> None:
        if self.timeout < 5:
            raise InputError(f"--host-timeout {self.timeout}: expected at least 5 seconds")
        given = (self.coordinator, self.processes, self.process)
        if given == (None, None, None):
            return
        if self.coordinator is None:
            raise InputError("--processes and --process: no coordinator; give --coordinator HOST:PORT of process 0")
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError(f"--coordinator {self.coordinator!r}: expected HOST:PORT, such as 10.0.0.1:8476")
        if self.processes is None or self.process is None:
            raise InputError("--coordinator: give --processes, and --process of this host, as well")
        if self.processes < 1 or not 0 <= self.process < self.processes:
            raise InputError(f"--process {self.process} of --processes {self.processes}: expected 0 to processes - 1")


def detected(environment: Mapping[str, str]) -> bool:
    """Whether this is one task of several of a Slurm step, or one host of several of a TPU pod."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    slurm = "SLURM_PROCID" in environment and tasks.isdigit() and int(tasks) > 1
    return slurm or "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def connect(hosts: Hosts) -> None:
    """Joins the processes; before any computation. Raises InputError where they do not come together in time."""
    import jax

    try:
        jax.distributed.initialize(
            hosts.coordinator,
            hosts.processes,
            hosts.process,
            initialization_timeout=hosts.timeout,
            heartbeat_timeout_seconds=hosts.timeout,
        )
        if marker := os.environ.get(SUPERVISED):
            Path(marker).write_text("joined")
    except (RuntimeError, ValueError) as error:
        where = hosts.coordinator or "the cluster's coordinator"
        reason = str(error).splitlines()[0][:160]
        raise InputError(
            f"--coordinator: not all processes met at {where} within {hosts.timeout} s ({reason}); "
            "is process 0 running there, and are all of them started?"
        ) from None


def first_host() -> bool:
    """Whether this process writes the run's record; the others read."""
    import jax

    return jax.process_index() == 0


def agree(*values: int) -> np.ndarray:
    """The values of every process, int64 [processes, values]; all processes call it at the same step."""
    import jax

    own = np.array(values, np.int64)
    if jax.process_count() == 1:
        return own[None]
    from jax.experimental import multihost_utils

    # float64 would be cut to float32: whole numbers below 2^24 survive that as well
    return np.asarray(multihost_utils.process_allgather(own.astype(np.int32))).astype(np.int64)


def by_first_host(work: Callable[[], None]) -> None:
    """`work`, which no other host does. What it raises there, all hosts raise: one that went on would wait for ever in
    what all do together.
    """
    error = None
    if first_host():
        try:
            work()
        except Exception as raised:
            error = raised
    text = str(error).encode()[:LONGEST] if error else b""
    of_kinds = [i for i, kind in enumerate(KINDS) if isinstance(error, kind)]
    failed, kind, length = (int(x) for x in agree(error is not None, *of_kinds[:1] or [0], len(text))[0])
    if failed:
        text = bytes(agree(*text.ljust(length))[0, :length].tolist()) if length else b""
        raise error or KINDS[kind](text.decode(errors="replace"))


def supervise(command: Sequence[str], name: str, folder: Path) -> int:
    """Runs the process that trains, and gives its exit code, or 75 with one line where it was ended by a lost host.

    What it writes to its standard error goes to host-NAME.log in the run's folder, but for the last line of an error.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"host-{name}.log"
    with open_log(log, "wb") as log_file, tempfile.NamedTemporaryFile("r") as marker:
        environment = {**os.environ, SUPERVISED: marker.name}
        child = subprocess.Popen(ending_with(os.getpid(), command), stderr=log_file, env=environment)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: child.send_signal(number))
        code = child.wait()
        joined = bool(Path(marker.name).read_text())
    errors = log.read_text(errors="replace").strip().splitlines()
    if code in (DONE, FAILED, PREEMPTED):
        return code
    if code == -signal.SIGABRT and not joined:  # JAX ends a process that finds no coordinator from inside
        errors = [
            "error: --coordinator: the processes did not meet in time; is process 0 running there, and all of them?"
        ]
        code = BAD_INPUT
    if code == BAD_INPUT:  # bad input: nothing is to stay behind
        print(errors[-1] if errors else "error: bad input", file=sys.stderr)
        log.unlink()
        if made and not any(folder.iterdir()):
            folder.rmdir()
        return code
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
    newest = f"the newest checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    reason = f"host {name} stopped ({how}): it or another host died or hung"
    if (folder / "config.json").exists() and not (folder / "result.json").exists():
        write_failure(folder, Failure(reason))
    print(f"error: {reason}; {newest}; the same command on all hosts continues (log: {log})", file=sys.stderr)
    return PREEMPTED


def ending_with(parent: int, command: Sequence[str]) -> list[str]:
    """`command`, as a child of the process `parent` with which it ends, even where that is killed."""
    return [sys.executable, "-I", "-S", "-c", BOUND, str(parent), *command]
