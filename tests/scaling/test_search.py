"""Search over signs against closed forms and enumeration: what each arm does with a distribution that is known."""

from types import SimpleNamespace

import numpy as np
import pytest

from models.config import ModelConfig
from models.errors import InputError
from models.transformer import init
from scaling.config import DataConfig, RunConfig
from scaling.data.store import open_store
from scaling.evaluation import find
from scaling.evaluation import search as search_file
from scaling.evaluation._asker import Asker
from scaling.evaluation.search import NEVER, arms, beam, best_first, depth_first, expansions, grow, simulated, tries

DIRECT, THINKING = "signs:k=4,largest=3", "signs:k=4,largest=3,thinking=1"


def fresh(source: str) -> tuple[Asker, object]:
    """(asker, task) of a model whose head is not zero, so that its distributions differ from place to place."""
    import jax

    task = open_store(source, "symbols").task
    model = ModelConfig(vocab_size=task.vocab_size, d_model=8, n_layers=1, n_heads=1)
    params = init(model, jax.random.key(0))
    params["head"] = 0.5 * jax.random.normal(jax.random.key(1), params["head"].shape)
    config = RunConfig(model=model, data=DataConfig(source=source, tokenizer="symbols", seq_len=task.item_length))
    return Asker(SimpleNamespace(config=config, params=params, folder="x")), task


def planted(p_S: np.ndarray, source: str = DIRECT, n: int = 64) -> object:
    """The tree of n problems with the same distribution over all strings, which factorises over no step."""
    asker, task = fresh(source)
    tree = grow(asker, task, n, "random")
    k = tree.k
    path_Sk = np.stack([np.repeat(p_S.reshape(2**d, -1).sum(axis=1), 2 ** (k - d)) for d in range(1, k + 1)], axis=1)
    return tree._replace(path_NSk=np.log(np.broadcast_to(path_Sk, tree.path_NSk.shape)))


@pytest.mark.parametrize(("source", "calculator"), [(DIRECT, False), (THINKING, False), (THINKING, True)])
def test_the_tree_is_what_teacher_forcing_gives(source, calculator):
    """Each string scored by itself, as a whole row: if this fails, a sign is read at another's place."""
    asker, task = fresh(source)
    tree = grow(asker, task, 3, calculator=calculator)
    a_k, target = task.question(task.example("valid", 2).prompt)
    for string in range(2**task.k):
        minus = np.array([string >> i & 1 for i in range(task.k - 1, -1, -1)], bool)
        answer = task.answer(a_k[None], np.array([target]), minus[None])[0]
        left = target - np.cumsum(np.where(minus, -a_k, a_k))
        assert (tree.left_NSk[2, string] == left).all()
        if (answer >= task.vocab_size).any() or (answer < 0).any():
            assert calculator or tree.path_NSk[2, string, -1] < NEVER / 2
            assert not tree.right_NS[2, string]
            continue
        prompt = task.example("valid", 2).prompt
        logprob = asker.targets(np.concatenate([prompt, answer])[None])[0][0, len(prompt) - 1 :]
        if task.thinking:
            logprob[-1] = 0  # after the last sign nothing depends on what is thought
            if calculator:
                logprob[1::2] = 0
        assert tree.path_NSk[2, string, -1] == pytest.approx(logprob.sum(), abs=1e-4)
        assert tree.right_NS[2, string] == (task.verify(prompt, answer) == 1)


def test_the_distribution_is_that_of_enumeration():
    asker, _ = fresh(DIRECT)
    both = [find(name, '{"n": 16, "k": [1, 5]}').rows(asker, 0) for name in ("enumerate", "search")]
    search, other = ({(r["metric"], r.get("k")): r["value"] for r in rows if "arm" not in r} for rows in both[::-1])
    assert search.keys() == other.keys()
    for key, value in search.items():
        assert value == pytest.approx(other[key], abs=1e-5), key


def test_a_random_proposer_is_worth_what_guessing_is():
    asker, task = fresh(DIRECT)
    rows = find("search", '{"n": 200, "proposer": "random", "draws": 0}').rows(asker, 0)
    guess = np.mean([task.example("valid", i).facts["guess"] for i in range(200)])
    (once,) = (r for r in rows if r.get("arm") == "verifier" and r["budget"] == 1)
    assert once["value"] == pytest.approx(guess)
    assert abs(once["value"] - task.exact()["guess_accuracy"]) < 4 * once["stderr"]
    assert asker.flops == 0
    assert {r["flops_a_problem"] for r in rows if "arm" in r} == {0}, "nothing is asked, so nothing is spent"


