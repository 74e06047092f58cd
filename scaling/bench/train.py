"""How fast the training engine is on this machine: `scaling bench train`.

Each row is one shape, trained by the engine's own program on random tokens in processes of their own: one process with
one device, and on CPU also one with a virtual device a core (`--mesh data=2`), and two that are pinned to a core each
and timed over the same seconds.
"""

import json
import math
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.config import ModelConfig
from models.errors import InputError
from models.sizing import shape
from scaling.config import DataConfig, OptimConfig, RunConfig
from scaling.engine.runtime import cores, processor
from scaling.execution import Execution

# Dense peak FLOP/s in bfloat16, without sparsity, from the makers' data sheets; the name is JAX's `device_kind`.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


@dataclass(frozen=True)
class Shape:
    """A row of the table. Block of 12 D^2 parameters: multi-head attention, feed-forward of 4 D with squared ReLU."""

    d_model: int
    n_layers: int
    batch: int
    seq_len: int
    n_heads: int
    vocab_size: int = 256
    dtype: str = "float32"
    remat: str = "none"

    def run(self) -> RunConfig:
        model = ModelConfig(
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            activation="relu2",
            qk_norm=False,
        )
        return RunConfig(
            model=model,
            data=DataConfig(seq_len=self.seq_len),
            optim=OptimConfig(lr=1e-3),
            batch_size=self.batch,
            dtype=self.dtype,
        )

    @property
    def flops(self) -> float:
        """FLOPs of a training step: 6 N B T + 6 L D T B T with N = 12 L D^2 + V D. Attention counts its causal half."""
        n = 12 * self.n_layers * self.d_model**2 + self.vocab_size * self.d_model
        return 6.0 * (n + self.n_layers * self.d_model * self.seq_len) * self.batch * self.seq_len


CPU = (Shape(32, 2, 16, 128, 1), Shape(64, 3, 16, 128, 2), Shape(128, 4, 16, 128, 4), Shape(256, 6, 8, 256, 8))
GPU = (
    Shape(768, 12, 32, 1024, 12, 32_768, "bfloat16"),  # 124M without the embedding's copy of the vocabulary
    Shape(1024, 24, 16, 1024, 16, 32_768, "bfloat16"),  # 350M
    Shape(2048, 24, 16, 1024, 16, 32_768, "bfloat16", "dots"),  # 1.3B
)
PRESETS = {"cpu": CPU, "gpu": GPU, "all": CPU + GPU}


def bench(preset: str, seconds: float, profile: Path | None) -> list[dict[str, Any]]:
    """A row per shape and number of processes. Raises InputError for shapes that want an accelerator, on a CPU."""
    rows = []
    for case in PRESETS[preset]:
        on_cpu = case in CPU
        all_cores = cores()
        groups = [(1, [all_cores])]
        if on_cpu and len(all_cores) > 1:
            groups += [(math.gcd(len(all_cores), case.batch), [all_cores]), (1, [[all_cores[0]], [all_cores[1]]])]
        for devices, group in groups:
            trace = profile / f"d{case.d_model}-{len(group)}x{devices}" if profile else None
            rows.append(row(case, devices, measured(case, "cpu" if on_cpu else "", devices, group, seconds, trace)))
    return rows


def measured(
    case: Shape, platform: str, devices: int, group: list[list[int]], seconds: float, trace: Path | None
) -> list[dict]:
    """What each process of a group reports, each pinned to its cores; all are compiled before any is timed."""
    environment = {**os.environ, **({"JAX_PLATFORMS": platform} if platform else {})}
    flags = environment.get("XLA_FLAGS", "").split()
    environment["XLA_FLAGS"] = " ".join(f for f in flags if "host_platform_device_count" not in f)
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compile time is measured
    with ExitStack() as stack:
        processes = []
        for i, pinned in enumerate(group):
            where = str(trace / str(i)) if trace else ""
            job = {"shape": asdict(case), "cores": pinned, "devices": devices, "seconds": seconds, "trace": where}
            command = [sys.executable, "-m", "scaling.bench.train", json.dumps(job)]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        for process in processes:
            answer(process)  # ready
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        return [answer(process) for process in processes]


