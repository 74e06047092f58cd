"""Settings of JAX and XLA that every training process shares, each with its reason."""

import logging
import os
import platform
from pathlib import Path

from scaling.data.cache import cache_root


def cores() -> list[int]:
    """The CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def processor() -> str:
    """The CPU by its maker's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def compilation_cache() -> Path:
    """Where compiled programs are kept from process to process."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_root() / "compiled")


def set_up_jax(cpu_devices: int = 1) -> None:
    """Turns on the persistent compilation cache and exact GPU programs. To be called before the first computation.

    On a CPU, `cpu_devices` virtual devices are made, at most one a core, for a mesh over the cores of this process.
    """
    # The parts of a batch then run beside each other, where a product split over the threads of one device waits for
    # the slowest at its end (docs/performance.md has the rates of both). Without effect where an accelerator is.
    if 1 < cpu_devices <= len(cores()) and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        flag = f"--xla_force_host_platform_device_count={cpu_devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    # On a GPU a scatter-add (the embedding's gradient) sums in any order unless told not to: the same run must give the
    # same bits. Without a GPU the flag has no effect.
    flag = "--xla_gpu_deterministic_ops=true"
    if "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    import jax

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # A program is compiled once a machine, not once a process: compiling costs seconds, as much as a small run.
    jax.config.update("jax_compilation_cache_dir", str(compilation_cache()))
    shortest = os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(shortest))
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
