"""Who takes a call, and why: the one place where that is decided.

    logits on                     implementation
    CUDA or ROCm GPU              Triton kernels (`xent_ext.kernels`)
    CPU                           `xent_ext.cpu`; PyTorch's own where that is faster, see `xent_ext.cpu_own`, and in
                                  compiled graphs, but for classes that other ranks have the rest of
    anything else, and whatever   PyTorch's own `torch.nn.functional.cross_entropy`; with options for training the
    the implementations don't do  plain formula, `xent_ext.reference`

`xent_ext.backends` says what overrides this. Before it, `xent_ext.sharded` makes of a `DTensor` the shard that is here.

A call that is like one that was seen before, in all but the values in its tensors, finds by one key all that was found
for that: that its arguments are right, and a `Loss`, with its launches.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch._C import (
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn._reduction import get_enum
from torch.overrides import has_torch_function_variadic

from . import agreement, autograd, backends, checks, cpu_own, ops, parallel, reference
from .backends import HAS_TRITON, implementation
from .call import Arguments, is_autocast, prepare, problem_of, statistics, tensors_of
from .layout import batch_shape, visible

# Kept here, so that what stands under this name later does not matter.
torch_cross_entropy = F.cross_entropy
_REDUCTIONS = {name: get_enum(name) for name in ("none", "mean", "sum")}

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PLAIN = (torch.Tensor, torch.nn.Parameter)
# What wrong arguments raise. A checkpoint, which stops a forward pass by an exception of its own, means none of these.
WRONG = (IndexError, RuntimeError, TypeError, ValueError)


def cross_entropy(owner, arguments, options=None):
    """The loss of `Arguments` and `Options`, for the module `owner` or for none; with `return_stats` a pair."""
    loss = small(*arguments) if options is None else None
    return general(owner, arguments, options) if loss is None else loss


def general(owner, arguments, options):
    """`cross_entropy` for calls that `small` does not take."""
    if is_compiling():
        return compiled(owner, arguments, options)
    key = key_of(arguments, options)
    found = _kept.get(key)
    if found is None:
        if is_distributed(arguments.input) and backends.BACKEND != "torch":
            return of_shards(owner, arguments, options)
        found = look_at(key, arguments, options)
        arguments, options = plain(arguments), plain(options)
    if found is PYTORCH:
        return pytorch(arguments)
    if options is None:
        return found(owner, arguments)[0]  # its first fields are those of `Tensors`
    return with_options(owner, found, arguments, options)


def compiled(owner, arguments, options):
    """`cross_entropy` in a graph that is being compiled."""
    if not backends.RECENT:
        return pytorch(arguments) if options is None else outside_graphs(owner, arguments, options)
    if is_distributed(arguments.input) and backends.BACKEND != "torch":
        return of_shards(owner, arguments, options)
    return in_graph(arguments, options)


# Breaks a graph that can't have it, which goes on after it.
outside_graphs = cross_entropy if backends.RECENT else torch.compiler.disable(cross_entropy)


def of_shards(owner, arguments, options):
    from . import sharded  # which imports torch.distributed.tensor

    shards = sharded.Shards(arguments, options)
    return shards.whole(cross_entropy(owner, shards.arguments, shards.options))


def pytorch(arguments):
    """F.cross_entropy as it was when this was imported; on a CPU with sums of half precision in float32."""
    if backends.BACKEND == "torch":
        return torch_cross_entropy(*arguments)
    return cpu_own.pytorch(torch_cross_entropy, *arguments)


def in_graph(arguments, options):
    """`cross_entropy` as a graph of plain tensors has it."""
    if options is None and any(has_unknown_size(tensor) for tensor in arguments[:2]):
        return pytorch(arguments)
    problem, tensors = prepare(arguments, options)
    name, _ = route(tensors, problem, options is not None)
    if name == "torch":
        return pytorch(arguments)
    loss, stats = (reference.compute if name == "plain" else ops.loss)(problem, tensors)
    return with_statistics(problem, tensors, options, loss, stats)


def small(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing):
    """PyTorch's own, with clearer errors, where it is faster on a CPU; None for all other calls.

    It is asked before the arguments are looked at, and does all that F.cross_entropy does without another call: few
    logits take few microseconds.
    """
    if (
        not is_small(input, target, reduction, label_smoothing)
        or is_compiling()
        or has_torch_function_variadic(input, target, weight)
    ):
        return None
    try:
        if size_average is reduce is None and reduction in _REDUCTIONS:
            code = _REDUCTIONS[reduction]
            if input.dtype not in cpu_own.HALF:
                return cpu_own.native(input, target, weight, code, ignore_index, label_smoothing)
            if input.numel() < cpu_own.FEW_LOGITS or not unsupported_here():  # where no value can be read
                return cpu_own.cross_entropy(input, target, weight, code, ignore_index, label_smoothing)
        return pytorch((input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing))
    except WRONG:
        arguments = Arguments(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        check_values(*prepare(arguments, None))  # raises the same, said more clearly
        raise


def with_options(owner, found, arguments, options):
    problem = problem_of(arguments, options) if found is FORMULA else found.problem
    tensors = tensors_of(problem, arguments, options)
    loss, stats = formula(problem, tensors) if found is FORMULA else found(owner, tensors)
    return with_statistics(problem, tensors, options, loss, stats)


def formula(problem, tensors):
    """The plain formula, with clearer errors."""
    try:
        return reference.compute(problem, tensors)
    except WRONG:
        check_values(problem, tensors)  # says which class index is wrong
        raise


def with_statistics(problem, tensors, options, loss, stats):
    """The loss, with its statistics where they are asked for."""
    if options is None or not options.return_stats:
        return loss
    return loss, statistics(options.return_stats, problem, tensors.target, dict(zip(problem.stats, stats, strict=True)))


def check_values(problem, tensors):
    """Raise IndexError for a class index out of range."""
    with contextlib.suppress(RuntimeError):  # of tensors that can't be read: on the meta device, or under vmap
        checks.bad_class(problem, tensors)


# --- What is kept from call to call

PYTORCH, FORMULA = "PyTorch's own", "the plain formula"  # in place of a `Loss`
MOST_KEPT = 1024
_kept = {}  # a `Loss` or one of these two, by the key of the calls that it is for


def forget():
    """For those who change what plans are made of: no call finds what was found for an earlier one."""
    _kept.clear()


def look_at(key, arguments, options):
    """Check a call, and find who takes it."""
    if backends.CHECK and options is not None and options.process_group is not None:
        agreement.check(options.process_group, prepare, arguments, options)
    problem, tensors = prepare(arguments, options)
    tensors = plain(tensors)
    name, _ = route(tensors, problem, options is not None)
    if backends.CHECK and name != "torch":
        check_values(problem, tensors)
    if name in ("torch", "plain"):
        found = PYTORCH if name == "torch" else FORMULA
    else:
        found = autograd.Loss(parallel if problem.ranks else implementation(name), problem, tensors)
    if key is not None and not backends.is_capturing():
        if len(_kept) >= MOST_KEPT:
            _kept.clear()
        _kept[key] = found
    return found


def key_of(arguments, options):
    """All that `look_at` depends on, or None for calls where it would be too much."""
    input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing = arguments
    if (
        size_average is not None
        or reduce is not None
        or type(reduction) is not str  # True equals 1, and has its hash
        or type(ignore_index) is not int
        or type(label_smoothing) is not float
        or backends.CHECK
        or unsupported_here()
    ):
        return None
    try:
        return (
            reduction, ignore_index, label_smoothing, backends.BACKEND, torch.is_grad_enabled(),
            _is_any_autocast_enabled() and is_autocast(input),
            facts(input), facts(target), None if weight is None else facts(weight),
            None if options is None else key_of_options(options),
        )  # fmt: skip
    except Unkept:
        return None


class Unkept(Exception):
    """Nothing is kept for this call."""


def key_of_options(options):
    """What of `Options` the outcome depends on.

    What may change, such as a list of names, is read anew in each call, and so is what is overwritten.
    """
    if options.inplace or type(options.return_stats) not in (bool, tuple):
        raise Unkept
    key = tuple([facts(value) if isinstance(value, torch.Tensor) else (type(value), value) for value in options])
    try:
        hash(key)
    except TypeError:
        raise Unkept from None
    return key


def facts(t):
    """What of a tensor the outcome depends on."""
    if type(t) not in PLAIN:
        raise Unkept
    try:
        start = t.data_ptr()  # 0 for zeros without memory
        return t.shape, t.stride(), t.dtype, t.device, start % 16 if start else None, t.requires_grad, t.is_neg()
    except RuntimeError:  # it has no strides or no memory
        raise Unkept from None


def plain(given):
    """`Arguments`, `Tensors`, or `Options` if there are any, with `plain_tensor` in the place of each."""
    if given is None:
        return None
    return given._make([plain_tensor(value) if isinstance(value, torch.Tensor) else value for value in given])


def plain_tensor(tensor):
    """The tensor that one stands for that has left a torch.func transform, or whose subclass changes no operator."""
    tensor = torch._C._functorch.unwrap_if_dead(tensor)
    if type(tensor) in PLAIN or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return tensor
    return tensor.as_subclass(torch.Tensor)


# --- Who takes it


def is_small(input, target, reduction, label_smoothing):
    """Whether PyTorch's own is as fast for logits on a CPU; the arguments need not be valid."""
    if type(input) not in PLAIN or not input.is_cpu or backends.BACKEND != "auto":
        return False
    if is_compiling():
        return True  # the C++ loops that Inductor makes of PyTorch's formula are as fast or faster for all sizes
    return input.numel() < cpu_own.ALWAYS or cpu_own.takes(input, target, reduction, label_smoothing)


