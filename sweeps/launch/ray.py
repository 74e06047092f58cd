"""Runs a sweep on a Ray cluster: tasks with resources and retries, each of which is a worker over the sweep's folder.

A task whose node is lost is started elsewhere by Ray, and the run it had is continued by whichever worker is free. The
launcher owns the tasks and stays until the end; Ctrl-C lets the workers save, and a second launch continues. The
sweep's folder and the Python environment must lie on a file system that all nodes share.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from models.errors import InputError
from scaling.exit_codes import PREEMPTED
from sweeps.launch.engine import Standing, follow, standing, worker_command, workers_wanted
from sweeps.launch.placement import Placement
from sweeps.launch.supervisor import GRACE_SECONDS, Start, Supervisor

HANDED_ON = ("JAX_", "XLA_", "SCALING_", "PYTHONPATH")  # beginnings of the environment's names; Slurm hands on all


def launch(
    folder: Path,
    placement: Placement,
    show: Callable[[str], None] = print,
    command: Sequence[str] | None = None,
) -> Standing:
    """Trains what is missing of a prepared sweep; returns once all runs have ended or no task is left.

    `command` is the worker's, by default `python -m sweeps.launch.worker FOLDER`. On SIGTERM or Ctrl-C the workers save
    their state and SystemExit(75) is raised. Raises InputError where Ray is missing or its cluster cannot be reached.
    """
    folder = folder.absolute()
    if placement.nodes > 1:
        raise InputError(f"nodes = {placement.nodes}: with --on ray a run has one node; use --on slurm for several")
    ray = import_ray()
    now = standing(folder)
    if now.left == 0:
        show(f"{now}: nothing to do")
        return now
    with contextlib.ExitStack() as stack:
        connect(ray, placement, stack)
        asked = threading.Event()  # an exception could come up within Ray, and be lost there

        def ask(*_: object) -> None:
            if asked.is_set():  # asked twice: leave now
                raise KeyboardInterrupt
            asked.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, ask))
        if lacking := lacks(placement, ray.cluster_resources()):
            show(f"the cluster has not enough {lacking} for a worker; waiting for a node that has")
        attended = ray.remote(attend).options(**options(placement))
        environment = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
        work = list(command or worker_command(folder))
        tasks = [attended.remote(folder, work, environment) for _ in range(workers_wanted(placement, now.left))]

        def alive() -> int:
            if asked.is_set():
                raise KeyboardInterrupt
            return len(tasks) - len(ended(ray, tasks))

        try:
            end = follow(folder, alive, show, every=1.0)
        except KeyboardInterrupt:
            show("stopping: workers save their state; launch again to continue")
            stop(ray, tasks)
            raise SystemExit(PREEMPTED) from None
        for task in ended(ray, tasks):
            if problem := trouble(ray, task):
                show(problem)
        stop(ray, tasks)  # those that wait for a node, or for a run that another launcher has ended
    return end


def import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError("--on ray: Ray is not installed; pip install 'scaling-laws[ray]'") from None
    return ray


def connect(ray: Any, placement: Placement, stack: contextlib.ExitStack) -> None:
    """Joins the cluster, or starts one on this machine that ends with `stack`."""
    if ray.is_initialized():
        return
    try:
        ray.init(address=placement.ray_address or "local", log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise InputError(f"ray_address = {placement.ray_address!r}: no Ray cluster there ({reason})") from None
    stack.callback(ray.shutdown)


def options(placement: Placement) -> dict[str, Any]:
    """What Ray is asked for, of each worker. An exception is the worker's last word; a lost node or process is not."""
    asked = {"num_cpus": placement.cpus, "num_gpus": placement.gpus, "resources": placement.ray_resources}
    if placement.memory_gib is not None:
        asked["memory"] = int(placement.memory_gib * 2**30)
    return {**asked, "max_retries": placement.requeues, "retry_exceptions": False}


def lacks(placement: Placement, total: dict[str, float]) -> str:
    """The resources of which the whole cluster has less than one worker needs, or an empty string."""
    wanted = {"CPU": placement.cpus, "GPU": placement.gpus, **placement.ray_resources}
    return ", ".join(name for name, amount in wanted.items() if amount > total.get(name, 0))


def attend(folder: Path, command: list[str], environment: dict[str, str]) -> int:
    """The task: a worker as a child process, so that what it does to signals and to JAX is its own affair."""
    os.environ.update(environment)
    # Ray cancels by an interrupt, which is lost where a cluster was started in the background, with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = folder / "logs" / f"ray-{socket.gethostname()}-{os.getpid()}.log"
    log.parent.mkdir(exist_ok=True)
    supervisor = Supervisor(folder, [Start(command, log)])
    try:
        return supervisor.run()
    finally:
        supervisor.end()  # where the task was cancelled: Ray raises KeyboardInterrupt in it


def ended(ray: Any, tasks: list) -> list:
    return ray.wait(tasks, num_returns=len(tasks), timeout=0, fetch_local=False)[0]


def trouble(ray: Any, task: Any) -> str:
    """What went wrong with a task that has ended, or an empty string."""
    try:
        code = ray.get(task)
    except ray.exceptions.RayError as error:
        return f"a worker was lost: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return f"a worker ended with exit code {code}" if code else ""


def stop(ray: Any, tasks: list) -> None:
    """Lets the workers save and leave."""
    for task in tasks:
        ray.cancel(task)
    end = time.monotonic() + GRACE_SECONDS
    while len(ended(ray, tasks)) < len(tasks) and time.monotonic() < end:
        time.sleep(0.1)
