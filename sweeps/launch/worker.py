"""A worker process: takes runs from its standard input, one JSON object a line, and trains them one after another.

It lives on from run to run, so imports and compiled programs are paid for once. What it has to say goes to the launcher
as JSON lines; everything that libraries print goes to its log (standard error). It ends when the launcher does.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: stopped on request, state saved, the same command continues


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cores", default="", help="cores to be pinned to, such as 0 or 0,1")
    parser.add_argument("--parent", type=int, required=True, help="process id of the launcher")
    args = parser.parse_args()
    die_with(args.parent)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the launcher, which passes it on as SIGTERM
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if args.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(core) for core in args.cores.split(",")})

    from models.errors import InputError
    from scaling.run import Execution, RunConfig
    from scaling.runtime import set_up_jax

    set_up_jax()

    from scaling.train import Busy, Preempted, train

    def say(event: str, **fields) -> None:
        channel.write(json.dumps({"event": event, **fields}) + "\n")

    say("ready")
    for line in sys.stdin:
        job = json.loads(line)
        config = RunConfig.from_dict(job["config"])
        run = config.run_id
        try:
            result = train(
                config,
                Path(job["folder"]),
                Execution(**job["execution"]),
                should_stop=stop.is_set,
                report=lambda text, run=run: say("note", run=run, text=text),
                progress=lambda state: say("progress", **state),
            )
            timing, device = result["timing"], result["where"]["device"]
            say("done", run=run, status=result["status"], loss=result["loss"], timing=timing, device=device)
        except Preempted:
            say("preempted", run=run)
        except Busy:
            say("busy", run=run)
        except InputError as error:
            say("failed", run=run, reason=str(error), again=False)
        except Exception as error:  # one run's failure is reported and leaves the others alone
            traceback.print_exc()
            say("failed", run=run, reason=f"{type(error).__name__}: {error}".splitlines()[0], again=True)
        if stop.is_set():
            return EXIT_PREEMPTED
    return 0


def die_with(parent: int) -> None:
    """Ends this process when the launcher's ends, even by kill -9: it would train on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
