"""Language models whose logits are made only where something other than their loss reads them: `patch_lm_head`.

The last layer of a patched model returns `DeferredLogits`, a tensor without memory. What loss code does to logits
before their loss, such as slices and views, casts, scales and caps, is noted; `cross_entropy`, PyTorch's or this
package's, then computes `linear_cross_entropy` of the layer's input. Any other function is given real logits, which are
made once, as the layer and the noted functions make them; what comes after that is done to those.
"""

import contextlib
import math
import warnings
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from . import checks, dispatch, functional, integrate, linear_call, reference
from .call import Arguments, Options, is_autocast
from .dispatch import DTYPES, PLAIN


def functions(*names):
    """The methods of these names, and the functions of `torch`."""
    found = *(getattr(Tensor, name) for name in names), *(vars(torch).get(name) for name in names)
    return {each for each in found if callable(each)}


def properties(*names):
    return {getattr(Tensor, name).__get__ for name in names}


# What needs no logits: of the tensor that stands for them,
KNOWN = functions(
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "is_contiguous", "element_size",
    "is_floating_point", "is_complex", "is_signed", "is_inference", "get_device", "__len__", "__hash__",
) | properties(
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_quantized", "is_mps", "is_xpu", "is_nested", "itemsize", "nbytes",
)  # fmt: skip
# or of `Logits`.
MULTIPLY = functions("mul", "multiply", "__mul__", "__rmul__")
DIVIDE = functions("div", "divide", "true_divide", "__truediv__")
TANH = functions("tanh")
INDEX = Tensor.__getitem__
MOVE = Tensor.to
OF_LAYOUT = functions(
    "view", "reshape", "flatten", "unflatten", "transpose", "swapaxes", "permute", "movedim", "squeeze", "unsqueeze",
    "narrow", "select", "contiguous", "clone", "float", "double",
) | {INDEX, MOVE}  # fmt: skip
LOSSES = {dispatch.torch_cross_entropy, integrate.cross_entropy, functional.cross_entropy}


# --- What deferred logits are known by


class Form(NamedTuple):
    """Values scale * x, or cap * tanh(scale * x), of the layer's outputs x."""

    scale: float = 1.0
    cap: float | None = None

    def times(self, factor):
        return Form(self.scale * factor) if self.cap is None else Form(self.scale, self.cap * factor)

    def after(self, func, args, kwargs):
        """The form of a function's result, whose first argument has this one; None if that has none."""
        if func in OF_LAYOUT:
            return self
        if kwargs or func not in MULTIPLY | DIVIDE | TANH:
            return None
        if func in TANH:
            return Form(self.scale, 1.0) if self.cap is None else None
        (factor,) = args
        if not isinstance(factor, int | float) or (func in DIVIDE and factor == 0):
            return None
        return self.times(factor if func in MULTIPLY else 1 / factor)

    def options(self, options):
        """`Options` for the layer's outputs that are `options` for these values; None if none are."""
        if self.cap is None:
            scale, cap = self.scale * options.logit_scale, options.softcap
        elif options.softcap is not None or isinstance(options.logit_scale, Tensor):
            return None
        else:
            cap = self.cap * options.logit_scale
            scale = self.scale * cap
        is_right = isinstance(scale, Tensor) or math.isfinite(scale)
        return options._replace(logit_scale=scale, softcap=cap) if is_right and (cap is None or cap > 0) else None


