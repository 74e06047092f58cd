"""A real Slurm for the tests: one controller and virtual nodes on this machine, without systemd, in one folder.

Debian's slurm-wlm and munge, run by root. Everything started is ended by process id. By hand:

    python tests/sweeps/slurm_cluster.py install          # as root; does nothing where Slurm is there
    python tests/sweeps/slurm_cluster.py start FOLDER     # then: export SLURM_CONF=FOLDER/slurm.conf; sinfo
    python tests/sweeps/slurm_cluster.py stop FOLDER
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
SECONDS = 30  # to start or to stop
# JAX looks for the first host of a job under its node's name, so that must be a name that resolves.
HOST = socket.gethostname().split(".")[0]
NODES = (HOST, f"{HOST}-2")
CPUS = 2  # of each virtual node, whatever this machine has

# cred_expire: a requeued job waits as long as its old credential lives, 121 seconds by default, before it starts again.
# KillWait: seconds between SIGTERM and SIGKILL for a preempted or cancelled job.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MinJobAge=300
SlurmdTimeout=10
SlurmctldTimeout=10
ReturnToService=2
InactiveLimit=0
Waittime=0
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE
"""


def missing() -> str:
    """Why no Slurm can be started here, or an empty string."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of the tests needs Linux and root"
    lacking = [name for name in NEEDED if found(name) is None]
    return f"{', '.join(lacking)} not installed (apt-get install slurm-wlm munge)" if lacking else ""


def found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def install() -> str:
    """Installs Slurm where it is missing, and says what came of it."""
    if not missing():
        return "Slurm is installed"
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "Slurm not installed: that needs root and apt-get"
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    package = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "slurm-wlm", "munge"]
    for command in (["apt-get", "update", "-qq"], package):
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=quiet, timeout=300, stdout=subprocess.DEVNULL, check=False)
    return f"Slurm not installed: {missing()}" if missing() else "Slurm is installed"


def start(folder: Path) -> None:
    """Starts the cluster and waits until both nodes are idle. Raises RuntimeError with the logs' last lines if not."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    ports = free_ports(1 + len(NODES))
    nodes = []
    for name, port in zip(NODES, ports[1:], strict=True):
        (folder / f"spool-{name}").mkdir()
        nodes.append(f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory=4096")
    text = CONFIGURATION.format(folder=folder, port=ports[0], host=HOST, nodes="\n".join(nodes))
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    munge = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    try:
        spawn(folder, "munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge)
        wait_until(lambda: (folder / "munge.socket").exists())
        spawn(folder, "slurmctld", "slurmctld", "-D")
        for name in NODES:
            start_node(folder, name)
        wait_until(lambda: ask(folder, "sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == str(len(NODES)))
    except TimeoutError:
        said = {log.name: log.read_text(errors="replace").splitlines()[-3:] for log in sorted(folder.glob("*.log"))}
        stop(folder)
        raise RuntimeError(f"Slurm did not start within {SECONDS} s: {said}") from None


def start_node(folder: Path, name: str) -> int:
    """Starts the daemon of a virtual node; returns its process id."""
    return spawn(folder, f"slurmd-{name}", "slurmd", "-D", "-N", name)


def end_node(folder: Path, name: str) -> None:
    """Ends a virtual node at once, as when its power fails: the daemon and all that runs there."""
    ended = [int((folder / f"slurmd-{name}.started").read_text()), *steps(folder, name)]
    for pid in [*ended, *descendants(ended)]:
        kill(pid, signal.SIGKILL)


def stop(folder: Path) -> None:
    """Ends all that the cluster started."""
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        ask(folder, "scancel", "--state=PENDING", "--user=root")
    left = [pid for name in NODES for pid in steps(folder, name)]
    left += [int(p.read_text()) for p in folder.glob("*.started")]
    left = [*left, *descendants(left)]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in left:
            kill(pid, number)
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not any(Path(f"/proc/{pid}").exists() and not zombie(pid) for pid in left), 5)
            break
    for marker in folder.glob("*.started"):
        marker.unlink()


def ask(folder: Path, *command: str) -> str:
    """What one of Slurm's commands answers."""
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    answer = subprocess.run(
        [found(command[0]), *command[1:]], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    return answer.stdout.strip()


def spawn(folder: Path, name: str, program: str, *options: str) -> int:
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    with open(folder / f"{name}.out.log", "ab") as log:
        process = subprocess.Popen(
            [found(program), *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    (folder / f"{name}.started").write_text(str(process.pid))
    process.returncode = 0  # it is ended by its id, maybe by another process: no warning at the end of this one
    return process.pid


def steps(folder: Path, node: str) -> list[int]:
    """Process ids of the daemons of the job steps on a virtual node; they outlive the node's own daemon."""
    log = str(folder / f"slurmd-{node}.log")
    return [pid for pid, line in processes() if line.startswith("slurmstepd:") and log in opened(pid)]


def opened(pid: int) -> set[str]:
    """The files that a process holds open."""
    files = set()
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                files.add(os.readlink(link))
    return files


def processes() -> list[tuple[int, str]]:
    """(process id, command line) of all processes."""
    every = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            every.append((int(entry.name), line.decode("utf8", "replace")))
    return every


def descendants(pids: list[int]) -> list[int]:
    parents = {}
    for pid, _ in processes():
        with contextlib.suppress(OSError, ValueError):
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    below, newest = set(), set(pids)
    while newest:
        newest = {pid for pid, parent in parents.items() if parent in newest} - below
        below |= newest
    return sorted(below)


def zombie(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return False


def kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def wait_until(condition, seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def main(arguments: list[str]) -> int:
    if arguments == ["install"]:
        print(install())
    elif len(arguments) == 2 and arguments[0] == "start":
        start(Path(arguments[1]).absolute())
        print(f"export SLURM_CONF={Path(arguments[1]).absolute()}/slurm.conf")
    elif len(arguments) == 2 and arguments[0] == "stop":
        stop(Path(arguments[1]).absolute())
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
