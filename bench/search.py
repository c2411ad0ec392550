"""Coordinate search over launch numbers.

It knows neither clocks nor GPUs: what a call takes is asked of `measure(tuning, case)`, which gives seconds, or raises
whatever says why these numbers are not for that case.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

# A candidate is kept where the geometric mean of its times, over the cases whose plan it changes, is shorter by at
# least this much, and by so many of its standard errors: of seven rounds' means, under 0.7% of those that change
# nothing would be.
LEAST_GAIN = 0.01
STANDARD_ERRORS = 3.5
ROUNDS = 7


class Unusable(Exception):
    """A candidate that is wrong, spills registers, or cannot run."""


@dataclass(frozen=True)
class Trial:
    """What became of one candidate beside the numbers that were the best before it."""

    name: str  # of the field that is another
    value: object
    cases: int  # whose plan it changes
    gain: float = 0.0  # the share of the time that it saves, by the geometric mean
    noise: float = 0.0  # which the gain must exceed
    skipped: str = ""  # why, where it is unusable

    @property
    def kept(self) -> bool:
        return not self.skipped and self.gain > max(LEAST_GAIN, self.noise)


def search(start, choices: dict, cases: list, plan: Callable, measure: Callable, tell: Callable):
    """The best numbers found and all trials.

    Args:
        start: a dataclass; its fields named in `choices` may be any of those.
        plan: `plan(tuning, case)` is equal where nothing would run otherwise; a trial measures only the others.
        tell: called with each trial.
    """
    best, seen, trials = start, {start}, []
    options = [(name, value) for name, values in choices.items() for value in values]
    improved = True
    while improved:  # one field may suit another better than before
        improved = False
        for name, value in options:
            candidate = replace(best, **{name: value})
            if candidate in seen:
                continue
            seen.add(candidate)
            changed = [case for case in cases if plan(candidate, case) != plan(best, case)]
            if not changed:
                continue
            trial = attempt(best, candidate, changed, measure, name, value)
            tell(trial)
            trials.append(trial)
            if trial.kept:
                best, improved = candidate, True
    return best, trials


def attempt(best, candidate, cases: list, measure: Callable, name: str, value) -> Trial:
    def guarded(tuning, case):
        try:
            return measure(tuning, case)
        except Exception as error:
            if tuning is not candidate:
                raise
            raise Unusable(str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}") from error

    try:
        rounds = [in_turns((best, candidate), case, guarded) for case in cases]
    except Unusable as reason:
        return Trial(name, value, len(cases), skipped=str(reason).strip().partition("\n")[0])
    logs = [[math.log(seconds[candidate] / seconds[best]) for seconds in of_case] for of_case in rounds]
    means = [statistics.fmean(round) for round in zip(*logs, strict=True)]
    noise = STANDARD_ERRORS * statistics.stdev(means) / math.sqrt(ROUNDS)
    return Trial(name, value, len(cases), 1 - math.exp(statistics.fmean(means)), noise)


def in_turns(tunings, case, measure: Callable) -> list[dict]:
    """Seconds of each in every round; they take turns, A B B A, so that whatever else the machine does falls on all."""
    order, rounds = list(tunings), []
    for _ in range(ROUNDS):
        rounds.append({tuning: measure(tuning, case) for tuning in order})
        order.reverse()
    return rounds


def medians(tunings, case, measure: Callable) -> dict:
    rounds = in_turns(tunings, case, measure)
    return {tuning: statistics.median(seconds[tuning] for seconds in rounds) for tuning in tunings}
