"""How a process of ours ends: the command line, workers, the hosts of a run. README.md says it to users."""

DONE = 0
FAILED = 1  # some runs failed or diverged
BAD_INPUT = 2  # another start would end the same way
PREEMPTED = 75  # EX_TEMPFAIL: stopped on request, state saved, the same command continues
