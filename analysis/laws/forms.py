"""The laws, each written once: formula, coordinates, bounds, source, starting region.

A new law is one `Law(...)` here; nothing else has to know it.
"""

from __future__ import annotations

from analysis.errors import InputError, nearest_or_all
from analysis.laws.law import Law, amplitude, exponent, floor, positive, real

_CHINCHILLA = (floor(), amplitude("A", "N**alpha"), amplitude("B", "D**beta"), exponent("alpha"), exponent("beta"))
# Chinchilla, Kaplan with a floor, and the coupled form are one family, E + [(P N^-p)^(1/g) + (Q D^-q)^(1/g)]^g,
# g = gamma, with gamma = 1, gamma = q, and gamma free. p and q are the exponents that remain when the other quantity is
# unlimited: well determined where alpha and beta of the coupled form are not, so they are what is fitted.
_FAMILY = (floor(), amplitude("P", "N**p"), amplitude("Q", "D**q"), exponent("p"), exponent("q"))
_REUSE = "minimum(D, U)*(1 + R_D*(1 - exp(-(D/minimum(D, U) - 1)/R_D)))"
_BEST_N = "(alpha*A/(beta*B))**(1/alpha)*minimum(D, U)**(beta/alpha)"
_BASE_N = f"minimum(N, {_BEST_N})"
_EXCESS = f"{_BASE_N}*(1 + R_N*(1 - exp(-(N/{_BASE_N} - 1)/R_N)))"


