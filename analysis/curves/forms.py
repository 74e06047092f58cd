"""The laws of the whole loss curve, Tissue's and the multi-power law, as `minimise` takes them, with exact derivatives.

S(t) = sum lr[0..t]; d_k = lr[k-1] - lr[k] counts after the warm-up. Losses are in nats per token.
Shape letters: P logged points, Z free coordinates of a law, M several such points at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.signal import lfilter

from analysis.curves.curve import drops

# Cells of a run for the multi-power sum; points of a curve for starts, folds and draws.
GRID, COARSE = 100, 60


@dataclass(frozen=True)
class CurveLaw:
    """A law of the curve. Its free coordinates: log L0, log A', log alpha, log B', then those bounded by `shape`."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    shape: tuple[tuple[float, float], ...]
    starts: tuple[tuple[float, ...], ...]
    source: str

    @property
    def size(self) -> int:
        return 4 + len(self.shape)


CURVE_LAWS = {
    "tissue": CurveLaw(
        name="tissue",
        formula="L0 + A S^-alpha - C S2, S2 = sum_i sum_(k<=i) d_k lambda^(i-k)",
        parameters=("L0", "A", "alpha", "C", "lambda"),
        shape=((-9.0, 3.0),),  # log of 1/(1 - lambda) in units of the longest run
        starts=((-4.4,), (-3.2,), (-1.8,)),
        source="Tissue et al. 2408.11029, eq. 1; lambda is fitted",
    ),
    "multi_power": CurveLaw(
        name="multi_power",
        formula="L0 + A S^-alpha - B sum_k d_k [1 - (1 + C lr_k^-gamma S_k)^-beta], S_k = sum lr[k..t]",
        parameters=("L0", "A", "alpha", "B", "C", "beta", "gamma"),
        shape=(
            (-8.0, 8.0),
            (-4.0, 3.0),
            (0.0, 1.5),
        ),  # log of C lr^-gamma S at the peak and 1/25 of the run; log beta; gamma
        starts=((0.0, -1.2, 0.5), (0.0, 0.0, 0.2), (-2.0, -1.2, 0.2), (-2.0, 0.0, 0.5), (2.0, -1.2, 0.8)),
        source="Luo et al. 2503.12811, eq. 1",
    ),
}


