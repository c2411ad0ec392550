"""The fused loss for code that can't be edited: `install`, `uninstall`, `installed`."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.jit import is_scripting
from torch.overrides import handle_torch_function, has_torch_function_variadic

from . import dispatch
from .call import Arguments
from .dispatch import PLAIN, is_distributed, torch_cross_entropy


def install() -> None:
    """Put the fused loss under `torch.nn.functional.cross_entropy`.

    The name `cross_entropy` of the module `torch.nn.functional` then stands for a function with the signature, results
    and errors of PyTorch's, which does what `xent_ext.cross_entropy` does: it runs the kernels or, for whatever they
    don't do, PyTorch's own. `torch.nn.CrossEntropyLoss` and every library that calls `F.cross_entropy(...)` look the
    name up for each call, and need no change. This holds for all threads of the process. To install again changes
    nothing.

    Not reached are

    - code that has made PyTorch's function a name of its own (`from torch.nn.functional import cross_entropy`),
    - losses that are written with other functions, such as `F.nll_loss` of `F.log_softmax`, or the label smoother of
      Transformers' Trainer,
    - what `torch.jit.script` compiled or compiles: it gets PyTorch's own.

    A `__torch_function__` that a tensor subclass has of its own is given PyTorch's function, which its tables know. A
    `DTensor`, too, goes to PyTorch's own, however it is sharded.
    """
    _update(forever=True)


def uninstall() -> None:
    """Undo `install`: `torch.nn.functional.cross_entropy` is again what it was. Within `installed()`, when that ends.

    Where something else has taken its place since, that stays, with a RuntimeWarning: it may call what it replaced, and
    then still gets the fused loss. Should it later put that back, uninstall again for PyTorch's own.
    """
    _update(forever=False)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """`install` for the `with` block, in all threads.

    Blocks may nest, and overlap in several threads. The end of the last one uninstalls, unless `install` was called.
    """
    _update(blocks=+1)
    try:
        yield
    finally:
        _update(blocks=-1)


def cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """`torch.nn.functional.cross_entropy`, as `xent_ext.install` put it here: `xent_ext.uninstall` takes it away."""
    if is_scripting():
        return torch_cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if is_distributed(input):  # also within `loss_parallel`, and sharded in any way
        return torch_cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if has_torch_function_variadic(input, target, weight) and not torch.compiler.is_compiling():
        # Subclasses may know PyTorch's function only; a mode, a default device for one, calls what it is given.
        known = any(map(has_own_functions, (input, target, weight)))
        return handle_torch_function(
            torch_cross_entropy if known else cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    return dispatch.cross_entropy(
        None, Arguments(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
    )


def has_own_functions(tensor):
    """Whether this is of a subclass with a `__torch_function__` of its own."""
    if tensor is None or type(tensor) in PLAIN:
        return False
    inherited = torch.Tensor.__torch_function__.__func__
    return getattr(type(tensor).__torch_function__, "__func__", None) is not inherited


_lock = threading.Lock()
_forever = False  # `install` was called
_blocks = 0  # of `installed` that have not ended
_replaced = None  # what stood under the name before, while this does


def _update(forever=None, blocks=0):
    """Note what is wanted, and make it so."""
    global _forever, _blocks, _replaced
    with _lock:
        _forever = _forever if forever is None else forever
        _blocks += blocks
        wanted, present = _forever or _blocks > 0, F.cross_entropy is cross_entropy
        if wanted and not present and (_replaced is None or F.cross_entropy is torch_cross_entropy):
            _replaced, F.cross_entropy = F.cross_entropy, cross_entropy
        elif not wanted:
            if present:
                F.cross_entropy = _replaced or torch_cross_entropy
            elif _replaced is not None and F.cross_entropy is not _replaced:
                warnings.warn(
                    f"torch.nn.functional.cross_entropy was replaced by {F.cross_entropy!r} while xent_ext was "
                    "installed; it is left in place",
                    RuntimeWarning,
                    stacklevel=3,
                )
            _replaced = None
