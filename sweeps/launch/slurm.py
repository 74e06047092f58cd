"""Runs a sweep on a Slurm cluster, through submitit: a job array of workers, each looping over the sweep's folder.

A worker that is preempted, whose time is up or whose node is lost saves its state where it still can and is queued
again; whichever worker comes next continues the run. The launcher may go away once the jobs are submitted. The sweep's
folder and the Python environment must lie on a file system that all nodes share.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import InputError
from scaling.exit_codes import BAD_INPUT, DONE
from scaling.folder import read_json, write_atomically
from sweeps.launch.attempts import ATTEMPTS
from sweeps.launch.engine import Standing, follow, standing, worker_command, workers_wanted
from sweeps.launch.placement import Placement
from sweeps.launch.supervisor import Start, Supervisor

JOB = re.compile(r"\d+(_\d+)?")  # of an array, 12_0


def launch(
    folder: Path,
    placement: Placement,
    show: Callable[[str], None] = print,
    wait: bool = False,
    command: Sequence[str] | None = None,
) -> Standing:
    """Submits the workers of a prepared sweep and returns; with `wait`, once all runs have ended or no job is left.

    Jobs of an earlier launch that still wait or run are counted: only what they lack of the wanted workers is added.
    Ctrl-C ends the waiting, not the jobs. Writes the jobs' ids to slurm.json in the sweep's folder. `command` is the
    worker's, by default `python -m sweeps.launch.worker FOLDER`. Raises InputError where there is no Slurm or submitit,
    or the cluster refuses the jobs.
    """
    folder = folder.absolute()
    submitit = import_submitit()
    now = standing(folder)
    if now.left == 0:
        show(f"{now}: nothing to submit")
        return now
    earlier = sorted(set(read_jobs(folder)) & queued(), key=job_order)
    wanted = workers_wanted(placement, now.left)
    if earlier:
        show(
            f"{len(earlier)} workers of an earlier launch still wait or run (jobs {', '.join(earlier)}); "
            f"{max(wanted - len(earlier), 0)} more are submitted"
        )
    jobs = list(earlier)
    if wanted > len(earlier):
        work = Work(folder, list(command or worker_command(folder)), placement.nodes, placement.notice)
        jobs += submit(submitit, work, folder, placement, wanted - len(earlier))
        show(f"submitted {wanted - len(earlier)} workers: jobs {', '.join(jobs[len(earlier) :])}")
    write_atomically(folder / "slurm.json", json.dumps({"jobs": jobs, "submitted": time.time()}) + "\n")
    show(f"follow with: scaling status {folder}; end with: scancel {' '.join(array_ids(jobs))}")
    if not wait:
        return now
    try:
        end = follow(folder, lambda: still_queued(jobs), show)
        if end.left:
            show(f"no job is left; their output is in {folder / 'logs' / 'slurm'}")
        return end
    except KeyboardInterrupt:
        show(f"no longer following; the jobs go on (end them with: scancel {' '.join(array_ids(jobs))})")
        return standing(folder)


def import_submitit() -> Any:
    """Raises InputError where submitit or Slurm's own commands are missing: to be asked before anything is written."""
    try:
        import submitit
    except ImportError:
        raise InputError("--on slurm: submitit is not installed; pip install 'scaling-laws[slurm]'") from None
    if shutil.which("srun") is None:
        raise InputError("--on slurm: srun is not found; launch from a login node of the cluster")
    return submitit


def submit(submitit: Any, work: "Work", folder: Path, placement: Placement, workers: int) -> list[str]:
    """The ids of the submitted jobs, such as 17_0. Raises InputError where the cluster refuses them."""
    executor = submitit.SlurmExecutor(folder / "logs" / "slurm", max_num_timeout=placement.requeues)
    executor.update_parameters(**sbatch_parameters(folder.name, placement))
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the error says it as well
            jobs = executor.submit_array([work] * workers) if workers > 1 else [executor.submit(work)]
    except (submitit.core.utils.FailedSubmissionError, submitit.core.utils.UncompletedJobError) as error:
        for task in (folder / "logs" / "slurm").glob(f"{'?' * 32}.pkl"):  # of submitit, for the jobs that are not to be
            task.unlink()
        raise InputError(f"--on slurm: the cluster refuses the jobs ({reason_of(str(error))})") from None
    return [job.job_id for job in jobs]


def reason_of(error: str) -> str:
    """What sbatch said, without what it says each time."""
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ") for line in error.strip().splitlines()]
    reasons = [line for line in lines if line.strip() and not line.startswith("Try ")]
    marked = [line for line in reasons if f"sbatch: {line}" in error or f"sbatch: error: {line}" in error]
    return "; ".join(marked or reasons[-1:]) or "no reason given"


