"""`scaling bench`: speed on this machine, and the tables of it."""

import json
from pathlib import Path
from typing import Any

from sweeps.cli.parse import command, fail, number, positive


def cmd_bench(argv: list[str]) -> int:
    parser = command(
        "bench", "scaling bench train --preset cpu", "Measure speed on this machine; keep it idle meanwhile."
    )
    parser.add_argument(
        "what",
        choices=["analysis", "train", "run", "generate"],
        help="analysis: fits, bootstraps, searches, extrapolations; train: steps of the training engine; run: what a "
        "run costs beyond its steps; generate: writing with a trained model, against batch and width",
    )
    parser.add_argument(
        "--preset", choices=["cpu", "gpu", "all"], help="train: shapes (default: cpu, or gpu where one is)"
    )
    parser.add_argument("--seconds", type=number, help="train, generate: time for each row (default: 5)")
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        nargs="?",
        const=Path("runs/profile"),
        help="train: also write a trace of each row there, for Perfetto, TensorBoard or XProf (default: runs/profile)",
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    seconds = 5.0 if args.seconds is None else args.seconds
    positive("--seconds", seconds)

    if args.what == "train":
        from scaling.bench import train as training

        preset = args.preset or ("gpu" if training.accelerator() else "cpu")
        rows = training.bench(preset, seconds, args.profile)
        print(json.dumps(rows, indent=1, allow_nan=False) if args.json else train_text(rows))
        return 0
    if args.what == "generate" and not (args.preset or args.profile):
        from scaling.engine.runtime import set_up_jax

        set_up_jax()
        from scaling.bench.generate import bench_generate

        rows = bench_generate(seconds / 2)
        print(json.dumps(rows, indent=1, allow_nan=False) if args.json else generate_text(rows))
        return 0
    if args.preset or args.profile or args.seconds is not None:
        fail("--preset, --seconds and --profile are for bench train, --seconds for generate too")
    if args.what == "run":
        from scaling.bench.overhead import bench_overhead

        rows = bench_overhead()
        print(json.dumps(rows, indent=1, allow_nan=False) if args.json else overhead_text(rows))
        return 0
    from analysis.bench import bench, bench_text

    rows = bench()
    print(json.dumps(rows, indent=1, allow_nan=False) if args.json else bench_text(rows))
    return 0


def train_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    from analysis.text import text_table

    head = [
        "model",
        "batch",
        "processes",
        "devices",
        "GFLOP/s",
        "tokens/s",
        "of peak",
        "step, ms",
        "p10-p90",
        "compile",
        "memory",
    ]
    lines = [head]
    for r in rows:
        ms = [1e3 * r[name] for name in ("step_seconds", "step_seconds_p10", "step_seconds_p90")]
        lines.append(
            [
                f"d{r['d_model']} L{r['n_layers']}",
                f"{r['batch']}x{r['seq_len']}",
                str(r["processes"]),
                str(r["devices"]),
                f"{r['gflops']:,.1f}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['share_of_peak']:.0%}",
                f"{ms[0]:.2f}",
                f"{ms[1]:.2f}-{ms[2]:.2f}",
                f"{r['compile_seconds']:.1f} s",
                f"{r['peak_bytes'] / 2**20:,.0f} MiB",
            ]
        )
    peaks: dict[str, float] = {}
    for r in rows:
        of_process = r["peak_gflops"] / r["processes"]
        peaks[r["peak_from"]] = max(peaks.get(r["peak_from"], 0.0), of_process)
    peak = "; ".join(f"{rate:,.0f} GFLOP/s ({source})" for source, rate in peaks.items())
    return f"{text_table(lines)}\n{rows[0]['device']}, jax {rows[0]['jax']}; peak of a process, at most: {peak}"


def overhead_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    from analysis.text import text_table

    head = ["model", "shape is", "in all", "steps", "validation", "beyond both"]
    names = ("seconds", "step_seconds", "validation_seconds", "overhead_seconds")
    return text_table([head, *([r["model"], r["shape_is"], *(f"{r[n]:.2f} s" for n in names)] for r in rows)])


def generate_text(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    from analysis.text import text_table

    head = ["model", "batch", "prefill", "prefill tokens/s", "tokens/s", "times batch 1", "bound", "by", "of bound"]
    lines = [
        [
            f"d{r['d_model']} L{r['n_layers']}",
            str(r["batch"]),
            f"{1e3 * r['prefill_seconds']:.2f} ms",
            f"{r['prefill_tokens_per_second']:,.0f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{r['times_smallest_batch']:.1f}",
            f"{r['bound_tokens_per_second']:,.0f}",
            r["bound_by"],
            f"{r['share_of_bound']:.0%}",
        ]
        for r in rows
    ]
    where = f"{rows[0]['device']}, jax {rows[0]['jax']}; {rows[0]['peak_gflops']:,.0f} GFLOP/s in a large product"
    return f"{text_table([head, *lines])}\nprompts of {rows[0]['prompt']} tokens and {rows[0]['tokens']} more; {where}"
