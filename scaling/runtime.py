"""Settings of JAX and XLA that every training process shares, each with its reason."""

import logging
import os
from pathlib import Path

from scaling.data.cache import cache_root


def set_up_jax() -> None:
    """Turns on the persistent compilation cache. To be called before the first computation."""
    import jax

    logging.getLogger("absl").setLevel(logging.ERROR)
    # A program is compiled once a machine, not once a process: compiling costs seconds, as much as a small run.
    folder = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_root() / "compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