def test_tree_search_never_asks_where_no_answer_can_be():
    """With all probability on a right string both orders go straight to it; with none on it they still end, and ask at
    no more nodes than there are with |left| <= remaining, counted one by one.
    """
    asker, task = fresh(DIRECT)
    tree = grow(asker, task, 50, "random")
    rng = np.random.default_rng(0)
    for i in range(50):
        right = int(np.flatnonzero(tree.right_NS[i])[0])
        same = [np.arange(2**tree.k) >> (tree.k - d) == right >> (tree.k - d) for d in range(1, tree.k + 1)]
        path_Sk = np.where(np.stack(same, axis=1), 0.0, -50.0)
        towards = tree._replace(path_NSk=np.broadcast_to(path_Sk, tree.path_NSk.shape))
        away = tree._replace(path_NSk=-50.0 - towards.path_NSk)
        possible = 1 + sum(
            int((np.abs(tree.left_NSk[i, tree.at(d), d - 1]) <= tree.remaining_Nk[i, d - 1]).sum())
            for d in range(1, tree.k)
        )
        for order in (best_first, depth_first):
            assert expansions(towards, i, order, rng) == tree.k
            assert tree.k <= expansions(away, i, order, rng) <= possible


def test_a_beam_of_all_strings_finds_the_most_probable_and_one_of_width_1_is_greedy():
    asker, task = fresh(DIRECT)
    tree = grow(asker, task, 40)
    best_N, any_N, _ = beam(tree, 2**tree.k)
    rows = np.arange(40)
    assert (best_N == tree.right_NS[rows, tree.path_NSk[:, :, -1].argmax(axis=1)]).all()
    assert any_N.all()
    narrow_N, same_N, steps = beam(tree, 1)
    ((_, _, greedy_N, tokens_N), *_) = arms(tree, (1,), 0, 0)
    assert (narrow_N == greedy_N).all()
    assert (narrow_N == same_N).all()
    assert tree.tokens(steps) == tokens_N[0] == task.item_length  # START and all tokens but the last are read


def test_samples_with_a_verifier_end_at_the_first_right_one():
    p = np.array([0.0, 0.1, 0.7, 1.0])
    for n in (1, 2, 9):
        by_hand = sum((1 - p) ** i for i in range(n))  # sample i + 1 is drawn where those before it were wrong
        assert tries(p, n) == pytest.approx(by_hand)


def test_what_chooses_without_a_verifier():
    """A planted distribution: one wrong string of .4, a right one of .3 for all problems where it is right. The
    majority and the likeliest end at the most probable string, and a coin's choice is as good as one sample for any n.
    """
    p_S = np.full(16, 0.3 / 14)
    p_S[[5, 9]] = 0.4, 0.3
    tree = planted(p_S, n=200)
    path_NS, right_NS = tree.path_NSk[:, :, -1], tree.right_NS
    found = dict(simulated(path_NS, right_NS, (1, 4, 256), 8, 0))
    success = float(np.mean(np.sum(np.exp(path_NS) * right_NS, axis=1)))
    noise = 4 * np.sqrt(success * (1 - success) / (8 * 200))
    for n in (1, 4, 256):
        assert abs(found[n]["coin"].mean() - success) < noise, "a coin knows nothing: more samples must not help"
    assert abs(found[1]["majority"].mean() - success) < noise
    mode = right_NS[:, 5].mean()
    assert found[256]["likeliest"].mean() == pytest.approx(mode)
    assert found[256]["majority"].mean() == pytest.approx(mode, abs=0.03)


def test_a_majority_leaves_out_what_is_no_answer():
    """Half of the samples miscalculate: they agree with nothing, so the other half decides."""
    tree = planted(np.where(np.arange(16) == 3, 0.5, 1e-9))
    found = dict(simulated(tree.path_NSk[:, :, -1], tree.right_NS, (64,), 2, 0))
    assert found[64]["majority"].mean() == pytest.approx(tree.right_NS[:, 3].mean())


def test_blocks_are_means_of_the_same_problems():
    asker, _ = fresh(THINKING)
    rows = find("search", '{"n": 24, "budgets": [1, 4], "draws": 2, "blocks": 6}').rows(asker, 0)
    for r in (r for r in rows if r["metric"] == "accuracy"):
        blocks = [
            b["value"]
            for b in rows
            if b["metric"] == "block_accuracy" and (b["arm"], b["budget"]) == (r["arm"], r["budget"])
        ]
        assert len(blocks) == 6
        assert np.mean(blocks) == pytest.approx(r["value"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ('{"proposer": "oracle"}', "expected one of model, untrained, random"),
        ('{"budgets": []}', "expected whole numbers of at least 1"),
        ('{"n": 4, "blocks": 3}', "at most n / 2 = 2"),
        ('{"draws": -1}', "draws = -1"),
        ('{"source": "signs:k=13,largest=1,numbers=13"}', "k = 12"),
    ],
)
def test_what_cannot_be_searched_is_one_line(options, match):
    asker, _ = fresh("signs:k=3,largest=1,numbers=13")
    with pytest.raises(InputError, match=match):
        find("search", options).rows(asker, 0)


def test_every_proposer_is_there():
    asker, task = fresh(THINKING)
    for proposer in search_file.PROPOSERS:
        tree = grow(asker, task, 4, proposer)
        total = np.exp(tree.path_NSk[:, :, -1]).sum(axis=1)
        assert (total <= 1 + 1e-5).all()
        if proposer != "model":
            assert total == pytest.approx(1), "a choice between the two signs, with what is left written for it"