def has_unknown_size(tensor):
    """Whether a size in a graph depends on data, as that of `logits[mask]` does: nothing can be asked about it."""
    return isinstance(tensor, torch.Tensor) and torch.fx.experimental.symbolic_shapes.has_free_unbacked_symbols(tensor)


def is_distributed(tensor):
    """Whether this is a `DTensor`."""
    module = None if type(tensor) in PLAIN else getattr(torch.distributed, "tensor", None)  # imported if there are any
    return module is not None and isinstance(tensor, module.DTensor)


def route(tensors, problem, with_options):
    """(name of the implementation: "triton", "cpu", "torch" or, with options for training, "plain"; why)."""
    name, reason = supported_route(tensors, problem, with_options)
    if problem.ranks and rows_of(problem, tensors):
        refuse_without_fused(name, reason)
    return ("plain" if with_options and name == "torch" else name), reason


def refuse_without_fused(name, reason):
    """Raise for classes of several ranks that no implementation takes."""
    if name == "torch":
        raise NotImplementedError(f"classes of several ranks have no loss where nothing fused takes the call: {reason}")


def rows_of(problem, tensors):
    """How many rows a call has."""
    return math.prod(batch_shape(visible(problem, tensors.input).shape))


def supported_route(tensors, problem, with_options):
    """`route`, with "torch" for all that no implementation takes."""
    name, reason = implementation_of(tensors, rows_of(problem, tensors) > 0 if problem.ranks else has_elements(tensors))
    if name == "cpu" and not problem.ranks and (is_compiling() or not with_options):
        if is_small(tensors.input, tensors.target, problem.reduction, problem.label_smoothing):
            what = "a compiled graph" if is_compiling() else "logits of this kind and size"
            return "torch", f"PyTorch's own is as fast for {what} on a CPU"
    return name, reason