@dataclass(frozen=True, eq=False)
class Head:
    """A call of the last layer."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    autocast: tuple[bool, torch.dtype]
    state: tuple[Any, ...]  # of the tensors, when it was called

    @classmethod
    def called(cls, *given):
        device = given[0].device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        return cls(*given, autocast, cls.state_of(given))

    @staticmethod
    def state_of(tensors):
        return tuple((tensor._version, tensor.data_ptr()) for tensor in tensors if tensor is not None)

    @property
    def tensors(self):
        return self.input, self.weight, self.bias

    @contextlib.contextmanager
    def as_called(self):
        """With autocast as it was, unless what the outputs are made of is no more: then RuntimeError."""
        if self.state_of(self.tensors) != self.state:
            raise RuntimeError(
                "these logits are made when they are first read, and the last layer's input or weight has changed, or "
                "was freed, since: read them before the optimizer's step, or remove the patch of patch_lm_head"
            )
        enabled, dtype = self.autocast
        with torch.autocast(self.input.device.type, dtype if enabled else None, enabled):
            yield

    def outputs(self):
        with self.as_called():
            return F.linear(*self.tensors)


class Step(NamedTuple):
    """A function that was called with deferred logits."""

    func: Any
    of: "Logits"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    copies: bool  # its result has memory of its own


@dataclass(eq=False)
class Logits:
    """What deferred logits stand for: some rows of a layer's outputs, in some form."""

    head: Head
    rows: Tensor  # inputs of the layer, (*, features)
    # On the meta device: the shape and dtype of the logits, and as offset and strides where they are in the outputs
    # (rows, classes) for `rows`.
    like: Tensor
    form: Form
    step: Step | None = None  # that made them; None for the layer's own outputs
    values: Tensor | None = None  # the real ones
    version: int | None = None  # of those, when what they are a view of was made

    # --- The values

    def are_made(self):
        return self.values is not None or (self.step is not None and self.step.of.are_made())

    def made(self):
        """The values, made as where the layer was called: with gradients, whatever checkpoint it is that reads them."""
        if self.values is None:
            with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(itself, itself):
                self.values = self.head.outputs() if self.step is None else self.made_by(self.step)
            shares = self.step is not None and not self.step.copies
            self.version = self.step.of.version if shares else self.values._version
        return self.values

    @staticmethod
    def made_by(step):
        given = step.of.made()
        if step.copies and given._version != step.of.version:
            raise RuntimeError(
                "logits were changed in place after a copy of them, which is made when it is first read: read it before"
            )
        return step.func(given, *step.args, **step.kwargs)

    # --- The rows

    @property
    def classes(self):
        return self.head.weight.shape[0]

    @property
    def class_dim(self):
        return class_dim(self.like, self.classes)

    def inputs(self):
        """The layer's input for each row: of the shape of the logits, but for the classes, with the features last."""
        features = self.rows.shape[-1]
        x, dims = self.rows.contiguous(), [dim for dim in range(self.like.dim()) if dim != self.class_dim]

        def scaled(elements):
            return elements // self.classes * features

        return x.as_strided(
            [*(self.like.shape[dim] for dim in dims), features],
            [*(scaled(self.like.stride(dim)) for dim in dims), 1],
            x.storage_offset() + scaled(self.like.storage_offset()),
        )

    def after(self, func, args, kwargs):
        """The `Logits` that a function makes of these, or None where its result takes real ones."""
        form = self.form.after(func, args, kwargs)
        if form is None:
            return None
        if func is INDEX and not is_view(args[0]):
            return self.taken(args[0])
        if func is MOVE:
            args, kwargs = without(self.rows.device, args, kwargs)
        try:
            like = func(self.like, *args, **kwargs)
        except NotImplementedError:  # nothing is copied from the meta device
            return None
        if like is self.like:
            return self
        shares = like._base is not None
        rows = self.rows if shares or same_places(like, self.like) else self.copied_to(like)
        if rows is None or not holds_rows(like, self.classes) or not is_as_wide(like.dtype, self.like.dtype):
            return None
        return Logits(self.head, rows, like, form, Step(func, self, args, kwargs, not shares))

    def taken(self, index):
        """Those at an index of the first dimensions: a mask, or positions. None for other indices."""
        if not isinstance(index, Tensor) or self.class_dim != self.like.dim() - 1:
            return None
        dims = index.dim() if index.dtype in (torch.bool, torch.uint8) else 1
        if dims >= self.like.dim():
            return None
        rows = self.inputs()[index]
        like = torch.empty(*rows.shape[:-1], self.classes, dtype=self.like.dtype, device="meta")
        step = Step(INDEX, self, (index.clone(),), {}, copies=True)
        return Logits(self.head, rows, like, self.form, step) if rows.numel() else None

    def copied_to(self, like):
        """`rows` for a copy like that, or None."""
        last = self.class_dim == self.like.dim() - 1 and like.shape[-1:] == (self.classes,)
        return self.inputs() if last and like.is_contiguous() else None

    # --- The loss

    def loss(self, arguments, options):
        """What `cross_entropy` gives for these logits, or None where it takes real ones."""
        target, shape = arguments.target, self.like.shape
        batch = [size for dim, size in enumerate(shape) if dim != self.class_dim]
        options_of_layer = self.form.options(options)
        wide = is_as_wide(options.dtype or self.like.dtype, self.like.dtype)
        if options_of_layer is None or not wide or self.class_dim != dim_of_classes(self.like, options.shift):
            return None
        if not isinstance(target, Tensor) or list(target.shape) not in (batch, list(shape)):
            return None  # they say what is wrong
        dtype = reference.result_dtype(self.like, target, arguments.weight, is_autocast(self.rows), options.dtype)
        found = self.loss_of_layer(arguments, options_of_layer)
        return (found[0].to(dtype), found[1]) if options.return_stats else found.to(dtype)

    def loss_of_layer(self, arguments, options):
        target = arguments.target
        given = options._asdict() | {"dtype": reference.accumulation_dtype(options.dtype or self.like.dtype)}
        del given["inplace"]  # there are no logits whose memory could be taken
        with self.head.as_called():
            return functional.linear_cross_entropy(
                self.inputs(),
                self.head.weight,
                target.movedim(self.class_dim, -1) if target.shape == self.like.shape else target,
                linear_bias=self.head.bias,
                weight=arguments.weight,
                reduction=checks.reduction_name(arguments.size_average, arguments.reduce, arguments.reduction),
                ignore_index=arguments.ignore_index,
                label_smoothing=arguments.label_smoothing,
                **given,
            )


