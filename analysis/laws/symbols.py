"""From a law's formula to NumPy functions: value, exact derivatives, natural parameters, constraints (SymPy)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import sympy as sp
from scipy import special

from analysis.errors import InputError, nearest_or_all


class minimum(sp.Function):
    """min(a, b); where they are equal the derivative is that of b."""

    def fdiff(self, argindex=1):
        a, b = self.args
        return below(a, b) if argindex == 1 else 1 - below(a, b)


class below(sp.Function):
    """1 where a < b, else 0; its derivative is taken as zero."""

    def fdiff(self, argindex=1):
        return sp.Integer(0)


class sigmoid(sp.Function):
    def fdiff(self, argindex=1):
        return self * (1 - self)


class m4_share(sp.Function):
    """The s in (0, 1) with log s - a log(1 - s) = w."""

    def fdiff(self, argindex=1):
        _, a = self.args
        slope = self * (1 - self) / (1 - self + a * self)
        return slope if argindex == 1 else slope * sp.log(1 - self)


class lognormal_pass(sp.Function):
    """1 - E exp(-exp(w + s z)), z standard normal."""

    def fdiff(self, argindex=1):
        return lognormal_slope(*self.args) if argindex == 1 else lognormal_tilt(*self.args)


class lognormal_slope(sp.Function):
    """The derivative of lognormal_pass by w, E[e^y exp(-e^y)] with y = w + s z."""


class lognormal_tilt(sp.Function):
    """Its derivative by s, E[z e^y exp(-e^y)]."""


# The trapezoid rule over a normal density: the integrands are smooth, so that it is exact to 1e-8 up to s = 5.
_Z = np.linspace(-9.0, 9.0, 181)
_NORMAL = np.exp(-(_Z**2) / 2) / np.exp(-(_Z**2) / 2).sum()


def normal_mean(w, s, of):
    """E of `of(exp(y), z)` over z standard normal, y = w + s z, (...,)."""
    w, s = np.broadcast_arrays(np.asarray(w, float), np.asarray(s, float))
    rate = np.exp(np.minimum(w[..., None] + s[..., None] * _Z, 700.0))
    return of(rate, _Z) @ _NORMAL


def solve_m4(w, a):
    """m4_share: Newton in t = logit s, where log s - a log(1 - s) is monotone and convex; (...,) to full precision."""
    w, a = np.broadcast_arrays(np.asarray(w, float), np.asarray(a, float))
    # Both asymptotes are straight lines, t = w below and t = w / a above.
    t = np.where(w < 0, w, w / a)
    for _ in range(60):
        s = special.expit(t)
        miss = special.log_expit(t) - a * special.log_expit(-t) - w
        step = miss / (1.0 - s + a * s)
        t = t - step
        if not (np.abs(step) > 1e-14 * (1.0 + np.abs(t))).any():
            break
    return special.expit(t)


_FUNCTIONS = {
    "minimum": minimum,
    "sigmoid": sigmoid,
    "m4_share": m4_share,
    "loggamma": sp.loggamma,
    "lognormal_pass": lognormal_pass,
}
_MODULES = [
    {
        "minimum": np.minimum,
        "below": lambda a, b: np.where(np.less(a, b), 1.0, 0.0),
        "sigmoid": special.expit,
        "m4_share": solve_m4,
        "lognormal_pass": lambda w, s: normal_mean(w, s, lambda rate, _: -np.expm1(-rate)),
        "lognormal_slope": lambda w, s: normal_mean(w, s, lambda rate, _: rate * np.exp(-rate)),
        "lognormal_tilt": lambda w, s: normal_mean(w, s, lambda rate, z: z * rate * np.exp(-rate)),
        "loggamma": special.gammaln,
        "polygamma": special.polygamma,
        "digamma": special.digamma,
    },
    "numpy",
]


@dataclass(frozen=True)
class Compiled:
    """The functions of one law; see `Law` for shapes."""

    value: object
    by_input: object
    plain: object
    params: object
    symbols: SimpleNamespace


@lru_cache(maxsize=256)
def compile_law(law) -> Compiled:
    # SymPy cancels more where it knows the sign: a log may have either, an exponent that starts above 0 is positive.
    z = [
        sp.Symbol(c.name, **({"positive": True} if not c.log and c.low > 0 else {"real": True}))
        for c in law.coordinates
    ]
    x = [sp.Symbol(f"log_{name}", real=True) for name in law.inputs]
    centre = [sp.Symbol(f"centre_{name}", real=True) for name in law.inputs]
    quantity = {c.name: sp.exp(s) if c.log else s for c, s in zip(law.coordinates, z, strict=True)}

    # The natural parameters, by coordinates at the centre: each coordinate times its unit there.
    scope = quantity | {name: sp.exp(s) for name, s in zip(law.inputs, centre, strict=True)}
    shifted = {c.name: quantity[c.name] * _parse(c.unit, scope) for c in law.coordinates}
    natural = dict(law.natural) or {c.name: c.name for c in law.coordinates}
    params = {name: _parse(text, shifted) for name, text in natural.items()}
    at_centre = {name: _parse(text, quantity) for name, text in natural.items()}

    formula = _parse(law.formula, at_centre | {name: sp.exp(s) for name, s in zip(law.inputs, x, strict=True)})
    own = {name: sp.Symbol(name, positive=True) for name in (*natural, *law.inputs)}
    plain = _parse(law.formula, own)
    scales = {s for s, c in zip(z, law.coordinates, strict=True) if c.log}
    logs = {name: _log(e) if e.free_symbols & scales else None for name, e in params.items()}
    shown = [e if logs[name] is None else logs[name] for name, e in params.items()]
    of_params = sp.lambdify([*z, *centre], shown, modules=_MODULES)

    def evaluate(values, at):
        parts = of_params(*(values[..., i] for i in range(len(z))), *(at.get(name, 0.0) for name in law.inputs))
        shape = values.shape[:-1]
        # A scale that the runs do not pin down can lie beyond what a float holds.
        return {
            name: np.broadcast_to(part if logs[name] is None else np.exp(np.clip(part, -690.0, 690.0)), shape)[()]
            for name, part in zip(params, parts, strict=True)
        }

    def function(outputs):
        return sp.lambdify([*z, *x], outputs, modules=_MODULES, cse=True)

    return Compiled(
        value=function([formula, *(sp.diff(formula, s) for s in z)]),
        by_input=function([sp.diff(formula, s) for s in x]),
        plain=sp.lambdify([own[p] for p in natural] + [own[i] for i in law.inputs], plain, modules=_MODULES),
        params=evaluate,
        symbols=SimpleNamespace(z=z, centre=centre, params=params, logs=logs),
    )


def _parse(text: str, scope):
    return sp.sympify(text, locals={**_FUNCTIONS, **scope})


def _log(expression):
    """The log of a positive expression, as one that cannot overflow; None where it may be of either sign."""
    if not expression.is_positive:
        return None
    return sp.expand(sp.expand_log(sp.log(expression), force=True))


def linear_coordinates(law) -> list[int]:
    """Floors and amplitudes in which (or in whose exp) the law is jointly linear: its slopes by them stay the same."""
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=6) for _ in law.inputs]
    low, high = np.clip(np.array(law.bounds).T, -1.0, 1.5)
    z = rng.uniform(low, high)
    taken: list[int] = []
    for i, c in enumerate(law.coordinates):
        if c.kind not in ("floor", "amplitude"):
            continue
        group = [*taken, i]
        slopes = []
        for _ in range(2):
            z[group] = rng.uniform(0.1, 1.0, len(group))
            amounts = [np.exp(z[j]) if law.coordinates[j].log else 1.0 for j in group]
            slopes.append(law.value(z, inputs)[1][group] / np.array(amounts)[:, None])
        if np.allclose(*slopes, rtol=1e-9, atol=1e-12):
            taken = group
    return taken


def constraints(law, centre, fixed, tied):
    """Fixed and tied parameters as an affine map of fewer coordinates: z = u @ matrix + offset, and which z are u.

    fixed {parameter: value}; tied: pairs of parameters that share one value. Raises InputError where a name is not a
    parameter, or where what is asked is not affine in the coordinates that are fitted.
    """
    compiled = law.compiled
    z, size = compiled.symbols.z, law.size
    at = {s: centre.get(name, 0.0) for s, name in zip(compiled.symbols.centre, law.inputs, strict=True)}

    def of(name):
        if name not in compiled.symbols.params:
            raise InputError(f"law {law.name!r} has no parameter {name!r}{nearest_or_all(name, law.parameters)}")
        log = compiled.symbols.logs[name]
        return (compiled.symbols.params[name] if log is None else log).subs(at), log is not None

    rows, right = [], []
    wanted = [(f"{name} = {value:g}", of(name), value) for name, value in fixed.items()]
    for text, (expression, logged), value in wanted:
        if logged and not value > 0:
            raise InputError(f"fixed {text}: must be above 0")
        rows.append((text, expression - (np.log(value) if logged else value)))
    for name, other in tied:
        (a, a_log), (b, b_log) = of(name), of(other)
        if a_log != b_log:
            raise InputError(f"tied {name} = {other}: one is positive and the other is not")
        rows.append((f"{name} = {other}", a - b))
    matrix = []
    for text, expression in rows:
        numerator, _ = sp.fraction(sp.together(expression))
        numerator = sp.expand(numerator)
        slopes = [sp.diff(numerator, s) for s in z]
        if any(s.free_symbols for s in slopes):
            raise InputError(f"law {law.name!r} cannot hold {text}: it is not linear in what is fitted")
        rest = numerator.subs(dict.fromkeys(z, 0))
        matrix.append([float(s) for s in slopes])
        right.append(-float(rest))
    held = np.array(matrix).reshape(-1, size)
    # Each constraint gives up one coordinate, the one it weighs most.
    free = list(range(size))
    system, values = held.copy(), np.array(right)
    for i in range(len(system)):
        pivot = int(np.argmax(np.abs(system[i])))
        if abs(system[i, pivot]) < 1e-12:
            raise InputError(f"{rows[i][0]}: it contradicts, or repeats, the other parameters that are held")
        free.remove(pivot)
        values[i] /= system[i, pivot]
        system[i] /= system[i, pivot]
        for j in range(len(system)):
            if j != i:
                values[j] -= system[j, pivot] * values[i]
                system[j] -= system[j, pivot] * system[i]
    if not free:
        raise InputError(f"law {law.name!r}: every parameter is held, nothing is left to fit")
    to_z, offset = np.zeros((len(free), size)), np.zeros(size)
    for k, i in enumerate(free):
        to_z[k, i] = 1.0
    for i in range(len(system)):
        pivot = next(j for j in range(size) if j not in free and abs(system[i, j]) > 0.5)
        offset[pivot] = values[i]
        for k, j in enumerate(free):
            to_z[k, pivot] = -system[i, j]
    return to_z, offset, free