def has_elements(tensors):
    """Whether there is a logit, and a target."""
    return tensors.input.numel() > 0 and tensors.target.numel() > 0


def implementation_of(tensors, has_work):
    """(name of the implementation for these tensors, or "torch" where there is none; why), whatever their size.

    The first three are input, target and weight. `has_work` says whether there is anything to compute.
    """
    input = tensors[0]
    if backends.BACKEND == "torch":
        return "torch", "XENT_EXT_BACKEND=torch"
    if reason := unsupported(tensors, has_work):
        return "torch", reason
    if input.is_cuda or (input.is_cpu and backends.BACKEND == "triton"):
        if not HAS_TRITON:
            return "torch", "Triton is not installed"
        return "triton", "the logits are on a GPU" if input.is_cuda else "XENT_EXT_BACKEND=triton"
    if input.device.type != "cpu":
        return "torch", f"no implementation for device type {input.device.type!r}"
    return "cpu", "the logits are on a CPU"


def unsupported(tensors, has_work):
    """Why neither the kernels nor the CPU implementation can take the call, or None."""
    traced = is_compiling()  # an operator gets neither negative views nor zeros without memory
    _, target, weight = tensors[:3]
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            return f"tensor subclass {type(tensor).__name__}"
        if tensor.layout is not torch.strided:
            return f"layout {tensor.layout}"
        if not traced and tensor.is_neg():
            return "negative view"
        if not traced and tensor._is_zerotensor():
            return "zeros without memory"
        if tensor.dtype not in DTYPES and (tensor is not target or tensor.is_floating_point()):
            return f"dtype {tensor.dtype}"
    if not has_work:
        return "nothing to compute"
    if torch.is_grad_enabled():
        for name, tensor in (("target", target), ("weight", weight)):
            if tensor is not None and tensor.requires_grad:
                return f"a gradient with respect to the {name} is wanted"
    if traced and torch.compiler.is_exporting():
        return "torch.export makes a program that may run where this package is not"
    return unsupported_here(traced)


def unsupported_here(traced=False):
    """Why they can take no call now, whatever its tensors, or None."""
    if _are_functorch_transforms_active():
        return "a torch.func transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if traced:  # no dispatch mode sees into an operator
        return None
    if _len_torch_dispatch_stack():
        return "a dispatch mode is active"
    if _is_tracing():
        return "torch.jit is tracing"
    return None