def sbatch_parameters(name: str, placement: Placement) -> dict[str, Any]:
    """The options of sbatch and srun, by submitit's names: a task on each node, which is how JAX finds the hosts."""
    optional = {key: getattr(placement, key) for key in ("partition", "account", "qos", "constraint")}
    parameters = {key: value for key, value in optional.items() if value}
    if placement.memory_gib is not None:
        parameters["mem"] = f"{round(placement.memory_gib * 1024)}M"
    if placement.gpus:
        parameters["gpus_per_node"] = placement.gpus
    if placement.setup:
        parameters["setup"] = list(placement.setup)
    return {
        **parameters,
        "job_name": name,
        "time": placement.minutes,
        "signal_delay_s": placement.notice,
        "nodes": placement.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": placement.cpus,
        # Since Slurm 22.05 srun does not take the cores of a task from sbatch. A host that has saved and left must not
        # take the others, which still write, with it.
        "srun_args": [f"--cpus-per-task={placement.cpus}", "--kill-on-bad-exit=0"],
        "stderr_to_stdout": True,
        "array_parallelism": 10_000,
        # requeue: after a preemption or the loss of a node, also where the cluster's default is otherwise
        "additional_parameters": {"requeue": True, **placement.sbatch},
    }


@dataclass
class Work:
    """What submitit runs in each task of a job.

    At submitit's signal (the time limit comes near) `checkpoint` lets the worker save, then submitit requeues the job.
    At SIGTERM (preemption, scancel) the worker saves and the job ends; a preempted one Slurm requeues by itself.
    """

    folder: Path
    command: list[str]
    nodes: int
    notice: int  #: seconds to save in
    supervisor: Supervisor | None = None

    def __call__(self) -> int:
        # A host that dies takes the others' JAX with it: all start again together.
        self.supervisor = Supervisor(self.folder, [Start(self.command)], again=self.nodes == 1)
        signal.signal(signal.SIGTERM, lambda *_: self.supervisor.leave())
        code = self.supervisor.run()
        if self.nodes > 1 and code not in (DONE, BAD_INPUT) and self.supervisor.asked is None:
            requeue(os.environ, begun=not self.supervisor.stillborn)
        if code:
            raise SystemExit(code)  # not an error for submitit to keep
        return code

    def checkpoint(self) -> Any:
        """Called by submitit on the first host; the training loop tells the other hosts."""
        from submitit.core.utils import DelayedSubmission

        if self.supervisor is not None:
            self.supervisor.end(max(self.notice - 10, 5))
        return DelayedSubmission(Work(self.folder, self.command, self.nodes, self.notice))


def requeue(environment: Any, begun: bool) -> None:
    """Queues this job again: a run that it had `begun` has its attempts counted, else Slurm counts the restarts."""
    if begun or int(environment.get("SLURM_RESTART_COUNT", "0")) < ATTEMPTS:
        job = environment.get("SLURM_ARRAY_JOB_ID")
        name = f"{job}_{environment['SLURM_ARRAY_TASK_ID']}" if job else environment["SLURM_JOB_ID"]
        # the second host to ask is refused, which is as well
        subprocess.run(["scontrol", "requeue", name], timeout=60, check=False)


def read_jobs(folder: Path) -> list[str]:
    """The ids of the jobs of the latest launches; none where there was no launch. Raises InputError where damaged."""
    path = folder / "slurm.json"
    if not path.exists():
        return []
    jobs = read_json(path).get("jobs")
    if not isinstance(jobs, list) or not all(isinstance(job, str) and JOB.fullmatch(job) for job in jobs):
        raise InputError(f"{path}: jobs is no list of the ids of jobs; remove it")
    return jobs


def queued() -> set[str]:
    """Ids of this user's jobs that wait or run. Raises InputError where Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%i"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except FileNotFoundError:
        raise InputError("--on slurm: squeue is not found; launch from a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise InputError("--on slurm: squeue gives no answer within 60 s") from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no reason given"]
        raise InputError(f"--on slurm: squeue fails ({lines[-1]})") from None
    return set(answer.stdout.split())


def still_queued(jobs: Sequence[str]) -> int:
    """How many of the jobs wait or run; all of them while a restarting controller gives no answer."""
    try:
        return len(set(jobs) & queued())
    except InputError:
        return len(jobs)


def job_order(job: str) -> list[int]:
    return [int(part) for part in job.split("_")]


def array_ids(jobs: Sequence[str]) -> list[str]:
    """12 for 12_0, 12_1 and so on: what scancel takes."""
    return list(dict.fromkeys(job.split("_")[0] for job in jobs))
