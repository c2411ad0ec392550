"""Measurements of xent_ext beside other implementations of the loss: `python -m bench --help` lists them.

    __main__       the command line: a command is a module of this package
    verify         one command that proves or disproves the package on a machine: right, fast, well planned?
    verify_cases, verify_calls, verify_checks, verify_errors, guard
                   its cases; what each calls; how it is examined, by which errors, with guard zones around tensors
    verify_worker, verify_right
                   the processes that they are examined in, and what these run
    verify_parallel
                   a case with classes on two devices
    verify_plans   its measurements of plans
    run, memory, traffic, overhead, linear, parallel, train, tune, cpu_sizes, kernels, compile, model,
    plot, compare  the commands; *_report: what their results look like
    peers/, peer   who is compared, and what an adapter says of an implementation
    shapes, tasks  what is measured: logits and layers, and models to train
    case, workers  the calls themselves, and the processes they run in
    linear_peers, linear_case
                   the same of the last layer with its loss
    parallel_peers, parallel_case
                   and of classes that several processes share
    machine        the machine, its clock and its memory
    report         tables, JSON, and the page of a folder's results
    search, candidate
                   the search of `tune`, and the launch numbers that it tries put to work
    offline, assembly: compiling for a GPU that need not be there
    figures        the pictures of the READMEs

They are run in a checkout, as the wheel holds the loss alone. Most commands need the `bench` extra: `pip install -e
".[bench]"`.
"""

import os

# Without this PyTorch's profiler, which counts the memory on a CPU, writes its own log between our lines. It
# reads the variable when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
