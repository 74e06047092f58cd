"""One holder a run folder, over every machine that shares the file system: numbered files, beats, and no clock.

A holder is whoever made the file `lease-N` of the highest N. Making it is exclusive, the highest is never removed, and
taking over (from a process that is gone, or that released N) is making N + 1: of several who try, one succeeds. Locks
and times of files are not asked, since neither is sure to be shared or right on a network file system.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

EXPIRE = 60.0  # seconds without a beat after which a holder on another machine counts as gone
BEATS = 6  # of the holder in that time
LONGEST = 3600.0  # seconds between beats that a holder may announce
LEASE = re.compile(r"lease-(\d{6,12})")
LENGTH = 512  # bytes: constant, so that a beat is one overwritten block, which a full disk does not refuse


class Busy(Exception):
    """Another process is training this run."""


class Lost(Busy):
    """This process held the run, was thought gone, and another one took over: it must write no more."""


class Seen(NamedTuple):
    generation: int
    raw: bytes
    at: float  # seconds of this process's monotonic clock


class Leases:
    """What this process has seen of the leases of others: who polls with it finds the expired ones without sleeping.

    `clock`: seconds, monotonic.
    """

    def __init__(self, expire: float = EXPIRE, clock: Callable[[], float] = time.monotonic) -> None:
        self.expire, self.clock = expire, clock
        self._seen: dict[Path, Seen] = {}

    def holder(self, folder: Path) -> dict[str, Any] | None:
        """The record of the holder (see `holder` below), or None where the run can be taken at once."""
        return self.look(folder)[1]

    def look(self, folder: Path) -> tuple[int, dict[str, Any] | None]:
        """(highest generation or 0, its holder or None where that is free: none, released, dead or expired)."""
        generation, raw = newest(folder)
        record = parse(raw)
        living = alive(record)
        if generation == 0 or record.get("released") or living is False:
            self._seen.pop(folder, None)
            return generation, None
        seen = self._seen.get(folder)
        if seen is None or (seen.generation, seen.raw) != (generation, raw):
            seen = self._seen[folder] = Seen(generation, raw, self.clock())
        # The holder's own pace counts where it is the slower one: two settings must not make two holders.
        patience = max(self.expire, BEATS * record.get("every", 0.0))
        if living is None and self.clock() - seen.at >= patience:
            return generation, None
        return generation, {**record, "generation": generation, "here": bool(living)}

    def last(self, folder: Path) -> Seen | None:
        """The newest sign of life noticed so far; None where there was no holder."""
        return self._seen.get(folder)


class Held:
    """A lease that this process holds; beats until it is released."""

    def __init__(self, folder: Path, generation: int, file: int, record: dict[str, Any]) -> None:
        self.folder, self.generation = folder, generation
        self._file, self._record, self._done = file, record, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises Lost where another process has taken over: to be asked before anything of the run is written."""
        try:
            # Opening, unlike listing, asks a file server anew; and who took over removes this file before it begins.
            os.close(os.open(self.folder / name(self.generation), os.O_RDONLY))
            superseded = generations(self.folder)[-1] > self.generation
        except (FileNotFoundError, IndexError):
            superseded = True
        if superseded:
            raise Lost(f"{self.folder}: another process took this run over while this one was silent")

    def _beat(self) -> None:
        while not self._done.wait(self._record["every"]):
            self._record["beat"] += 1
            with suppress(OSError):  # a file server away for a moment; `check` says whether it was too long
                write(self._file, self._record)

    def release(self) -> None:
        """Marks the lease as over. The file stays: its number must not be given twice."""
        self._done.set()
        self._thread.join()
        with suppress(OSError):  # then the end of this process says the same
            write(self._file, {**self._record, "released": True})
        os.close(self._file)


