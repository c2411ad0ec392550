"""Whether the plan chooses well: every schedule and cluster size that can take some logits, timed.

Each function runs in a process of its own, so that one that fails takes no other with it.
"""

import contextlib
import io
import json
from itertools import product

import torch

from xent_ext.plan import CHOICES, SCHEDULES

from . import machine, search, tune
from .case import absence
from .peer import Case
from .run import rotating_sets

# What decides about clusters: programs that share a row.
SEARCHED = {name: CHOICES[name] for name in ("long_row_threads", "largest_cluster")}


def case_of(size, dtype: str, device: str) -> Case:
    return Case("verify", "", tuple(size), dtype, "full", device)


def compare(size, dtype: str, device: str, seconds: float) -> dict:
    """All plans for logits of this size, with their times, or why there are none."""
    from xent_ext.kernels.device import device_properties

    from . import candidate  # these need Triton

    case, start, on = case_of(size, dtype, device), device_properties(0).tuning, torch.device(device)
    cache, free = machine.last_cache_bytes(on), machine.free_memory(on)
    measure = candidate.Measure(seconds, lambda case: rotating_sets(case, cache))
    if reason := tune.unmeasurable(case, start, measure, cache, free):
        return {"left_out": reason}
    return plans(case, candidate.plan(start, case), measure)


def plans(case: Case, chosen: dict, measure) -> dict:
    """All plans, the fastest first; those that are wrong, spill registers or cannot run with the reason."""
    tunings, refused = possible(case), []
    for key, tuning in list(tunings.items()):
        try:
            measure(tuning, case)
        except Exception as error:
            refused.append(json.loads(key) | {"reason": refusal(error)})
            del tunings[key]
    seconds = search.medians(tunings.values(), case, measure)
    timed = [json.loads(key) | {"median_ms": 1e3 * seconds[tuning]} for key, tuning in tunings.items()]
    timed.sort(key=lambda plan: plan["median_ms"])
    place = next((place for place, plan in enumerate(timed) if plan | chosen == plan), None)
    slower = None if place is None else timed[place]["median_ms"] / timed[0]["median_ms"] - 1
    return {"plans": timed, "refused": refused, "chosen": place, "slower": slower}


def refusal(error: Exception) -> str:
    return str(error) if isinstance(error, search.Unusable) else absence(error)["reason"]


def possible(case: Case) -> dict:
    """Launch numbers with a schedule for each different plan, by that plan as JSON."""
    from . import candidate

    found = {}
    for schedule, *numbers in product(SCHEDULES, *SEARCHED.values()):
        tuning = candidate.forced(schedule, **dict(zip(SEARCHED, numbers, strict=True)))
        with contextlib.suppress(ValueError):  # not for these logits
            found.setdefault(json.dumps(candidate.plan(tuning, case)), tuning)
    return found


def tuned(sizes, dtype: str, device: str, seconds: float) -> dict:
    """What `python -m bench tune` writes, of a search of these numbers alone."""
    cases = [case_of(size, dtype, device) for size in sizes]
    with contextlib.redirect_stdout(io.StringIO()):
        return tune.tune(cases, torch.device(device), seconds, SEARCHED)


def changes(tuned: dict) -> dict:
    """The numbers that such a file has otherwise than they were."""
    return {trial["name"]: trial["value"] for trial in tuned["trials"] if trial["kept"]}