def itself(tensor):
    return tensor


def class_dim(like, classes):
    """The dimension of the classes, or None."""
    return next((dim for dim, size in enumerate(like.shape) if size == classes and like.stride(dim) == 1), None)


def dim_of_classes(like, shift):
    """The dimension in which `cross_entropy` has the classes."""
    return 2 if shift else min(1, like.dim() - 1)


def holds_rows(like, classes):
    """Whether a view of outputs (rows, classes) is of whole rows."""
    others = [like.stride(dim) for dim, size in enumerate(like.shape) if size > 1 and like.stride(dim) != 1]
    whole = all(elements % classes == 0 for elements in (like.storage_offset(), *others))
    return like.numel() > 0 and class_dim(like, classes) is not None and whole


def same_places(a, b):
    return (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())


def is_as_wide(dtype, other):
    return dtype.is_floating_point and torch.promote_types(dtype, other) == dtype


def is_view(index):
    """Whether an index gives a view."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or type(part) in (int, slice) for part in parts)


def without(device, args, kwargs):
    """The arguments of `Tensor.to`, but for the device where the tensor is."""

    def is_device(value):
        return isinstance(value, str | torch.device) and torch.device(value) == device

    args = tuple(value for value in args if not is_device(value))
    return args, {name: value for name, value in kwargs.items() if not is_device(value)}


# --- The tensor


class DeferredLogits(Tensor):
    """The tensor that stands for `Logits`."""

    logits: Logits

    @staticmethod
    def __new__(cls, logits):
        like = logits.like
        tensor = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=logits.rows.device,
        )
        tensor.logits = logits
        return tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = loss_of(func, args, kwargs) if func in LOSSES else deferred_by(func, args, kwargs)
        if found is not None:
            return found
        args, kwargs = tree_map_only(DeferredLogits, lambda tensor: tensor.logits.made(), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """What is called past `__torch_function__`, as what a `torch.autograd.Function` returns as it came."""
        given = args, kwargs or {}
        args, kwargs = tree_map_only(DeferredLogits, lambda tensor: tensor.logits.made().detach(), given)
        return func(*args, **kwargs)


class Stand(torch.autograd.Function):
    """From a layer's tensors to `DeferredLogits`: for gradients of what was called past `__torch_function__`."""

    @staticmethod
    def forward(ctx, logits, *tensors):
        ctx.logits = logits
        return DeferredLogits(logits)

    @staticmethod
    def backward(ctx, gradient):
        tensors = ctx.logits.head.tensors
        wanted = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad[1:], strict=True) if need]
        more = torch.is_grad_enabled()
        found = iter(torch.autograd.grad(ctx.logits.made(), wanted, gradient, retain_graph=True, create_graph=more))
        return None, *[next(found) if need else None for need in ctx.needs_input_grad[1:]]