def accelerator() -> bool:
    """Whether JAX finds more than a CPU; asked in a process of its own, which then lets go of the device."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.split()[-1:] != ["cpu"]


def answer(process: subprocess.Popen) -> dict[str, Any]:
    line = process.stdout.readline()
    if not line:
        raise InputError(f"bench: a measuring process ended with status {process.wait()} (its words stand above)")
    report = json.loads(line)
    if "error" in report:
        raise InputError(report["error"])
    return report


def row(case: Shape, devices: int, reports: list[dict]) -> dict[str, Any]:
    """The rates of the processes added up; times and memory of the slowest and largest."""
    rate = sum(1 / r["step_seconds"] for r in reports)
    worst = max(reports, key=lambda r: r["step_seconds"])
    flops, peak = case.flops * rate, sum(r["peak_flops"] for r in reports)
    return {
        "d_model": case.d_model,
        "n_layers": case.n_layers,
        "batch": case.batch,
        "seq_len": case.seq_len,
        "processes": len(reports),
        "devices": devices,
        "gflops": round(flops / 1e9, 2),
        "tokens_per_second": round(case.batch * case.seq_len * rate, 1),
        "share_of_peak": round(flops / peak, 4),
        "compile_seconds": round(max(r["compile_seconds"] for r in reports), 2),
        "step_seconds": worst["step_seconds"],
        "step_seconds_p10": worst["step_seconds_p10"],
        "step_seconds_p90": worst["step_seconds_p90"],
        "peak_bytes": max(r["peak_bytes"] for r in reports),
        "peak_gflops": round(peak / 1e9, 1),
        "peak_from": worst["peak_from"],
        "dtype": case.dtype,
        "vocab_size": case.vocab_size,
        "device": worst["device"],
        "jax": worst["jax"],
    }


def measure(job: dict[str, Any]) -> None:
    """One process of a row: prints a line when it is ready, waits for a line, prints its report."""
    if job["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job["cores"])
    from scaling.engine.runtime import set_up_jax

    set_up_jax(job["devices"])
    import jax

    from scaling.engine.program import CHUNK_STEPS, program_for
    from scaling.engine.sharding import batch_sharding, make_mesh

    case = Shape(**job["shape"])
    config, device = case.run(), jax.devices()[0]
    if case not in CPU and device.platform == "cpu":
        shape_is = f"{shape(config.model)}, {case.batch}x{case.seq_len}"
        print(json.dumps({"error": f"preset: {shape_is} wants an accelerator, none is here; --preset cpu"}), flush=True)
        return
    mesh = make_mesh(f"data={job['devices']}" if job["devices"] > 1 else "")
    program = program_for(config, Execution(remat=case.remat), mesh)
    rng = np.random.default_rng(0)
    if mesh.size == 1:
        corpus = jax.device_put(rng.integers(0, case.vocab_size, 2**20).astype(np.uint16))
        starts = rng.integers(0, 2**20 - case.seq_len - 1, (CHUNK_STEPS, case.batch)).astype(np.int32)
        data = {"whole": {"tokens_BU": corpus}, "start_XB": starts}
    else:
        tokens = rng.integers(0, case.vocab_size, (CHUNK_STEPS, case.batch, case.seq_len + 1)).astype(np.int32)
        data = {"batch_X": {"tokens_BU": jax.device_put(tokens, batch_sharding(mesh, axis=1))}}
    lr, decay = np.full(CHUNK_STEPS, 1e-4, np.float32), np.full(CHUNK_STEPS, 1e-5, np.float32)
    state = program.init(jax.random.key(0))
    jax.block_until_ready(state)
    began = time.perf_counter()
    steps = program.steps.lower(state, {}, data, lr, decay, 1).compile()
    compile_seconds = time.perf_counter() - began

    def call(n: int) -> float:
        """Seconds of a call of n steps, to the arrival of its losses."""
        nonlocal state
        began = time.perf_counter()
        state, metrics = steps(state, {}, data, lr, decay, n)
        jax.device_get(metrics)
        return time.perf_counter() - began

    call(1)
    n = int(np.clip(0.25 / call(1), 1, CHUNK_STEPS))
    peak, peak_from = PEAKS.get(device.device_kind, 0.0), f"{device.device_kind}, data sheet, bfloat16"
    if not peak or case.dtype != "bfloat16":
        peak, peak_from = matrix_product(case.dtype), f"measured, {case.dtype} matrix product"
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.readline()
    times, began = [], time.perf_counter()
    while time.perf_counter() - began < job["seconds"] or len(times) < 3:
        times.append(call(n) / n)
    if job["trace"]:
        with jax.profiler.trace(job["trace"]):
            call(n)
    report = {
        "step_seconds": float(np.median(times)),
        "step_seconds_p10": float(np.quantile(times, 0.1)),
        "step_seconds_p90": float(np.quantile(times, 0.9)),
        "compile_seconds": compile_seconds,
        "peak_bytes": peak_bytes(device),
        "peak_flops": peak,
        "peak_from": peak_from,
        "device": device_name(device),
        "jax": jax.__version__,
    }
    print(json.dumps(report), flush=True)


def matrix_product(dtype: str, size: int = 1024) -> float:
    """FLOP/s of a square matrix product: the best of a second's tries."""
    import jax
    import jax.numpy as jnp

    x = jnp.ones((size, size), dtype)
    times_x = jax.jit(lambda y: x @ y)
    y = jax.block_until_ready(times_x(x))
    best, until = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < until:
        began = time.perf_counter()
        jax.block_until_ready(times_x(y * 1e-3))
        best = min(best, time.perf_counter() - began)
    return 2.0 * size**3 / best


def peak_bytes(device: Any) -> int:
    """The most memory that was held: on the device where it reports that, else by this process, JAX itself included."""
    statistics = device.memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device: Any) -> str:
    if device.platform != "cpu":
        return device.device_kind
    return f"{processor()}, {len(cores())} cores"


if __name__ == "__main__":
    measure(json.loads(sys.argv[1]))
