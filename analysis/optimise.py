"""Minimises weighted Huber sums over many problems at once: starts, bootstrap refits, rolling origins.

Each row of a batch is one problem with its own starting point, weights, and targets on the same runs. A step solves the
Newton system of the piecewise quadratic (rows inside delta), damped towards the reweighted least squares system, which
always majorises; a batch costs about as much as one problem.
"""

from __future__ import annotations

import numpy as np


def huber(r, delta):
    """0.5 r^2 inside delta, delta (|r| - delta / 2) outside."""
    a = np.abs(r)
    return np.where(a <= delta, 0.5 * r * r, delta * (a - 0.5 * delta)) if np.isfinite(delta) else 0.5 * r * r


def minimise(law, x, y, target, z, weights=None, delta=1e-3, iterations=200):
    """Local minima of sum_i w_i huber(log L(z; x_i, y_i) - target_i).

    z (problems, size); weights and target (rows,) or (problems, rows). Returns z and the objective, (problems,).
    Each problem stays inside the law's bounds.
    """
    z = np.array(z, dtype=np.float64)
    problems, rows = len(z), len(x)
    w = np.broadcast_to(1.0 if weights is None else weights, (problems, rows))
    t = np.broadcast_to(target, (problems, rows))
    low, high = np.array(law.bounds).T
    z = np.clip(z, low, high)
    best = np.empty(problems)

    index = np.arange(problems)
    mu = np.full(problems, 1.0)
    calm = np.zeros(problems, dtype=int)
    value, jacobian = law.log_loss(z, x, y)
    r = value - t
    cost = np.sum(w * huber(r, delta), axis=-1)
    cur, w, t = z.copy(), w.copy(), t.copy()
    eye = np.eye(law.size)
    for _ in range(iterations):
        a = np.maximum(np.abs(r), 1e-300)
        inside = a <= delta
        psi = r if not np.isfinite(delta) else np.clip(r, -delta, delta)
        weight = w * (inside + mu[:, None] * np.where(inside, 1.0, delta / a if np.isfinite(delta) else 1.0))
        gradient = np.matmul((w * psi)[:, None, :], jacobian)[:, 0, :]
        hessian = np.matmul((jacobian * weight[..., None]).transpose(0, 2, 1), jacobian)
        diagonal = np.einsum("bii->bi", hessian)
        diagonal += 1e-9 * mu[:, None] * diagonal + 1e-14 * diagonal.max(axis=-1, keepdims=True) + 1e-300
        held = ((cur <= low) & (gradient > 0)) | ((cur >= high) & (gradient < 0))
        gradient[held] = 0.0
        hessian = np.where(held[:, :, None] | held[:, None, :], eye * diagonal[:, :, None], hessian)
        step = -np.linalg.solve(hessian, gradient[..., None])[..., 0]
        step *= np.minimum(1.0, 1.0 / np.maximum(np.abs(step).max(axis=-1, keepdims=True), 1e-300))
        trial = np.clip(cur + step, low, high)
        expected = -np.einsum("bi,bi->b", gradient, trial - cur)
        new_value, new_jacobian = law.log_loss(trial, x, y)
        new_r = new_value - t
        new_cost = np.sum(w * huber(new_r, delta), axis=-1)
        accept = new_cost < cost
        gain = np.where(accept, cost - new_cost, 0.0)
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


def gradient_and_curvature(law, z, x, y, target, weights, delta):
    """The gradient, the sum of the absolute pulls of the residuals, and a condition number, at z (size,).

    What the bounds hold is set to zero in the gradient, which at an optimum is small beside the pulls. The condition
    number is that of the Gauss-Newton matrix of log loss in the centred coordinates.
    """
    value, jacobian = law.log_loss(z, x, y)
    pull = weights * np.clip(value - target, -delta, delta)
    gradient = pull @ jacobian
    low, high = np.array(law.bounds).T
    gradient[((z <= low) & (gradient > 0)) | ((z >= high) & (gradient < 0))] = 0.0
    singular = np.linalg.svd(jacobian * np.sqrt(weights)[:, None], compute_uv=False)
    return gradient, float(np.abs(pull).sum()), float((singular[0] / max(singular[-1], 1e-150)) ** 2)