@contextmanager
def lease(
    folder: Path,
    expire: float = EXPIRE,
    leases: Leases | None = None,
    memory: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Held]:
    """Holds the run in `folder`, which is made if need be, while this process lives. Raises Busy where another does.

    A holder of this machine is known to live or not at once; of one elsewhere a sign of life is waited for, at most
    `expire` seconds, unless `leases` has watched it before: with that it is decided without waiting.
    `memory`: bytes that the run will take, told to who looks.
    """
    watch = leases or Leases(expire)
    first: Seen | None = None
    while True:
        generation, who = watch.look(folder)
        if who is None:
            folder.mkdir(parents=True, exist_ok=True)
            if (held := take(folder, generation + 1, expire, memory)) is not None:
                break
            if leases is not None:
                raise Busy(f"{folder}: another process has just taken this run")
        elif leases is not None or alive(who) or first not in (None, watch.last(folder)):
            raise Busy(f"{folder}: another process is training this run ({describe(who)})")
        elif first is None:
            first = watch.last(folder)
            report(f"{folder}: left by {describe(who)}; watching for up to {watch.expire:.0f} s whether that lives")
        time.sleep(min(1.0, watch.expire / 20))
    try:
        yield held
    finally:
        held.release()


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the run, at one look that disturbs nobody, or None.

    Of a process: machine, pid, generation, beat, every (seconds between beats), bytes (of memory, or None), here
    (whether it runs on this machine, where it is known to live). One look cannot tell whether a process elsewhere
    lives; here, and only here, the file's time is asked, and ten minutes of silence count as its end.
    """
    generation, raw = newest(folder)
    record = parse(raw)
    living = alive(record)
    if generation == 0 or record.get("released") or living is False:
        return None
    if living is None:
        with suppress(OSError):
            if time.time() - (folder / name(generation)).stat().st_mtime > 10 * EXPIRE:
                return None
    return {**record, "generation": generation, "here": bool(living)}


def take(folder: Path, generation: int, expire: float, memory: int | None) -> Held | None:
    """The lease of this generation, or None where another process was faster."""
    path = folder / name(generation)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        if not path.is_file() or path.is_symlink():  # no lease, and in the way of one: the next look finds it free
            with suppress(OSError):  # another process was faster
                path.rename(folder / f"damaged-{path.name}-{uuid.uuid4().hex[:8]}")
        return None
    record = {
        "host": this_host(),
        "machine": socket.gethostname(),
        "pid": os.getpid(),
        "start": start_time(os.getpid()),
        "every": expire / BEATS,
        "bytes": memory,
        "beat": 0,
    }
    try:
        write(file, record)
        # The one before may have been taken over, and this number used and removed, since we looked. Whoever did so
        # made a higher one first, which is there to be seen.
        is_newest = generations(folder)[-1] == generation
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(file)
        raise
    if not is_newest:
        path.unlink(missing_ok=True)
        os.close(file)
        return None
    for older in generations(folder):
        if older < generation:
            (folder / name(older)).unlink(missing_ok=True)
    return Held(folder, generation, file, record)


def name(generation: int) -> str:
    return f"lease-{generation:06}"


def generations(folder: Path) -> list[int]:
    """The numbers of the leases in a folder, ascending. What is no file (a folder of such a name) is no lease."""
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
        named = ((int(match[1]), entry) for entry in entries if (match := LEASE.fullmatch(entry.name)))
        return sorted(n for n, entry in named if name(n) == entry.name and entry.is_file(follow_symlinks=False))
    return []


def newest(folder: Path) -> tuple[int, bytes]:
    """(highest generation, content of its file), or (0, b"")."""
    for _ in range(10):
        numbers = generations(folder)
        if not numbers:
            return 0, b""
        with suppress(FileNotFoundError):  # removed since, for a higher one
            return numbers[-1], (folder / name(numbers[-1])).read_bytes()
    return numbers[-1], b""


def write(file: int, record: dict[str, Any]) -> None:
    os.pwrite(file, json.dumps(record).encode().ljust(LENGTH - 1) + b"\n", 0)
    os.fsync(file)


def parse(raw: bytes) -> dict[str, Any]:
    """The object in a lease; empty where it is not whole: just being made, overwritten while read, or damaged."""
    try:
        record = json.loads(raw)
        pid, every, memory = record["pid"], record["every"], record.get("bytes")
    except (ValueError, RecursionError, TypeError, KeyError):
        return {}
    whole = type(pid) is int and 0 < pid < 2**31 and type(every) in (int, float) and 0 < every <= LONGEST
    return record if whole and (memory is None or type(memory) is int) and type(record.get("beat")) is int else {}


def alive(record: dict[str, Any]) -> bool | None:
    """Whether the process lives; None where that cannot be known from here, and only its beats tell."""
    if record.get("host") != this_host():
        return None
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    start = start_time(record["pid"])
    if start is None:
        return None
    return start == record.get("start")


@cache
def this_host() -> str:
    """The same for two processes if and only if they see each other's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {socket.gethostname()}"
    except OSError:  # not Linux
        return f"{uuid.getnode():012x} {socket.gethostname()}"


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; 0 for one that has ended, None where it cannot be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def describe(record: dict[str, Any]) -> str:
    return f"process {record.get('pid', '?')} on {record.get('machine', '?')}"
