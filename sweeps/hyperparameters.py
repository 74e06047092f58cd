"""Rules from (N, D) to learning rate, batch, weight decay and warm-up: published ones, and our own from `scaling tune`.

A rule is called with a RunConfig and gives it the settings of its N and D. Outside the range it was fitted on it warns,
in one line. How rules are fitted: analysis/tuning/rule.py, from which they come as plain data.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import InputError, did_you_mean
from models.sizing import flops_per_token
from scaling.config import RunConfig
from scaling.folder import read_json

FAR = 10.0  # how far outside its range a rule of our own may be used in silence: to be used above it is its purpose


class OutOfRange(UserWarning):
    """A rule is used where nothing vouches for it."""


@dataclass(frozen=True)
class PowerRule:
    """lr = c (N / 1e5)^p (D / 1e6)^q at one batch size; N = n_compute, D in tokens.

    The form of Step Law (2503.04715); its published constants do not reach down to these sizes, so each project fits
    its own (`scaling tune`), on `n_range` and `d_range`.
    """

    c: float
    p: float
    q: float
    batch_size: int
    n_range: tuple[float, float]
    d_range: tuple[float, float]

    def lr(self, n: float, d: float) -> float:
        return power_law(self, n, d)

    def at(self, d: float) -> "PowerRule":
        """The rule for d tokens at every D: runs of a size that differ in D alone then share a trunk."""
        return dataclasses.replace(self, c=self.c * (d / 1e6) ** self.q, q=0.0)

    def __call__(self, config: RunConfig) -> RunConfig:
        """`config` with the learning rate and batch of its N and D."""
        n, d = config.counts.n_compute, config.tokens
        warn_outside(
            f"the rule {self.c:.3g} N^{self.p:g} D^{self.q:g}", {"N": (n, self.n_range), "D": (d, self.d_range)}, FAR
        )
        return with_settings(config, self.lr(n, d), self.batch_size)


@dataclass(frozen=True)
class GridRule:
    """lr = c (N / 1e5)^p (D / 1e6)^q and batch = b (D / 1e6)^r tokens, through the optima of grids over both."""

    c: float
    p: float
    q: float
    b: float
    r: float
    n_range: tuple[float, float]
    d_range: tuple[float, float]

    def lr(self, n: float, d: float) -> float:
        return power_law(self, n, d)

    def batch_tokens(self, d: float) -> float:
        return self.b * (d / 1e6) ** self.r

    def __call__(self, config: RunConfig) -> RunConfig:
        """`config` with the learning rate and batch of its N and D, the batch to the nearest whole window."""
        n, d = config.counts.n_compute, config.tokens
        warn_outside(
            f"the rule {self.c:.3g} N^{self.p:g} D^{self.q:g}", {"N": (n, self.n_range), "D": (d, self.d_range)}, FAR
        )
        return with_settings(config, self.lr(n, d), windows(self.batch_tokens(d), config))


def power_law(rule: PowerRule | GridRule, n: float, d: float) -> float:
    """Peak learning rate, to three digits, so that a rule refitted to the last bit names the same runs."""
    return float(f"{rule.c * (n / 1e5) ** rule.p * (d / 1e6) ** rule.q:.3g}")


@dataclass(frozen=True)
class PublishedRule:
    """A rule from the literature, in its own convention. What a paper leaves open stays as the config has it."""

    name: str
    source: str
    lr: Callable[[float, float], float]  #: (x, D in tokens) -> peak learning rate
    batch_tokens: Callable[[float, float], float]  #: (x, D in tokens) -> tokens per step
    x: Callable[[RunConfig], float]  #: what the rule is a function of, beside D
    x_name: str
    x_range: tuple[float, float]  #: where it was fitted
    conditions: str  #: what else it was fitted under
    weight_decay: float | None = None
    warmup_tokens: Callable[[float, float], float] | None = None  #: (x, tokens per step) -> tokens

    def __call__(self, config: RunConfig) -> RunConfig:
        """`config` with the learning rate, batch, weight decay and warm-up (of a tenth of D at most) of its N and D."""
        x, d = self.x(config), config.tokens
        warn_outside(f"{self.name} ({self.source})", {self.x_name: (x, self.x_range)}, 1.0)
        made = with_settings(config, float(f"{self.lr(x, d):.3g}"), windows(self.batch_tokens(x, d), config))
        if self.weight_decay is not None:
            made = dataclasses.replace(made, optim=dataclasses.replace(made.optim, weight_decay=self.weight_decay))
        if self.warmup_tokens is not None:
            warmup = round(min(self.warmup_tokens(x, made.tokens_per_step), d / 10))
            made = dataclasses.replace(made, schedule=dataclasses.replace(made.schedule, warmup_tokens=warmup))
        return made


def nonembedding_flops(config: RunConfig) -> float:
    """Non-embedding FLOPs per token x D with full attention, as DeepSeek counts C (2401.02954, equation 2)."""
    head = 6 * config.model.d_model * config.model.vocab_size
    return (flops_per_token(config.model, config.data.seq_len, causal=False) - head) * config.tokens


PUBLISHED = {
    rule.name: rule
    for rule in (
        PublishedRule(
            name="step-law",
            source="2503.04715, equation 1",
            lr=lambda n, d: 1.79 * n**-0.713 * d**0.307,
            batch_tokens=lambda n, d: 0.58 * d**0.571,
            x=lambda config: config.counts.n_nonembedding,
            x_name="N (non-embedding)",
            x_range=(6e7, 1e9),
            conditions="AdamW, cosine to 1e-5",
            weight_decay=0.1,
            warmup_tokens=lambda n, batch: 2000 * batch,
        ),
        PublishedRule(
            name="deepseek",
            source="2401.02954, equation 1",
            lr=lambda c, d: 0.3118 * c**-0.1250,
            batch_tokens=lambda c, d: 0.2920 * c**0.3271,
            x=nonembedding_flops,
            x_name="C (non-embedding FLOPs)",
            x_range=(1e17, 2e19),
            conditions="AdamW, multi-step schedule",
            weight_decay=0.1,
            warmup_tokens=lambda c, batch: 2000 * batch,
        ),
        PublishedRule(
            name="porian",
            source="2406.19146, section 3.4",
            lr=lambda n, d: 0.0047 * (n / 108e6) ** (-1 / 3),
            batch_tokens=lambda n, d: 2048 * 160 * (n / 108e6) ** (2 / 3),
            x=lambda config: config.counts.n_compute,
            x_name="N (with the head)",
            x_range=(2.5e7, 1.1e8),
            conditions="constant learning rate; a higher b2 at small batches",
            warmup_tokens=lambda n, batch: n,
        ),
    )
}


def published_rule(name: str) -> PublishedRule:
    """The rule of that name. Raises InputError for an unknown one, naming the nearest."""
    if name not in PUBLISHED:
        raise InputError(f"rule {name!r}: expected one of {', '.join(PUBLISHED)}{did_you_mean(name, PUBLISHED)}")
    return PUBLISHED[name]


def with_settings(config: RunConfig, lr: float, batch_size: int) -> RunConfig:
    return dataclasses.replace(config, batch_size=batch_size, optim=dataclasses.replace(config.optim, lr=lr))


def windows(tokens: float, config: RunConfig) -> int:
    return max(1, round(tokens / config.data.seq_len))


def warn_outside(rule: str, values: dict[str, tuple[float, tuple[float, float]]], factor: float) -> None:
    """One line, the same for all runs that a rule is used on, so that Python shows it once."""
    for name, (value, (low, high)) in values.items():
        if not low / factor <= value <= high * factor:
            warnings.warn(
                f"{rule} is used outside the range it was fitted on, {name} {low:.3g} to {high:.3g}: nothing vouches "
                "for its learning rate and batch there; tune on small models with scaling tune",
                OutOfRange,
                stacklevel=3,
            )


KINDS = {"power": PowerRule, "grid": GridRule}


def load_rule(path: Path | str) -> PowerRule | GridRule:
    """The rule in a file that `scaling tune --out` wrote. Raises InputError where it is none."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"rule {str(path)!r}: no such file; scaling tune DIR --out FILE writes one")
    try:
        return rule_of(read_json(path))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: holds no rule of scaling tune; write it again with scaling tune DIR --out {path}"
        ) from error


def rule_of(record: dict[str, Any]) -> PowerRule | GridRule:
    """The rule that `analysis.tuning` gives as plain data. Raises KeyError, TypeError, ValueError where it is none."""
    made = KINDS[record["rule"]]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(made):
        value = record[field.name]
        if field.name.endswith("_range"):
            low, high = map(float, value)
            values[field.name] = (low, high)
        else:
            values[field.name] = int(value) if field.name == "batch_size" else float(value)
        parts = values[field.name] if field.name.endswith("_range") else (values[field.name],)
        if not all(map(math.isfinite, parts)):
            raise ValueError(f"{field.name} = {value!r}")
    return made(**values)
