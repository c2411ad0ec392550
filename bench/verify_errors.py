"""How far results are from the truth, and what else an examination of a case of `verify` finds."""

import torch

from .guard import Guard
from .verify_cases import Case

# An error may be this many times PyTorch's own, in the same row. Both do the same in another order, so that in a given
# row either may be the lucky one. PyTorch's counts as what rounding can't be spared at least: of the largest value of
# the row (or of the rows' mean, as a row's small gradient is a difference of larger numbers) one `eps` in half
# precision, where the result is rounded once, and four where each step is. Logits that are scaled or capped first are
# rounded before: one eps of a logit of 16 is 16 of its exponential. Float64 is compared with float64.
LIMIT = 2.0
ROUNDINGS = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 4, torch.float64: 64}
ROUNDINGS_OF_COMPUTED = {**ROUNDINGS, torch.float32: 32, torch.float64: 256}


class LeftOut(Exception):
    """Why a case can't be examined here."""


class Found:
    """What an examination finds."""

    def __init__(self, case: Case):
        self.roundings = ROUNDINGS_OF_COMPUTED if case.computes_logits else ROUNDINGS
        self.ratios, self.plan = {}, ""
        self.problems: list[str] = []  # what is wrong
        self.reasons: list[str] = []  # why it could not be examined

    def problem(self, what: str):
        if what not in self.problems:
            self.problems.append(what)

    def close(self, ours: dict, theirs: dict, true: dict):
        """Results by name, beside PyTorch's own and the truth."""
        for name, exact in true.items():
            ratio = error_ratio(ours[name].detach(), theirs[name], exact, self.roundings)
            self.ratios[name] = max(ratio, self.ratios.get(name, 0.0))
            if not ratio <= LIMIT:
                self.problem(f"{name}: its error is {ratio:.3g} times PyTorch's own, more than {LIMIT:g}")

    def same(self, what: str, first: dict, second: dict):
        """Results of which not one bit may differ."""
        for name, values in first.items():
            if not same_bits(values, second[name]):
                self.problem(f"{name}: other bits {what}")

    def unharmed(self, guard: Guard):
        self.within_zones(guard)
        if changed := guard.changed():
            self.problem(f"{changed} arguments were written to")

    def within_zones(self, guard: Guard):
        if harmed := guard.harmed():
            self.problem(f"written outside of {harmed} tensors")


def same_bits(a, b) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def error_ratio(ours, theirs, true, roundings=ROUNDINGS) -> float:
    """The largest error of a row over PyTorch's own there; infinite for another dtype or shape, or NaN elsewhere."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return float("inf")
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    if not ours.numel():
        return 0.0
    if not torch.equal(ours.isfinite(), true.isfinite()):
        return float("inf")
    info, true = torch.finfo(ours.dtype), finite(true)
    error, their_error = (by_row((finite(each.double()) - true).abs()) for each in (ours, theirs))
    size = by_row(true.abs())
    floor = roundings[ours.dtype] * info.eps * (size.clamp(min=size.mean()) + info.smallest_normal)
    return (error / torch.maximum(their_error, floor)).max().item()


def finite(values):
    return values.nan_to_num(0.0, 0.0, 0.0)


def by_row(values):
    """The largest of each row, whose classes are the second dimension. What is one number for each row is one row."""
    return values.amax(1) if values.dim() > 1 else values.amax()