def deferred(logits):
    return Stand.apply(logits, *logits.head.tensors)


def deferred_by(func, args, kwargs):
    """The `DeferredLogits` that a function gives, or None if it takes real logits."""
    tensor = args[0] if args else None
    if type(tensor) is not DeferredLogits or tensor.logits.are_made() or not torch.is_grad_enabled():
        return None
    found = tensor.logits.after(func, args[1:], kwargs)
    if found is None:
        return None
    return tensor if found is tensor.logits else deferred(found)


def loss_of(func, args, kwargs):
    """The loss without logits, or None if it takes real ones."""
    names = Options._fields if func is functional.cross_entropy else ()
    options = Options(**{name: kwargs[name] for name in names if name in kwargs})
    arguments = Arguments(*args, **{name: value for name, value in kwargs.items() if name not in names})
    tensor = arguments.input
    if type(tensor) is not DeferredLogits or tensor.logits.are_made():
        return None
    return tensor.logits.loss(arguments, options)


# --- The model


class LmHead(torch.nn.Linear):
    """A last layer that `patch_lm_head` has patched."""

    def forward(self, input: Tensor) -> Tensor:
        if not may_be_deferred(self, input):
            return super().forward(input)
        shape, dtype = (*input.shape[:-1], self.out_features), linear_call.dtype_of_products(input)
        like = torch.empty(shape, dtype=dtype, device="meta")
        return deferred(Logits(Head.called(input, self.weight, self.bias), input, like, Form()))


# The modules whose units FSDP may make of a head's parameters: weak references, by head.
_owners: weakref.WeakKeyDictionary[LmHead, list[weakref.ref]] = weakref.WeakKeyDictionary()


def may_be_deferred(layer, input):
    """Whether logits for training are to be made that `linear_cross_entropy` could do without.

    The layer's tensors must be those that it has after the call, too: parameters, and such as are not gathered for it.
    """
    if torch.compiler.is_compiling() or not (layer.training and torch.is_grad_enabled()):
        return False
    weight, bias = layer.weight, layer.bias
    parameters = [each for each in (weight, bias) if each is not None]
    if type(input) not in PLAIN or any(type(each) is not torch.nn.Parameter for each in parameters):
        return False
    return (
        any(each.requires_grad for each in (input, *parameters))
        and not input.is_inference()
        and not hasattr(weight, "ds_id")  # of DeepSpeed's third stage
        and input.device.type in ("cpu", "cuda")
        and all(each.device == input.device for each in parameters)
        and input.dtype in DTYPES
        and (linear_call.is_cast(input) or all(each.dtype == input.dtype for each in parameters))
        and input.numel() > 0
        and input.shape[-1] == weight.shape[1]
        and weight.shape[0] > 1
        and not is_sharded(layer)
        and dispatch.unsupported_here() is None
    )


