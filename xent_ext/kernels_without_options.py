"""`xent_ext.kernels.launch` in the form of an implementation, for calls without options for training.

It takes tensors one by one. Once it has the options and takes and returns what `xent_ext.autograd` says, `dispatch` can
name it directly, and this file goes.
"""

from .kernels import launch
from .problem import Made


def forward(problem, tensors, wanted, expected):
    loss, gradient, normalizer, summary = launch.forward(problem, *tensors[:3], wanted.gradient, expected)
    return Made(loss, gradient=gradient, normalizer=normalizer, summary=summary)


def backward(problem, tensors, wanted, made, upstream, expected):
    gradient, seen = launch.backward(
        problem, *tensors[:3], made.gradient, made.normalizer, made.summary, upstream.loss, expected
    )
    return gradient, None, seen


def traffic(problem, tensors, want_gradient):
    return launch.traffic(problem, *tensors[:3], want_gradient)
