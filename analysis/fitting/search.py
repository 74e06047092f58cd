"""The search for the global optimum: continuation in delta from a grid of starts, then scattered rounds about the best.

A delta below the noise makes many shallow minima in one basin; `search` returns them all, `other_basin` the best rival.
"""

from __future__ import annotations

import numpy as np

from analysis.errors import InputError
from analysis.fitting.optimise import huber, minimise


def solve(model, target, starts, weights, objective="huber", delta=1e-3, merge=False, warm=False):
    """Continuation in delta down to the objective asked for, from each start.

    With merge, starts that meet after the first step go on as one; returns the points and how many starts each stands
    for. Warm starts begin one step above the final delta.
    """
    if warm:
        steps = {"huber": [s for s in (0.01,) if s > 2 * delta] + [delta], "lad": [0.01, 1e-3, 1e-4]}
    else:
        steps = {
            "huber": [s for s in (0.1, 0.01, 0.001) if s > 2 * delta] + [delta],
            "lad": [0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10, 1e-11, 1e-12],
        }
    steps = steps.get(objective, [np.inf])
    u, count = starts, np.ones(len(starts), dtype=int)
    for i, step in enumerate(steps):
        iterations = (100 if warm else 300) if i == len(steps) - 1 else 100 if step < 1e-3 else 30
        u, cost = minimise(model, target, u, weights, delta=step, iterations=iterations)
        if merge and len(u) > 1:
            groups: list[list[int]] = []
            for j in np.argsort(cost):
                near = [g for g in groups if np.abs(u[j] - u[g[0]]).max() < 1e-4]
                near[0].append(j) if near else groups.append([j])
            count = np.array([count[g].sum() for g in groups])
            u = u[[g[0] for g in groups]]
    return (u, count) if merge else u


def search(model, target, starts, weights, objective, delta, seed=0):
    """(minima, objectives, starts that reach the best, starts tried): distinct local minima, the best first.

    Continuation from the starts finds the basins. A small delta makes many shallow minima in one basin, so starts are
    then drawn about the best minima, by their own covariance, and go straight to the final delta: few, and where those
    few do not all come back to one point, round after round until one brings nothing better.
    """
    u, count = solve(model, target, starts, weights, objective, delta, merge=True)
    cost = objective_value(model, u, target, weights, objective, delta)
    keep = np.isfinite(cost)
    u, count, cost = u[keep], count[keep], cost[keep]
    if not len(u):
        raise InputError(f"law {model.law.name!r}: no starting point gives finite values on these runs")
    if objective == "huber" and delta < 0.02:
        rng = np.random.default_rng(seed)
        for turn, number in enumerate((8, *[64] * 8)):
            before = cost.min()
            new = _scatter(model, target, u[np.argsort(cost)[:4]], weights, number, rng)
            for step in ((10 * delta,) if turn % 2 == 0 and turn else ()) + (delta,):
                new, new_cost = minimise(model, target, new, weights, delta=step, iterations=200)
            good = np.isfinite(new_cost)
            u, cost = np.concatenate([u, new[good]]), np.concatenate([cost, new_cost[good]])
            count = np.concatenate([count, np.ones(good.sum(), dtype=int)])
            u, cost, count = _distinct(u, cost, count)
            if len(u) == 1 or (turn >= 2 and cost[0] > before * (1 - 1e-5)):
                break
    else:
        u, cost, count = _distinct(u, cost, count)
    return u, cost, int(count[0]), int(count.sum())


def _scatter(model, target, centres, weights, number, rng):
    """Points about each centre, twice as wide as the estimate is uncertain, at most 1.5 in any coordinate."""
    value, jacobian = model(centres)
    points = []
    for u, r, j in zip(centres, value - target, jacobian, strict=True):
        sigma = max(1.4826 * np.median(np.abs(r)), 1e-9)
        vectors, singular, _ = np.linalg.svd(_finite(j) * np.sqrt(weights), full_matrices=False)
        width = np.minimum(2.0 * sigma / np.maximum(singular, 1e-300), 1.5)
        points.append(u + (rng.standard_normal((number // len(centres) + 1, len(u))) * width) @ vectors.T)
    return np.concatenate(points)


def _finite(jacobian):
    """At the edge of the allowed range a derivative can be undefined: it then counts as none."""
    return np.nan_to_num(jacobian, nan=0.0, posinf=0.0, neginf=0.0)


def _distinct(u, cost, count):
    """Minima that differ, the best first: by 1e-6 of the objective, or 1e-2 in a coordinate where that much differs."""
    order = np.argsort(cost, kind="stable")
    groups: list[list[int]] = []
    for j in order:
        for g in groups:
            near = cost[j] - cost[g[0]] <= 1e-9 * abs(cost[g[0]]) + 1e-18
            if near or (cost[j] - cost[g[0]] <= 1e-5 * abs(cost[g[0]]) and np.abs(u[j] - u[g[0]]).max() < 1e-2):
                g.append(j)
                break
        else:
            groups.append([j])
    first = [g[0] for g in groups]
    return u[first], cost[first], np.array([count[g].sum() for g in groups])


def other_basin(model, target, minima, weights, objective, delta) -> int | None:
    """The best minimum outside the basin of the first, or None: two share a basin if they meet at ten times delta."""
    if len(minima) == 1:
        return None
    wide = 10 * delta if objective == "huber" else 0.01 if objective == "lad" else np.inf
    top = minima[:24]
    raised, _ = minimise(model, target, top, weights, delta=wide, iterations=200)
    apart = np.abs(raised - raised[0]).max(axis=1) > 1e-2
    return int(np.argmax(apart)) if apart.any() else None


def objective_value(model, u, target, weights, objective, delta):
    """Sum of Huber, mean of |r|, or mean of r^2, (...,), at u (..., size)."""
    r = model(u)[0] - target
    if objective == "huber":
        return np.sum(weights * huber(r, delta), axis=-1)
    return np.sum(weights * (np.abs(r) if objective == "lad" else r * r), axis=-1) / np.sum(weights)