def is_sharded(layer):
    """Whether FSDP gathers this layer's parameters for its calls, or for those of a module that it is in."""
    fsdp = getattr(torch.distributed, "fsdp", None)  # imported if there are any
    owners = (layer, *(owner() for owner in _owners.get(layer, ())))
    return fsdp is not None and any(isinstance(owner, fsdp.FSDPModule) for owner in owners)


class LmHeadPatch:
    """What `patch_lm_head` returns: `remove()` undoes it, as does the end of a `with` block."""

    def __init__(self, head: torch.nn.Linear) -> None:
        self.head = head

    def remove(self) -> None:
        """Make the head a `torch.nn.Linear` again. What has been put in its forward's place since may keep this one."""
        if type(self.head) is LmHead:
            self.head.__class__ = torch.nn.Linear  # type: ignore[assignment]
        if isinstance(self.head, LmHead) or "forward" in vars(self.head):
            warnings.warn(
                f"the head was changed after patch_lm_head, to {type(self.head).__name__} with the forward "
                f"{self.head.forward!r}, which may still be the patched one",
                RuntimeWarning,
                stacklevel=2,
            )

    def __enter__(self) -> "LmHeadPatch":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def patch_lm_head(model: torch.nn.Module) -> LmHeadPatch:
    """Train a language model of Transformers without its logits: its own forward, its Trainer, no edit.

    While the model trains and gradients are recorded, its last layer then returns a tensor that stands for the logits.
    The models' losses, or any other code that reaches `F.cross_entropy`, `torch.nn.CrossEntropyLoss` or this package's,
    compute `xent_ext.linear_cross_entropy` of it: same loss and gradients, without the memory of (tokens, vocabulary).
    It follows, on the way there,

    - `.float()`, `.double()`, `.to()` a dtype as wide or the same device, `.contiguous()`, `.clone()`,
    - views and slices of whole rows, as `[..., :-1, :]`, `.view(-1, V)`, `.transpose(1, 2)`, and rows by a mask,
    - a scale (Cohere, Granite): products and quotients with a number; and a cap by tanh (Gemma 2).

    Anything else, such as `outputs.logits.argmax(-1)`, another loss, a hook, or printing, is given real logits, which
    are made once, when they are first read, with their gradients. From then on losses use them, too. They can't be
    made any more after the optimizer's step, which changes the weight: that raises RuntimeError, so read them before.
    `torch.autograd.grad(loss, outputs.logits)` finds no gradient, as the loss doesn't depend on them.

    The layer is as it was in evaluation and `generate`, under `torch.no_grad`, in graphs of `torch.compile` (which hold
    plain logits), under `torch.func` and dispatch modes, and where its weight is a `DTensor`, gathered by FSDP or
    DeepSpeed's third stage, computed, or frozen together with all before it.

    Args:
        model: one whose `get_output_embeddings()` returns a `torch.nn.Linear`. Tied weights, adapters elsewhere in the
            model, checkpointing and autocast need nothing besides. A head that an adapter or a quantised layer has
            replaced is none; one that is wrapped after this makes real logits. Patch before wrapping the model (DDP).

    Returns:
        A handle, whose `remove()` undoes it; as a context manager it does so at the end of the block. Until then the
        head is of a subclass of `torch.nn.Linear`, and so it stays in copies and pickles. To patch again changes
        nothing.

    Raises:
        TypeError for a model without such a head, ValueError where its forward was replaced.
    """
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None:
        raise TypeError(f"model must have a head that get_output_embeddings() returns, got {type(model).__name__}")
    if type(head) not in (torch.nn.Linear, LmHead):
        kind = type(head)
        raise TypeError(f"the head of the model must be a torch.nn.Linear, got {kind.__name__} of {kind.__module__}")
    if "forward" in vars(head):
        raise ValueError(f"the forward of the model's head was replaced, by {head.forward!r}")
    owners = [module for module in model.modules() if any(each is head for each in module.modules())]
    head.__class__ = LmHead
    _owners[head] = [weakref.ref(owner) for owner in owners]
    return LmHeadPatch(head)
