"""The command that lets a trained model write: sample."""

import json
from pathlib import Path

from analysis.text import printable
from sweeps.cli.parse import Parser, command, fail, number, whole

SAMPLING = ("max_tokens", "seed", "temperature", "top_k", "top_p", "greedy", "stop")


def cmd_sample(argv: list[str]) -> int:
    parser = command(
        "sample",
        'scaling sample runs/mine --prompt "Fellow citizens" --n 4',
        "Continue prompts with a finished run's model. The same seed gives the same text.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what is continued; several are continued side by side (default: the beginning of a document)",
    )
    parser.add_argument(
        "--ask",
        action="append",
        default=[],
        metavar="TEXT",
        help="a question in text, put in the template that the run's source has (a task with symbols of its own has "
        "none: give --prompt the symbols of a row up to its answer)",
    )
    parser.add_argument("--n", type=whole, default=1, help="continuations of each prompt (default: 1)")
    parser.add_argument("--beam", type=whole, metavar="K", help="the best --n that a beam of this width finds")
    add_sampling(parser)
    parser.add_argument("--json", action="store_true", help="print tokens and their log-probabilities too, as a list")
    args = parser.parse_args(argv)
    if args.beam is not None and args.beam < 1:
        fail(f"beam = {args.beam}: expected a whole number of at least 1; without --beam text is drawn")
    if args.beam and args.beam < args.n:
        fail(f"--n {args.n}: a beam of {args.beam} finds no more than {args.beam}; widen --beam")
    if args.beam and (args.temperature, args.top_k, args.top_p, args.greedy) != (1.0, 0, 1.0, False):
        fail("--beam: takes what is most probable as a whole; leave temperature, top-k, top-p and greedy out")

    from scaling.engine.runtime import set_up_jax

    set_up_jax()
    from scaling.load import check_writes, load

    model = load(args.run)
    check_writes(model)
    prompts = [*(args.prompt or []), *(in_template(model, question) for question in args.ask)] or [""]
    how = {
        name: getattr(args, name) for name in ("max_tokens", "seed", "temperature", "top_k", "top_p", "greedy", "stop")
    }
    samples = model.generate(prompts, args.n, beam=args.beam or 0, **how)
    if args.json:
        print(json.dumps([row(samples, prompts, i, j) for i in range(len(prompts)) for j in range(args.n)]))
        return 0
    for i, prompt in enumerate(prompts):
        for j in range(args.n):
            if len(prompts) * args.n > 1:
                print(f"--- {heading(samples, i, j, len(prompts))}")
            print(shown(model.joined(prompt, samples.texts[i][j])))
    return 0


def in_template(model, question: str) -> str:
    from scaling.chat.talk import Question, template_of

    return Question(question, template_of(model)).text


def add_sampling(parser: Parser, seed: int | None = 0) -> None:
    """The options of how text is written."""
    parser.add_argument("--max-tokens", type=whole, default=64, help="of a continuation (default: 64)")
    parser.add_argument("--temperature", type=number, default=1.0, help="logits are divided by it (default: 1)")
    parser.add_argument("--top-k", type=whole, default=0, metavar="K", help="draw from the K most probable; 0: all")
    parser.add_argument("--top-p", type=number, default=1.0, metavar="P", help="draw from the fewest of probability P")
    parser.add_argument("--greedy", action="store_true", help="take the most probable token at each step")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be given more than once"
    )
    parser.add_argument(
        "--seed", type=whole, default=seed, help=f"of what is drawn (default: {0 if seed == 0 else 'any'})"
    )


def heading(samples, i: int, j: int, prompts: int) -> str:
    length = int(samples.lengths[i, j])
    total = float(samples.logprobs[i, j].sum())
    which = f"prompt {i + 1}, continuation {j + 1}" if prompts > 1 else f"continuation {j + 1}"
    mean = f", {-total / length:.3f} nats/token" if length else ""
    return f"{which}: {length} tokens{mean}{', stopped' if samples.stopped[i, j] else ''}"


def row(samples, prompts: list[str], i: int, j: int) -> dict:
    """One continuation; its tokens with those of the stop that it came to."""
    length = int(samples.lengths[i, j])
    return {
        "prompt": prompts[i],
        "continuation": j,
        "text": samples.texts[i][j],
        "tokens": samples.tokens[i, j, :length].tolist(),
        "logprobs": samples.logprobs[i, j, :length].tolist(),
        "drawn_logprobs": samples.drawn_logprobs[i, j, :length].tolist(),
        "kept": int(samples.kept[i, j]),
        "stopped": bool(samples.stopped[i, j]),
    }


def shown(text: str) -> str:
    """A model's words for a terminal, line by line: it may have learned escape codes."""
    return "\n".join(printable(line) for line in text.split("\n"))
