"""The command that shows sources of tokens: sources."""

import dataclasses
import json
from typing import Any

from analysis.text import printable, text_table
from sweeps.cli.options import add_json, finite
from sweeps.cli.parse import command, fail, whole

MOST_EXAMPLES = 1000


def cmd_sources(argv: list[str]) -> int:
    parser = command(
        "sources",
        "scaling sources facts:a=1",
        "What runs can be trained on. With a task: its options, its exact facts (entropies in nats, what guessing is "
        "worth) and examples from its validation split.",
    )
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="its spec, as in data.source")
    parser.add_argument("--tokenizer", metavar="NAME", help="(default: symbols where it has its own, else bytes)")
    parser.add_argument("--examples", type=whole, default=3, help="how many (default: 3)")
    add_json(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.examples <= MOST_EXAMPLES:
        fail(f"--examples {args.examples}: expected 0 to {MOST_EXAMPLES}")
    if args.source is None:
        found = kinds_found()
        print(json.dumps(found) if args.json else kinds_text(found))
        return 0
    facts = facts_of(args.source, args.tokenizer, args.examples)
    print(json.dumps(finite(facts)) if args.json else facts_text(facts))
    return 0


def kinds_found() -> list[dict[str, str]]:
    """The files of scaling/data/sources/ by the first line of what they say of themselves."""
    from scaling.data.sources import kinds

    return [
        {
            "name": name,
            "usage": file.USAGE,
            "gives": "rows" if hasattr(file, "task") else "text",
            "summary": (file.__doc__ or "").strip().split("\n")[0],
        }
        for name, file in kinds().items()
    ]


def kinds_text(found: list[dict[str, str]]) -> str:
    rows = [("source", "gives", "what it is"), *((f["usage"], f["gives"], f["summary"]) for f in found)]
    return text_table(rows, left=3) + "\n\nscaling sources SOURCE shows one; docs/data.md says more"


def facts_of(source: str, tokenizer: str | None, examples: int) -> dict[str, Any]:
    """Plain values. Raises InputError where the source, or the tokenizer of it, cannot be used."""
    from models.errors import InputError
    from scaling.data.sources import open_source
    from scaling.data.store import open_store
    from scaling.data.task import Task, World

    opened = open_source(source)
    facts: dict[str, Any] = {"source": source, "gives": "rows" if isinstance(opened, Task) else "text"}
    if not isinstance(opened, Task):
        return facts | {"version": opened.version}
    store = open_store(source, tokenizer or ("symbols" if opened.symbols else "bytes"))
    task = store.task
    facts |= {
        "corpus": store.key,
        "vocab_size": store.vocab_size,
        "symbols": list(task.symbols),
        "options": dataclasses.asdict(task) if isinstance(task, World) else {},
        "tokens_of_a_question": getattr(task, "item_length", None),
        "exact": task.exact(),
        "examples": [],
    }
    for index in range(examples):
        try:
            question = task.example("valid", index)
        except (InputError, IndexError):  # of a corpus in a mixture; of a file with fewer
            continue
        texts = (store.tokenizer.decode(ids) for ids in (question.prompt, question.answer))
        prompt, answer = (text.replace("\0", "") for text in texts)  # the ends of documents
        facts["examples"].append({"prompt": prompt, "answer": answer, "facts": question.facts})
    return facts


def facts_text(facts: dict[str, Any]) -> str:
    if facts["gives"] == "text":
        return printable(f"{facts['source']}: text, of version {facts['version']}")
    lines = [f"{facts['source']}: {facts['vocab_size']} tokens, corpus {facts['corpus']}"]
    if facts["tokens_of_a_question"]:
        lines.append(f"a question and its answer take {facts['tokens_of_a_question']} tokens")
    if facts["options"]:
        lines.append("options: " + ", ".join(f"{name}={value}" for name, value in facts["options"].items()))
    lines = [printable(line) for line in lines]
    if facts["exact"]:
        lines += ["", text_table([("exactly", ""), *((n, f"{v:,.6g}") for n, v in facts["exact"].items())], left=1)]
    if facts["examples"]:
        about = [", ".join(f"{n} {v:g}" for n, v in e["facts"].items()) for e in facts["examples"]]
        rows = [(e["prompt"], e["answer"], of) for e, of in zip(facts["examples"], about, strict=True)]
        lines += ["", text_table([("prompt", "answer", "facts of it"), *rows], left=3)]
    return "\n".join(lines)