def _broken(breaks: int) -> Law:
    """Breaks in order of x; each has a place d, a change of exponent c, and a sharpness f."""
    turns = range(1, breaks + 1)
    formula = "a + b*x**-c0" + "".join(f"*(1 + (x/d{i})**(1/f{i}))**(-c{i}*f{i})" for i in turns)
    coordinates = [floor("a"), amplitude("b", "x**c0"), real("c0", 0.0, 3.0, (0.05, 0.3))]
    for i in turns:
        shares = (0.3, 0.7) if breaks == 1 else (i / (breaks + 1),)
        coordinates += [
            positive(f"d{i}", 1e-12, 1e12, shares, unit="x", kind="break"),
            real(f"c{i}", -3.0, 3.0, (-0.2, 0.3)),
            positive(f"f{i}", 0.03, 10.0, (0.3,)),
        ]
    return Law(
        f"broken{breaks}",
        formula,
        "broken neural scaling law, Caballero et al. 2022, arXiv 2210.14891, equation 1",
        ("x",),
        tuple(coordinates),
        most_starts=24,
    )


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        Law(
            "chinchilla",
            "E + A*N**-alpha + B*D**-beta",
            "Hoffmann et al. 2022, arXiv 2203.15556, equation 2",
            ("N", "D"),
            _CHINCHILLA,
        ),
        Law(
            "kaplan",
            "E + ((N_c/N)**(alpha_N/alpha_D) + D_c/D)**alpha_D",
            "Kaplan et al. 2020, arXiv 2001.08361, equation 1.5, with a floor E",
            ("N", "D"),
            _FAMILY,
            natural={"E": "E", "N_c": "P**(1/p)", "D_c": "Q**(1/q)", "alpha_N": "p", "alpha_D": "q"},
        ),
        Law(
            "coupled",
            "E + (A*N**-alpha + B*D**-beta)**gamma",
            "distillation scaling laws, Busbridge et al. 2025, arXiv 2502.08606",
            ("N", "D"),
            (*_FAMILY, real("gamma", 0.05, 5.0, (0.3, 1.0))),
            natural={
                "E": "E",
                "A": "P**(1/gamma)",
                "B": "Q**(1/gamma)",
                "alpha": "p/gamma",
                "beta": "q/gamma",
                "gamma": "gamma",
            },
        ),
        Law(
            "over_training",
            "E + (a*(D/N)**eta + b*(D/N)**-eta)*(6*N*D)**-eta",
            "Gadre et al. 2024, arXiv 2403.08540, equation 4, with C = 6ND",
            ("N", "D"),
            (floor(), amplitude("a", "N**(2*eta)"), amplitude("b", "D**(2*eta)"), exponent("eta", (0.1, 0.25))),
        ),
        Law(
            "data_constrained",
            f"E + A*({_EXCESS})**-alpha + B*({_REUSE})**-beta",
            "Muennighoff et al. 2023, arXiv 2305.16264, equations 5 and 6; U unique tokens",
            ("N", "D", "U"),
            (
                floor(),
                amplitude("A", "N**alpha"),
                amplitude("B", "D**beta"),
                exponent("alpha"),
                exponent("beta"),
                positive("R_D", 1e-2, 1e9, (5.0, 50.0)),
                positive("R_N", 1e-2, 1e9, (1.0, 10.0)),
            ),
            most_starts=24,
            like={"U": "D"},
        ),
        Law(
            "farseer",
            "exp(s*N**q + S) + exp(B*N**b + Q)*D**(-exp(A*N**a + E))",
            "Farseer, Li et al. 2025, arXiv 2506.10972",
            ("N", "D"),
            (
                real("s", -30.0, 30.0, (-0.4, 0.4), unit="N**-q"),
                real("q", -0.6, 0.6, (0.15, -0.15)),
                real("S", -30.0, 30.0, (0.0,)),
                real("B", -300.0, 300.0, (12.0,), unit="N**-b"),
                real("b", -0.6, 0.6, (-0.1,)),
                real("Q", -300.0, 300.0, (-6.0,)),
                real("A", -30.0, 30.0, (-1.4,), unit="N**-a"),
                real("a", -0.6, 0.6, (0.12, -0.12)),
                real("E", -30.0, 30.0, (0.42,)),
            ),
        ),
        Law(
            "power",
            "a*x**-c",
            "Kaplan et al. 2020, arXiv 2001.08361, equations 1.1 to 1.3",
            ("x",),
            (amplitude("a", "x**c"), exponent("c")),
        ),
        Law(
            "saturating",
            "E + a*x**-c",
            "Hestness et al. 2017, arXiv 1712.00409; Henighan et al. 2020, arXiv 2010.14701",
            ("x",),
            (floor(), amplitude("a", "x**c"), exponent("c")),
        ),
        Law(
            "shifted",
            "b*(1/x + g)**c",
            "M3, Bansal et al. 2022, arXiv 2202.01994",
            ("x",),
            (amplitude("b", "x**c"), positive("g", 1e-12, 1e12, (1e-3, 0.1, 1.0), unit="1/x"), exponent("c")),
        ),
        Law(
            "m4",
            "E + R*m4_share(log(b) - c*log(x) + (a - 1)*log(R), a)",
            "M4, Alabdulmohsin et al. 2022, arXiv 2209.06640: (y - E)/(E + R - y)^a = b x^-c, R = e0 - E",
            ("x",),
            (
                floor(),
                positive("R", 1e-6, 1e4, (0.5, 3.0)),
                positive("a", 1e-3, 20.0, (0.1, 1.0)),
                amplitude("b", "x**c"),
                exponent("c"),
            ),
        ),
        _broken(1),
        _broken(2),
        Law(
            "learning_rate",
            "c*N**p*D**q",
            "Step Law, Li et al. 2025, arXiv 2503.04715: the best learning rate",
            ("N", "D"),
            (amplitude("c", "N**-p*D**-q"), real("p", -3.0, 3.0, (-0.7, 0.0)), real("q", -3.0, 3.0, (0.0, 0.3))),
            target="learning rate",
        ),
        Law(
            "batch",
            "c*D**r",
            "Step Law, Li et al. 2025, arXiv 2503.04715: the best batch, tokens",
            ("D",),
            (positive("c", 1e-9, 1e15, (1e5,), unit="D**-r"), real("r", -3.0, 3.0, (0.3, 0.6))),
            target="batch",
        ),
        Law(
            "error",
            "eps - k*exp(-g*L)",
            "downstream error from loss, Gadre et al. 2024, arXiv 2403.08540, equation 5",
            ("L",),
            (
                real("eps", 1e-3, 2.0, (0.6, 1.0)),
                positive("k", 1e-6, 1e6, (0.5, 5.0), unit="1"),
                positive("g", 1e-3, 1e2, (0.5, 2.0)),
            ),
            target="error",
        ),
        Law(
            "accuracy",
            "low + (high - low)*sigmoid(k*(L_0 - L))",
            "downstream accuracy from loss, Bhagia et al. 2024, arXiv 2412.04403",
            ("L",),
            (
                real("low", 0.0, 1.0, (0.02, 0.25)),
                real("high", 0.0, 1.5, (1.0, 0.8)),
                positive("k", 1e-2, 1e3, (2.0, 8.0)),
                real("L_0", 0.0, 20.0, (1.0, 2.0, 3.0)),
            ),
            target="accuracy",
        ),
        Law(
            "pass_at_k",
            "exp(-a*k**-b)",
            "Brown et al. 2024, arXiv 2407.21787: -log pass@k = a k^-b",
            ("k",),
            (positive("a", 1e-6, 1e4, (0.5, 3.0), unit="k**b"), exponent("b", (0.1, 0.5))),
            target="pass@k",
        ),
        Law(
            "pass_at_k_beta",
            "1 - exp(loggamma(be + k) - loggamma(al + be + k) + loggamma(al + be) - loggamma(be))",
            "Schaeffer et al. 2025, arXiv 2502.17578: 1 - pass@k = B(al, be + k)/B(al, be)",
            ("k",),
            (positive("al", 1e-4, 1e3, (0.1, 1.0)), positive("be", 1e-4, 1e6, (1.0, 10.0, 100.0))),
            target="pass@k",
        ),
        Law(
            "pass_at_k_lognormal",
            "lognormal_pass(mu + log(k), sigma)",
            "1 - E[(1 - p)^k], the rate -log(1 - p) (p, where it is small) lognormal over problems: exp(mu + sigma z)",
            ("k",),
            (real("mu", -40.0, 10.0, (-8.0, -4.0, -1.0)), positive("sigma", 1e-2, 30.0, (0.5, 2.0, 5.0))),
            target="pass@k",
        ),
        Law(
            "logit_power",
            "sigmoid(c + s*log(N) + u*log(D))",
            "a share solved whose odds are a power of N and of D: logit p = c + s log N + u log D",
            ("N", "D"),
            (amplitude("a", "N**-s*D**-u"), real("s", -5.0, 5.0, (0.0, 0.5)), real("u", -5.0, 5.0, (0.0, 0.5))),
            natural={"c": "log(a)", "s": "s", "u": "u"},
            target="accuracy",
        ),
        Law(
            "best_of_n",
            "sqrt(K)*(alpha - beta*sqrt(K))",
            "gold reward of the best of n, Gao et al. 2022, arXiv 2210.10760, equation 1; K the KL, nats, d = sqrt(K)",
            ("K",),
            (real("alpha", -1e3, 1e3, (0.0, 1.0)), real("beta", -1e3, 1e3, (0.0, 0.1))),
            target="gold reward",
        ),
        Law(
            "rl_reward",
            "sqrt(K)*(alpha - beta*log(sqrt(K)))",
            "gold reward of a policy trained on a proxy, Gao et al. 2022, arXiv 2210.10760, equation 1",
            ("K",),
            (real("alpha", -1e3, 1e3, (0.0, 1.0)), real("beta", -1e3, 1e3, (0.0, 0.1))),
            target="gold reward",
        ),
        Law(
            "capacity",
            "F*(1 + (c*P/F)**-s)**(-1/s)",
            "bits stored: F bits of facts or c P of P parameters, whichever is less, the knee of sharpness s",
            ("F", "P"),
            (positive("c", 1e-3, 1e3, (0.3, 2.0), unit="1"), positive("s", 0.2, 50.0, (1.0, 4.0))),
            target="bits stored",
        ),
        Law(
            "transfer",
            "k*F**alpha*N**beta",
            "data transferred, Hernandez et al. 2021, arXiv 2102.01293, equation 1.1; F the finetuning tokens",
            ("F", "N"),
            (
                amplitude("k", "F**-alpha*N**-beta"),
                real("alpha", -3.0, 3.0, (0.2, 0.6)),
                real("beta", -3.0, 3.0, (0.0, 0.4)),
            ),
            target="tokens transferred",
        ),
        Law(
            "pretrained",
            "E + (A*P**-alpha + G)*F**-beta",
            "loss after finetuning on F tokens from P tokens of pretraining, arXiv 2408.16947: the rival of `transfer`",
            ("P", "F"),
            (
                floor(),
                amplitude("A", "P**alpha*F**beta"),
                amplitude("G", "F**beta"),
                exponent("alpha"),
                exponent("beta", (0.05, 0.3), low=0.001),
            ),
        ),
        Law(
            "offset",
            "R + c*(M + M_0)**-g",
            "an excess over a known entropy against M records; M_0 of them the weights hold, R none of them can mend",
            ("M",),
            (
                floor("R", (0.0, 0.5)),
                amplitude("c", "M**g"),
                positive("M_0", 1e-6, 1e12, (0.01, 1.0), unit="M"),
                exponent("g", (0.15, 0.5)),
            ),
            target="excess",
        ),
    )
}

# What `auto` chooses among, by rolling origin: laws of N and D, and laws of one quantity.
JOINT = ("chinchilla", "kaplan", "coupled")
SINGLE = ("power", "saturating", "shifted", "m4", "broken1")


def law_named(name: str) -> Law:
    """The law of that name; InputError with the nearest name where there is none."""
    if name not in LAWS:
        raise InputError(f"law {name!r} is not known{nearest_or_all(name, LAWS)}")
    return LAWS[name]
