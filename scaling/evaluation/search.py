"""Search: signs found by several ways of thinking longer, accuracy against what each spends, nothing generated.

All 2^k strings of signs are scored by teacher forcing, so that what a sampler, a beam or a tree search would do follows
exactly; only a majority and what chooses among samples without a verifier are simulated, from the exact distribution.
"""

import functools
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from models.config import ModelConfig
from models.errors import InputError
from scaling.data.sources.signs import MINUS, PLUS, Signs
from scaling.evaluation import Evaluation, Row, row
from scaling.evaluation._asker import forward_flops
from scaling.evaluation._rows import task_of
from scaling.evaluation.answers import share_row
from scaling.evaluation.enumerate import measured

NEVER = -1e4  # log p of what is never written
MOST = 12  # signs: 4,096 strings a problem
PROPOSERS = ("model", "untrained", "random")


@dataclass(frozen=True)
class Search(Evaluation):
    """Arms, each with budgets of its own unit:

    greedy: the more probable token at each step. verifier: samples until one is right, at most so many. majority,
    likeliest: the string that most samples agree on, or that the model finds the most probable of them. coin: the first
    sample that a coin accepts, else the last. beam: the most probable string of a beam of such a width; beam-verifier:
    any string of it. best-first, depth-first: tree search that asks at so many nodes, with the exact bound |what is
    left| <= sum of the numbers left, best-first by the probability of the path.

    With thinking, a step is a sign and what is left after it. A step that miscalculates is no answer: each counts as
    a wrong one that agrees with no other. With `calculator` what is left is written by one.
    """

    source: str = ""  #: signs, its spec; "": what the run was trained on
    n: int = 256  #: problems of the validation part
    budgets: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    k: tuple[int, ...] = (1,)  #: samples, of pass@k
    proposer: str = "model"  #: or untrained (the same model before its first step), or random (even odds)
    calculator: bool = False
    draws: int = 16  #: simulations a problem of majority, likeliest and coin; 0: leave them out
    blocks: int = 0  #: also the means of so many blocks of problems, for intervals over problems

    SUMMARY = "signs by search: greedy, samples with a verifier, majority, beam, tree search, against what they spend"

    def rows(self, asker: Any, seed: int) -> list[Row]:
        """accuracy by arm and budget, with tokens_read (a problem, on average: what stops when it is right spends
        less than its budget) and flops_a_problem, of a forward pass with a cache; block_accuracy; of the distribution
        success, mode, margin, entropy, guess and pass@k, as `enumerate` gives them.
        """
        if self.proposer not in PROPOSERS:
            raise InputError(f"proposer = {self.proposer!r}: expected one of {', '.join(PROPOSERS)}")
        for name in ("budgets", "k"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise InputError(f"{name} = {list(getattr(self, name))}: expected whole numbers of at least 1")
        if self.draws < 0:
            raise InputError(f"draws = {self.draws}: expected 0, which simulates nothing, or more")
        if not 0 <= self.blocks <= self.n // 2:
            raise InputError(f"blocks = {self.blocks}: expected 0, or at most n / 2 = {self.n // 2}")
        task = task_of(asker.model.config, self.source)
        if not isinstance(task, Signs) or task.k > MOST:
            raise InputError(f"source = {task.spec!r}: expected signs of at most k = {MOST}")
        tree = grow(asker, task, self.n, self.proposer, self.calculator, seed)
        model = asker.model.config.model
        a_token = 0 if self.proposer == "random" else forward_flops(model, (1, tree.length)) / tree.length
        rows = measured(tree.path_NSk[:, :, -1], tree.right_NS, self.k)
        for arm, budget, right_N, tokens_N in arms(tree, self.budgets, self.draws, seed):
            axes = {"arm": arm, "budget": budget}
            spent = {"tokens_read": float(np.mean(tokens_N)), "flops_a_problem": float(np.mean(tokens_N) * a_token)}
            rows.append(share_row("accuracy", right_N, **axes, **spent))
            for block, part in enumerate(np.array_split(right_N, self.blocks) if self.blocks else ()):
                rows.append(row("block_accuracy", part.mean(), 0.0, len(part), block=block, **axes))
        return rows


class Tree(NamedTuple):
    """All strings of k signs for N problems; string s has a minus where the bits of s, the highest first, are 1."""

    path_NSk: np.ndarray  #: log p of the first 1 .. k steps of each string
    greedy_NSk: np.ndarray  #: whether each step is the most probable one
    left_NSk: np.ndarray  #: of the target after each step
    remaining_Nk: np.ndarray  #: the sum of the numbers that have no sign yet, after each step
    prompt: int  #: tokens of it
    step: int  #: tokens of a step: 1, with thinking 2
    length: int  #: tokens of the question and its answer

    @property
    def right_NS(self) -> np.ndarray:
        return self.left_NSk[:, :, -1] == 0

    @property
    def k(self) -> int:
        return self.path_NSk.shape[2]

    def at(self, depth: int) -> slice:
        """The first string of each of the 2^depth nodes of a depth."""
        return slice(None, None, 2 ** (self.k - depth))

    def tokens(self, steps: Any) -> Any:
        """Read to ask for a first step, and for one after so many others."""
        return self.prompt + self.step * steps


def grow(asker: Any, task: Signs, n: int, proposer: str = "model", calculator: bool = False, seed: int = 0) -> Tree:
    """The tree of the first n problems that not every string solves."""
    minus_Sk = (np.arange(2**task.k)[:, None] >> np.arange(task.k - 1, -1, -1) & 1).astype(bool)
    prompts = [task.example("valid", index).prompt for index in range(n)]
    a_Nk, target_N = (np.array(x) for x in zip(*map(task.question, prompts), strict=True))
    left_NSk = target_N[:, None, None] - np.cumsum(np.where(minus_Sk, -a_Nk[:, None], a_Nk[:, None]), axis=2)
    remaining_Nk = a_Nk.sum(axis=1, keepdims=True) - np.cumsum(a_Nk, axis=1)
    step = 2 if task.thinking else 1
    if proposer == "random":
        step_NSk, greedy_NSk = np.full(left_NSk.shape, -np.log(2)), np.broadcast_to(~minus_Sk, left_NSk.shape)
    else:
        params = untrained(asker.model.config.model, seed) if proposer == "untrained" else asker.model.params
        given = calculator or proposer == "untrained"
        both_NSk2, thought_NSk, best_NSk = asked(asker, params, task, np.array(prompts), a_Nk, target_N, minus_Sk)
        if proposer == "untrained":
            both_NSk2 = jax.nn.log_softmax(both_NSk2)
        plus_NSk, minus_NSk = np.moveaxis(np.asarray(both_NSk2, np.float64), 3, 0)
        step_NSk = np.where(minus_Sk, minus_NSk, plus_NSk) + (0 if given else thought_NSk)
        greedy_NSk = (minus_Sk == (minus_NSk > plus_NSk)) & (given | best_NSk)
    P = len(prompts[0])
    return Tree(np.cumsum(step_NSk, axis=2), greedy_NSk, left_NSk, remaining_Nk, P, step, task.item_length)


def untrained(model: ModelConfig, seed: int) -> Any:
    """Parameters before the first step, with a head that is not zero, as it is then, but as large as an embedding."""
    params = transformer.init(model, jax.random.key(seed))
    head = {} if model.tied else {"head": jax.random.normal(jax.random.key(seed + 1), params["head"].shape)}
    return params | head


def asked(
    asker: Any,
    params: Any,
    task: Signs,
    prompts_NP: np.ndarray,
    a_Nk: np.ndarray,
    target_N: np.ndarray,
    minus_Sk: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each step of each string: both_NSk2, log p of + and of -; thought_NSk, log p of what is left after its sign;
    best_NSk, whether that is the most probable. A row is asked for each two strings that differ in their last sign;
    after that nothing depends on what is left, and thought is 0.
    """
    (N, P), (S, k), stride = prompts_NP.shape, minus_Sk.shape, 2 if task.thinking else 1
    half = S // 2
    pairs_NS = np.broadcast_to(minus_Sk[::2], (N, half, k)).reshape(-1, k)
    answer_BA = task.answer(np.repeat(a_Nk, half, axis=0), np.repeat(target_N, half), pairs_NS)
    beyond_BA = (answer_BA < 0) | (answer_BA >= task.vocab_size)  # what is left has no symbol, and never leads to 0
    answer_BA = np.where(beyond_BA, 0, answer_BA)
    tokens_BT = np.concatenate([np.repeat(prompts_NP, half, axis=0), answer_BA[:, : (k - 1) * stride]], axis=1)
    out = asker.call(lambda model, _, rows: choices(model, params, rows), tokens_BT.astype(np.int32))
    both_NSk2, thought_NSk, best_NSk = (np.repeat(x.reshape(N, half, *x.shape[1:]), 2, axis=1) for x in out)
    both_NSk2 = both_NSk2[:, :, P - 1 :: stride]
    if not task.thinking:
        return both_NSk2, np.zeros((N, S, k)), np.ones((N, S, k), bool)
    last = ((0, 0), (0, 0), (0, 1))
    thought_NSk, best_NSk = (x[:, :, P:-1:stride] for x in (thought_NSk, best_NSk))
    beyond_NSk = np.repeat(beyond_BA[:, 1:-1:2].reshape(N, half, k - 1), 2, axis=1)
    thought_NSk = np.where(beyond_NSk, NEVER, thought_NSk.astype(np.float64))
    return both_NSk2, np.pad(thought_NSk, last), np.pad(best_NSk & ~beyond_NSk, last, constant_values=True)


@functools.partial(jax.jit, static_argnames="model")
def choices(model: ModelConfig, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """After each position: log p of + and of -, and of the token that follows, and whether that is the best one."""
    logprob_BTV = jax.nn.log_softmax(transformer.apply(model, params, tokens_BT))
    following_BT = jnp.roll(tokens_BT, -1, axis=1)
    next_BT = jnp.take_along_axis(logprob_BTV, following_BT[..., None], axis=-1)[..., 0]
    return logprob_BTV[..., jnp.array([PLUS, MINUS])], next_BT, jnp.argmax(logprob_BTV, axis=-1) == following_BT


Arm = tuple[str, int, np.ndarray, np.ndarray]  # name, budget, share right [N], tokens read [N]


def arms(tree: Tree, budgets: tuple[int, ...], draws: int, seed: int) -> Iterator[Arm]:
    N, S, k = tree.path_NSk.shape
    path_NS, right_NS, budgets = tree.path_NSk[:, :, -1], tree.right_NS, tuple(sorted(budgets))

    def all_of_it(steps: int) -> np.ndarray:
        return np.full(N, tree.tokens(steps), float)

    greedy_NS = tree.greedy_NSk.all(axis=2)
    yield "greedy", 1, (greedy_NS & right_NS).any(axis=1), all_of_it(k - 1)
    p_N = np.sum(np.exp(path_NS) * right_NS, axis=1)
    for n in budgets:
        asked_N = tries(p_N, n)
        yield "verifier", n, 1 - (1 - p_N) ** n, tree.tokens(asked_N * (k - 1))
    for n, chosen in simulated(path_NS, right_NS, budgets, draws, seed) if draws else ():
        for arm, right_N in chosen.items():
            yield arm, n, right_N, all_of_it(n * (k - 1))
    for width in (w for w in budgets if w < 2 * S):
        best_N, any_N, steps = beam(tree, width)
        yield "beam", width, best_N, all_of_it(steps)
        yield "beam-verifier", width, any_N, all_of_it(steps)
    for arm, order in (("best-first", best_first), ("depth-first", depth_first)):
        rng = np.random.default_rng(seed)
        solved_N = np.array([expansions(tree, i, order, rng) for i in range(N)])
        for budget in budgets:
            yield arm, budget, solved_N <= budget, tree.tokens(np.minimum(solved_N, budget) - 1)


def tries(p_N: np.ndarray, n: int) -> np.ndarray:
    """How many samples are drawn on average, where it ends at the first right one or after n: (1 - (1 - p)^n) / p."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p_N > 0, -np.expm1(n * np.log1p(-np.minimum(p_N, 1))) / p_N, n)


def simulated(
    path_NS: np.ndarray, right_NS: np.ndarray, budgets: tuple[int, ...], draws: int, seed: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(n, {arm: share right [N]}) over `draws` pools of samples of each problem, of which n are looked at.

    Ties of a majority are broken at random. What is left of the probability, of no string, is never chosen.
    """
    rng = np.random.default_rng(seed)
    (N, S), most = path_NS.shape, max(budgets)
    upto_NS = np.cumsum(np.exp(path_NS), axis=1)
    right_NX = np.pad(right_NS, ((0, 0), (0, 1)))
    rank_NX = np.pad(np.argsort(np.argsort(path_NS, axis=1), axis=1), ((0, 0), (0, 1)), constant_values=-1)
    totals = {n: {"majority": np.zeros(N), "likeliest": np.zeros(N), "coin": np.zeros(N)} for n in budgets}
    rows = np.arange(N)
    for _ in range(draws):
        uniform_Nn = rng.random((N, most))
        string_Nn = np.stack([np.searchsorted(upto_NS[i], uniform_Nn[i], side="right") for i in rows])
        yes_Nn, tie_NS = rng.random((N, most)) < 0.5, rng.random((N, S))
        count_NX = np.zeros((N, S + 1))
        for n, before in zip(budgets, (0, *budgets), strict=False):
            np.add.at(count_NX, (rows[:, None], string_Nn[:, before:n]), 1)
            agreed_NS = np.where(count_NX[:, :S] > 0, count_NX[:, :S] + tie_NS, -1)
            majority_N = np.where(count_NX[:, :S].any(axis=1), agreed_NS.argmax(axis=1), S)
            best_N = np.take_along_axis(rank_NX, string_Nn[:, :n], axis=1).argmax(axis=1)
            accepted_N = np.where(yes_Nn[:, :n].any(axis=1), yes_Nn[:, :n].argmax(axis=1), n - 1)
            chosen = {
                "majority": majority_N,
                "likeliest": string_Nn[rows, best_N],
                "coin": string_Nn[rows, accepted_N],
            }
            for arm, string_N in chosen.items():
                totals[n][arm] += right_NX[rows, string_N] / draws
    yield from totals.items()


def beam(tree: Tree, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(whether the most probable string of the last beam is right, whether any is, steps after the first)."""
    N, k = len(tree.path_NSk), tree.k
    rows = np.arange(N)[:, None]
    kept_Nw, steps = np.zeros((N, 1), int), 0
    for depth in range(1, k + 1):
        children = (2 * kept_Nw[:, :, None] + np.arange(2)).reshape(N, -1)
        path = tree.path_NSk[:, tree.at(depth), depth - 1][rows, children]
        order = np.argsort(-path, axis=1, kind="stable")[:, :width]
        kept_Nw = np.take_along_axis(children, order, axis=1)
        steps += kept_Nw.shape[1] if depth < k else 0
    right_Nw = tree.right_NS[rows, kept_Nw]
    return right_Nw[:, 0], right_Nw.any(axis=1), steps


def best_first(path: float, depth: int) -> tuple[float, ...]:
    return (-path,)


def depth_first(path: float, depth: int) -> tuple[float, ...]:
    return (-depth, -path)


def expansions(tree: Tree, i: int, order: Callable[[float, int], tuple[float, ...]], rng: np.random.Generator) -> int:
    """At how many nodes problem i is asked before a right string is found: those whose bound allows one, in an order.

    A right string exists, and the bound never cuts it off. Ties are broken at random.
    """
    queue, asked = [((), 0.0, 0, 0)], 0
    while queue:
        *_, depth, node = heapq.heappop(queue)
        asked += 1
        for child in (2 * node, 2 * node + 1):
            string = child << (tree.k - depth - 1)
            if abs(tree.left_NSk[i, string, depth]) > tree.remaining_Nk[i, depth]:
                continue
            if depth + 1 == tree.k:
                return asked
            path = tree.path_NSk[i, string, depth]
            heapq.heappush(queue, (order(path, depth + 1), rng.random(), depth + 1, child))
    raise AssertionError("signs: a problem without an answer")
