"""Choice of a variant's learning rate, from a parabola in the logarithm of the rate.

Each rate of a list is tried with several seeds that no comparison uses. The list is widened until the best rate lies
between two worse ones, and the parabola is fitted to the rates near it, as marin does (github.com/marin-community).
Where that leaves open where the minimum is, further seeds are tried: a rate that is chosen with less certainty would
be a handicap. Near the rate of least loss some seeds are unstable already, and losses scatter several times more than
below it. So the choice follows the one-standard-error rule (Breiman et al., Classification and Regression Trees,
1984, section 3.4.3): the lowest rate that cannot be told from the best. Published differences between variants are as
small as what a rate that is off by a fifth costs, so the choice says how sure it is, and what an error costs.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

LEAST_RATES = 4  # of a fit
KNOWN_TO = 0.25  # octaves: the standard error of a minimum that is known well enough
MOST_ROUNDS = 4  # of seeds
WIDENED_AT_MOST = 4  # beyond that the loss falls without end, or every rate diverges
NEAR = 4.0  # a rate further from the best than this factor is not fitted: there the loss is no parabola

Losses = Mapping[float, Mapping[int, float]]  # rate -> seed -> loss; infinite: diverged


def tuning_seeds(seeds: Sequence[int], count: int) -> list[int]:
    """Seeds that are not among `seeds` and do not change when another one is added to them."""
    return list(itertools.islice((seed for seed in itertools.count(1000) if seed not in seeds), count))


@dataclass(frozen=True)
class Tuned:
    """A learning rate; the rate where the fitted parabola is least, with its standard error in octaves; and the bits
    per byte that a rate off from there by a factor of sqrt(2) costs. All but the first are None where nothing could be
    fitted; it is then the best that was tried."""

    lr: float
    optimum: float | None = None
    octaves_error: float | None = None
    cost_of_sqrt2: float | None = None

    @property
    def is_known(self) -> bool:
        return self.octaves_error is not None and self.octaves_error <= KNOWN_TO

    def shifted(self, full: "Tuned", short: "Tuned") -> "Tuned":
        """This choice, made on fewer tokens, times the ratio of another variant's best rates on all and on as few. The
        optimum stays that of the runs on fewer tokens, its error is that of the product."""
        errors = [tuned.octaves_error for tuned in (self, full, short)]
        error = None if None in errors else math.hypot(*errors)
        ratio = (full.optimum or full.lr) / (short.optimum or short.lr)
        return replace(self, lr=_rounded(self.lr * ratio), octaves_error=error)


def tried(given: Sequence[float], losses_of: Callable[[float], Mapping[int, float] | None]) -> Losses:
    """The losses of each rate that was tried with all seeds, given ones first. `losses_of` is None for the others."""
    losses = {rate: found for rate in given if (found := losses_of(rate)) is not None}
    while (rate := next_rate(given, losses)) is not None and (found := losses_of(rate)) is not None:
        losses[rate] = found
    return losses


def next_rate(given: Sequence[float], losses: Losses) -> float | None:
    """The rate to try next, when those in `losses` were tried; None when the search is over."""
    for rate in given:
        if rate not in losses:
            return rate
    best = best_rate(losses)
    if best is None or len(losses) >= len(given) + WIDENED_AT_MOST:
        return None
    rates = sorted(losses)
    if len(rates) == 1:
        return 2 * best
    edges = {rates[0]: rates[1], rates[-1]: rates[-2]}
    if best in edges:
        return _step_beyond(best, edges[best])
    if len(rates) < LEAST_RATES:
        edge = min(edges, key=lambda rate: mean_loss(losses[rate]))
        return _step_beyond(edge, edges[edge])
    return None


def _step_beyond(edge: float, inner: float) -> float:
    """One geometric step further."""
    return float(f"{edge * edge / inner:.4g}")


def mean_loss(of_seeds: Mapping[int, float]) -> float:
    return sum(of_seeds.values()) / len(of_seeds)


def best_rate(losses: Losses) -> float | None:
    """The rate of the lowest mean loss; None if no rate gave a finite one with every seed."""
    finite = {rate: loss for rate, found in losses.items() if math.isfinite(loss := mean_loss(found))}
    return min(finite, key=finite.get, default=None)


def at_edge(losses: Losses) -> bool:
    """True if the best rate is the lowest or the highest that was tried, so that a better one may lie beyond."""
    return best_rate(losses) in (min(losses), max(losses))


def choose(losses: Losses) -> Tuned | None:
    """The lowest rate at which loss = a(seed) + b x + c x^2, x = log2(rate), is within one standard error of its
    minimum, by least squares over the rates near the best; not lower than these. None if every rate diverged. A minimum
    outside of these rates, or a maximum, is not taken, nor is a standard error without a degree of freedom."""
    best = best_rate(losses)
    if best is None:
        return None
    finite = [rate for rate, found in losses.items() if math.isfinite(mean_loss(found))]
    near = sorted(rate for rate in finite if best / NEAR <= rate <= best * NEAR)
    octaves = [math.log2(rate / best) for rate in near]
    fit = _parabola(octaves, [[losses[rate][seed] for rate in near] for seed in losses[best]])
    if fit is None or not octaves[0] <= fit[0] <= octaves[-1]:
        return Tuned(best)
    vertex, error, least_error, curvature = fit
    below = max(vertex - math.sqrt((least_error or 0) / curvature), octaves[0])
    return Tuned(*(_rounded(best * 2**x) for x in (below, vertex)), error, curvature / 4)


def _parabola(
    xs: Sequence[float], rows: Sequence[Sequence[float]]
) -> tuple[float, float | None, float | None, float] | None:
    """(vertex, its standard error, that of the loss there, c) of the parabola with one constant a row; None without a
    minimum. The first error is by the delta method, the second leaves out what all rates of a seed have in common; both
    are None without a degree of freedom."""
    n, S = len(xs), len(rows)
    if n < 3:
        return None
    ones = [1.0] * n
    basis: list[list[float]] = []  # x and x^2 without what the columns before them explain (Gram-Schmidt)
    for column in (xs, [x * x for x in xs]):
        for other in (ones, *basis):
            share = _dot(column, other) / _dot(other, other)
            column = [a - share * b for a, b in zip(column, other, strict=True)]
        basis.append(column)
    mean = [sum(ys) / S for ys in zip(*rows, strict=True)]
    norms = [_dot(column, column) for column in basis]
    u, c = (_dot(mean, column) / norm for column, norm in zip(basis, norms, strict=True))
    if c <= 0:
        return None
    slope = _dot([x * x for x in xs], basis[0]) / norms[0]  # of x^2 on x: b = u - slope c
    vertex = (slope - u / c) / 2
    degrees = S * n - S - 2
    if degrees < 1:
        return vertex, None, None, c
    fitted = [u * a + c * b for a, b in zip(*basis, strict=True)]
    residues = [y - sum(row) / n - f for row in rows for y, f in zip(row, fitted, strict=True)]
    variance = _dot(residues, residues) / degrees / S  # of a mean over seeds
    error = math.sqrt(variance / norms[0] + variance / norms[1] * (u / c) ** 2) / (2 * c)
    linear = vertex - sum(xs) / n  # the basis at the vertex
    square = vertex**2 - sum(x * x for x in xs) / n - slope * linear
    least_error = math.sqrt(variance * (1 / n + linear**2 / norms[0] + square**2 / norms[1]))
    return vertex, error, least_error, c


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


def facts(tuned: Tuned, losses: Losses) -> dict[str, Any]:
    """The `tuning` of a record: the seeds, the mean loss at each rate (None: diverged) and what was made of them."""
    rates = [(rate, mean_loss(found)) for rate, found in sorted(losses.items())]
    return {
        "seeds": list(next(iter(losses.values()))),
        "at_edge": at_edge(losses),
        "rates": [{"lr": rate, "val_bpb": loss if math.isfinite(loss) else None} for rate, loss in rates],
        **vars(tuned),
    }