class CurveModel:
    """Log loss and its exact derivatives at the logged steps of several schedules, in the form `minimise` takes.

    The sum of the multi-power law runs over changes of lr grouped by sign between neighbouring steps of a common grid,
    each group at its centroid in S and in lr: every group is whole or absent at a logged step. Against the sum over
    all changes at values fitted to public runs the loss is off by 2e-5 (cosine) to 2e-4 (a steep cooldown) where it is
    fitted, and by 4e-5 in predictions, which take finer cells. S2 is exact, by recurrence.
    """

    def __init__(self, law, parts, scale=None, floor=1.0, cells=GRID):
        self.law, self.steps, self._cells = CURVE_LAWS[law], [step for _, step in parts], cells
        sums = [np.cumsum(lr)[step] for lr, step in parts]
        self.log_s = np.log(np.concatenate(sums))
        self.scale = scale or {
            "peak": float(max(lr.max() for lr, _ in parts)),
            "centre": float(self.log_s.mean()),
            "unit": float(max(s[-1] for s in sums) / 25),
            "steps": float(max(step[-1] for step in self.steps)),
        }
        top, shape = np.log(floor), list(self.law.shape)
        if law == "tissue":
            shape = [(max(shape[0][0], np.log(2 / self.scale["steps"])), shape[0][1])]
        bounds = [(top - 3, top), (top - 8, top + 2), (np.log(0.02), np.log(3)), (top - 10, top + 5), *shape]
        self.low, self.high = np.array(bounds).T
        self._anneal = [getattr(self, f"_{law}")(lr, step) for lr, step in parts]

    def __call__(self, z):
        """Log loss (..., P) and its derivatives (..., Z, P) at z (..., Z)."""
        z = np.asarray(z, float)
        if z.ndim > 1:
            values, slopes = zip(*(self(row) for row in z), strict=True)
            return np.array(values), np.array(slopes)
        terms = np.concatenate([anneal(*z[4:]) for anneal in self._anneal], axis=1)
        floor, alpha, gain = np.exp(z[0]), np.exp(z[2]), np.exp(z[3])
        x = self.log_s - self.scale["centre"]
        power = np.exp(z[1] - alpha * x)
        loss = np.maximum(floor + power - gain * terms[0], 1e-2 * floor)
        slopes = [np.full(len(x), floor), power, -power * alpha * x, *(-gain * terms)]
        return np.log(loss), np.stack(slopes) / loss

    def _tissue(self, lr, step):
        """(1 - lambda) S2 over the peak, and its derivative to the free coordinate: (2, P)."""
        drop = drops(lr, step) / self.scale["peak"]
        total = np.cumsum(drop)[step]
        first = np.flatnonzero(drop)[0] if drop.any() else None

        def terms(log_time):
            if first is None:
                return np.zeros((2, len(step)))
            rest = np.exp(-log_time) / self.scale["steps"]
            keep, m = 1 - rest, np.zeros((2, len(drop)))
            m[0, first:] = lfilter([1.0], [1.0, -keep], drop[first:])
            m[1, first:] = lfilter([0.0, 1.0], [1.0, -keep], m[0, first:])
            m = m[:, step]
            return np.stack([total - keep * m[0], -rest * (m[0] + keep * m[1])])

        return terms

    def _multi_power(self, lr, step):
        """The sum over lr changes, over the peak, and its derivatives to the free coordinates: (4, P)."""
        peak, s, drop = self.scale["peak"], np.cumsum(lr), drops(lr, step)
        k = np.flatnonzero(drop)
        if not len(k):
            return lambda *_: np.zeros((4, len(step)))
        grid = np.unique(np.r_[step, np.linspace(0, step[-1], self._cells + 1).astype(int)])
        cell = np.searchsorted(grid, k)
        _, first, group = np.unique(2 * cell + (drop[k] < 0), return_index=True, return_inverse=True)
        size = np.bincount(group, drop[k])
        start = np.bincount(group, drop[k] * s[k - 1]) / size
        rate = np.bincount(group, drop[k] * np.maximum(lr[k], 1e-6 * peak)) / size
        at, of = np.nonzero(grid[cell[first]][None, :] <= step[:, None])
        reach = np.log(np.maximum(s[step][at] - start[of], 1e-12 * s[-1]) / self.scale["unit"])
        log_rate, size = np.log(rate / peak)[of], size[of] / peak

        def terms(log_c, log_beta, gamma):
            x, beta = np.exp(np.minimum(log_c - gamma * log_rate + reach, 300.0)), np.exp(log_beta)
            log1 = np.log1p(x)
            kept = size * np.exp(-beta * log1)
            slope = beta * kept * x / (1 + x)
            rows = (size - kept, slope, beta * log1 * kept, -log_rate * slope)
            return np.stack([np.bincount(at, row, minlength=len(step)) for row in rows])

        return terms

    def starts(self, loss):
        """Points (S, Z): a grid of alpha and the law's shape, and the rest by non-negative least squares."""
        out = []
        for alpha in (0.3, 0.6) if self.law.name == "tissue" else (0.45,):
            for shape in self.law.starts:
                terms = np.concatenate([anneal(*shape)[0] for anneal in self._anneal])
                power = np.exp(-alpha * (self.log_s - self.scale["centre"]))
                columns = np.stack([np.ones(len(loss)), power, -terms], axis=1) / loss[:, None]
                linear = np.log(np.maximum(nnls(columns, np.ones(len(loss)))[0], 1e-3 * loss.min()))
                out.append([linear[0], linear[1], np.log(alpha), linear[2], *shape])
        return np.clip(out, self.low + 1e-6, self.high - 1e-6)

    def thinned(self, curves):
        """The same problem at about 60 points a curve, and which rows of the full one these are."""
        keep = [np.unique(np.linspace(0, len(c.step) - 1, min(COARSE, len(c.step))).astype(int)) for c in curves]
        coarse = CurveModel(self.law.name, [(c.lr, c.step[k]) for c, k in zip(curves, keep, strict=True)], self.scale)
        coarse.low, coarse.high = self.low, self.high
        offset = np.cumsum([0, *(len(c.step) for c in curves[:-1])])
        return coarse, np.concatenate([k + o for k, o in zip(keep, offset, strict=True)])


def natural(law: CurveLaw, z, scale) -> dict:
    """The law's own parameters at free coordinates (..., Z)."""
    z = np.moveaxis(np.asarray(z), -1, 0)
    peak, alpha, gain = scale["peak"], np.exp(z[2]), np.exp(z[3])
    out = {"L0": np.exp(z[0]), "A": np.exp(z[1] + alpha * scale["centre"]), "alpha": alpha}
    if law.name == "tissue":
        rest = np.exp(-z[4]) / scale["steps"]
        return out | {"C": gain * rest / peak, "lambda": 1 - rest}
    c = np.exp(z[4] + z[6] * np.log(peak)) / scale["unit"]
    return out | {"B": gain / peak, "C": c, "beta": np.exp(z[5]), "gamma": z[6]}
