"""Minimises weighted Huber sums over many problems at once: starts, bootstrap refits, rolling origins, profiles.

Each row of a batch is one problem with its own starting point, weights, and targets on the same runs. A step solves the
Newton system of the piecewise quadratic (rows inside delta), damped towards the reweighted least squares system, which
always majorises; a batch costs about as much as one problem.
"""

from __future__ import annotations

import numpy as np

# Problems times runs that go through the arrays together: more falls out of a core's cache.
_TOGETHER = 12_000


def huber(r, delta):
    """0.5 r^2 inside delta, delta (|r| - delta / 2) outside; delta is a number or one per row, and may be infinite."""
    a = np.abs(r)
    inner = np.minimum(a, delta)
    return inner * (a - 0.5 * inner)


def minimise(model, target, u, weights=None, delta=1e-3, iterations=200):
    """Local minima of sum_i w_i huber(model(u)_i - target_i).

    model(u) gives (problems, rows) and its derivatives (problems, size, rows) at u (problems, size), and has `low` and
    `high`, the bounds each problem stays inside. weights and target (rows,) or (problems, rows); delta a number or
    (rows,). Returns u and the objective, (problems,); a start where nothing can be evaluated keeps an infinite one.
    """
    u = np.array(u, dtype=np.float64)
    rows = np.shape(target)[-1]
    w = np.broadcast_to(1.0 if weights is None else weights, (len(u), rows))
    t = np.broadcast_to(target, (len(u), rows))
    cost = np.empty(len(u))
    together = max(_TOGETHER // rows, 8)
    for i in range(0, len(u), together):
        part = slice(i, i + together)
        u[part], cost[part] = _minimise(model, t[part], u[part], w[part], delta, iterations)
    return u, cost


def _minimise(model, t, u, w, delta, iterations):
    low, high = model.low, model.high
    z = np.clip(u, low, high)
    best = np.empty(len(z))
    index = np.arange(len(z))
    mu = np.full(len(z), 1.0)
    calm = np.zeros(len(z), dtype=int)
    cur, w, t = z.copy(), w.copy(), t.copy()
    with np.errstate(all="ignore"):
        value, jacobian = model(cur)
        r = value - t
        cost = np.sum(w * huber(r, delta), axis=-1)
        lost = ~(np.isfinite(cost) & np.isfinite(jacobian).all(axis=(1, 2)))
        if lost.any():
            cost[lost], jacobian[lost], r[lost] = np.inf, 0.0, 0.0
        size = z.shape[1]
        eye = np.eye(size)
        for _ in range(iterations):
            a = np.abs(r)
            inside = a <= delta
            inner = np.minimum(a, delta)
            psi = np.copysign(inner, r)
            weight = w * (inside + mu[:, None] * (inner / np.maximum(a, 1e-300)))
            gradient = np.matmul(jacobian, (w * psi)[..., None])[..., 0]
            hessian = np.matmul(jacobian * weight[:, None, :], jacobian.transpose(0, 2, 1))
            diagonal = np.einsum("bii->bi", hessian)
            diagonal += 1e-9 * mu[:, None] * diagonal + 1e-14 * diagonal.max(axis=-1, keepdims=True) + 1e-300
            held = ((cur <= low) & (gradient > 0)) | ((cur >= high) & (gradient < 0))
            if held.any():
                gradient[held] = 0.0
                hessian = np.where(held[:, :, None] | held[:, None, :], eye * diagonal[:, :, None], hessian)
            step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
            step *= np.minimum(1.0, 1.0 / np.maximum(np.abs(step).max(axis=-1, keepdims=True), 1e-300))
            trial = np.clip(cur + step, low, high)
            expected = -np.einsum("bi,bi->b", gradient, trial - cur)
            new_value, new_jacobian = model(trial)
            new_r = new_value - t
            new_cost = np.sum(w * huber(new_r, delta), axis=-1)
            accept = new_cost < cost
            if not np.isfinite(new_jacobian).all():
                accept &= np.isfinite(new_jacobian).all(axis=(1, 2))
            gain = np.where(accept, cost - new_cost, 0.0)
            if accept.all():
                cur, r, jacobian, cost = trial, new_r, new_jacobian, new_cost
            else:
                cur = np.where(accept[:, None], trial, cur)
                r = np.where(accept[:, None], new_r, r)
                jacobian = np.where(accept[:, None, None], new_jacobian, jacobian)
                cost = np.where(accept, new_cost, cost)
            good = accept & (gain > 0.25 * expected)
            mu = np.clip(np.where(good, mu * 0.2, np.where(accept, mu, mu * 6.0)), 1e-8, 1e10)
            small = (np.abs(expected) <= 1e-15 * cost) | (mu >= 1e10)
            calm = np.where(small, calm + 1, np.where(gain > 1e-13 * cost, 0, calm))
            done = calm >= 2
            if done.any():
                z[index[done]], best[index[done]] = cur[done], cost[done]
                keep = ~done
                if not keep.any():
                    return z, best
                index, cur, r, jacobian, cost = index[keep], cur[keep], r[keep], jacobian[keep], cost[keep]
                mu, calm, w, t = mu[keep], calm[keep], w[keep], t[keep]
    z[index], best[index] = cur, cost
    return z, best


def refine(model, u, target, weights, delta, steps=8):
    """u (size,) after Newton steps that shrink the gradient: past where the objective's own rounding hides progress."""

    def look(u):
        value, jacobian = model(u[None])
        r = value[0] - target
        pull = weights * np.clip(r, -delta, delta)
        gradient = jacobian[0] @ pull
        free = ~(((u <= model.low) & (gradient > 0)) | ((u >= model.high) & (gradient < 0)))
        curvature = (jacobian[0] * (weights * (np.abs(r) <= delta))) @ jacobian[0].T
        return gradient, curvature, free, np.sum(weights * huber(r, delta))

    gradient, curvature, free, cost = look(u)
    for _ in range(steps):
        step = np.zeros_like(u)
        step[free] = -np.linalg.lstsq(curvature[np.ix_(free, free)], gradient[free], rcond=1e-13)[0]
        trial = np.clip(u + step, model.low, model.high)
        new = look(trial)
        shrinks = np.abs(new[0][new[2]]).max(initial=0.0) < np.abs(gradient[free]).max(initial=0.0)
        if not (shrinks and new[3] <= cost * (1 + 1e-13)):
            break
        u, (gradient, curvature, free, cost) = trial, new
    return u


def gradient_and_curvature(model, u, target, weights, delta):
    """The gradient, the sum of the absolute pulls of the residuals, and a condition number, at u (size,).

    What the bounds hold is set to zero in the gradient, which at an optimum is small beside the pulls. The condition
    number is that of the Gauss-Newton matrix in the fitted coordinates.
    """
    value, jacobian = model(u)
    pull = weights * np.clip(value - target, -delta, delta)
    jacobian = np.nan_to_num(jacobian, nan=0.0, posinf=0.0, neginf=0.0)
    gradient = jacobian @ pull
    gradient[((u <= model.low) & (gradient > 0)) | ((u >= model.high) & (gradient < 0))] = 0.0
    singular = np.linalg.svd(jacobian * np.sqrt(weights), compute_uv=False)
    return gradient, float(np.abs(pull).sum()), float((singular[0] / max(singular[-1], 1e-150)) ** 2)
