"""The cases of `python -m bench verify`, examined: python -m bench.verify_right {cuda,interpreter,cpu} NAME...

Runs in a process of its own, which `verify` starts with the environment that the place asks for, and prints a line of
JSON for each case. So a case that stops the process, or the GPU's context, takes no other with it.
"""

import dataclasses
import json
import sys
import time
import traceback
import warnings

import torch

from .verify_cases import CASES, GPU, INTERPRETER, SANITIZED, Case
from .verify_checks import (
    call_alone,
    compiled,
    cuda_graph,
    layer,
    loss,
    out_of_range,
    second_backward,
    second_device,
    two_streams,
)
from .verify_errors import Found, LeftOut
from .verify_parallel import class_parallel

CHECKS = {
    check.__name__: check
    for check in (
        loss, second_device, second_backward, out_of_range, layer, compiled, cuda_graph, two_streams, class_parallel
    )
}  # fmt: skip

ON_GPU = (GPU, SANITIZED)
FEW_ROWS, FEW_IMAGES = 6, 1


def examine(name: str, where: str) -> dict:
    """What is found of one case: "right", "wrong" or "left out", and why."""
    case, start = CASES[name], time.perf_counter()
    found = Found(case)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        status = examined(case, where, found)
    return {
        "name": name,
        "where": where,
        "status": status,
        "plan": found.plan,
        "ratios": found.ratios,
        "problems": found.problems or found.reasons,
        "warnings": sorted({str(each.message) for each in warned if str(each.message).startswith("xent_ext ")}),
        "seconds": time.perf_counter() - start,
    }


def examined(case: Case, where: str, found: Found) -> str:
    """The status; whatever else there is to say is found."""
    check = call_alone if where == SANITIZED else CHECKS[case.check]
    status = "right"
    try:
        check(fitted(case, where), torch.device("cuda" if where in ON_GPU else "cpu"), found)
    except (LeftOut, torch.OutOfMemoryError) as reason:
        status = "left out"
        found.reasons.append(str(reason))
    except Exception:
        found.problem(traceback.format_exc())
    return "wrong" if found.problems else status


def fitted(case: Case, where: str) -> Case:
    """The case as it can be run there."""
    if where in ON_GPU:
        refuse_what_does_not_fit(case)
    return interpretable(case) if where == INTERPRETER else case


def refuse_what_does_not_fit(case: Case):
    count, (free, _) = torch.cuda.device_count(), torch.cuda.mem_get_info()
    if count < case.devices:
        raise LeftOut(f"needs {case.devices} devices, there is {count}")
    # Logits in float64, with what PyTorch makes of them.
    needed = 8 * 8 * case.logits
    if needed > free:
        raise LeftOut(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free")


def interpretable(case: Case) -> Case:
    """The case with few rows: in Triton's interpreter a program takes some milliseconds."""
    first, *rest = case.shape
    if case.check == "layer":
        chunks = {"chunk_rows": FEW_ROWS - 1} if "chunk_rows" in case.options else {}
        return dataclasses.replace(case, shape=(FEW_ROWS, *rest), options=case.options | chunks)
    return dataclasses.replace(case, shape=(min(first, FEW_IMAGES if len(rest) > 1 else FEW_ROWS), *rest))


def is_lost() -> bool:
    """Whether the GPU's context can't be used any more."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return False
    except RuntimeError:
        return True


def main(arguments: list[str]):
    where, *names = arguments
    for name in names:
        print(json.dumps(examine(name, where)), flush=True)
        if where in ON_GPU and is_lost():
            break  # another process goes on with the next


if __name__ == "__main__":
    main(sys.argv[1:])
