"""The specification: the loss in plain PyTorch, differentiable any number of times.

For a row with logits x (C of them) let logp = log_softmax(x), and let b be the row's *target mass*:

    class index t:           b_c = (1 - eps) * w_t * [c == t] + (eps / C) * w_c
    class probabilities q:   b_c = w_c * ((1 - eps) * q_c + eps / C)
    ignored row:             b   = 0

    row loss = - sum_c b_c * logp_c

`none` returns the row losses, `sum` adds them, `mean` divides that sum by the sum of w_t over the rows that are
not ignored or, for probabilities, by the number of rows. These are the definitions of
`torch.nn.CrossEntropyLoss`; eps is its `label_smoothing` (Szegedy et al., "Rethinking the Inception
Architecture for Computer Vision", 2016) and w its `weight`. The logits of an ignored row take no part at all.
"""

import torch


def result_dtype(input, target, weight, autocast=False):
    """dtype of the loss. Probabilities promote with the input, as does their weight; autocast gives float32."""
    dtype = input.dtype
    if input.shape == target.shape:
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return torch.promote_types(dtype, torch.float32) if autocast else dtype


def accumulation_dtype(dtype):
    """Float32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def cross_entropy(input, target, weight=None, *, ignore_index=-100, reduction="mean", label_smoothing=0.0, dtype=None):
    """The loss, as the module's docstring defines it.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...), floating point.
        target: class indices, int64 or uint8, shape of `input` without its class dimension; or class
            probabilities, floating point, shape of `input`.
        weight: (C), or None for all ones.
        dtype: dtype of the loss; None for PyTorch's rule, `result_dtype`.
    Arguments are taken to be valid; `xent_ext.checks` is where they are checked.
    """
    dtype = dtype or result_dtype(input, target, weight)
    acc = accumulation_dtype(dtype)
    eps = max(label_smoothing, 0.0)
    z = input.to(acc).movedim(0 if input.dim() == 1 else 1, -1)
    classes = z.shape[-1]
    w = torch.ones(classes, dtype=acc, device=z.device) if weight is None else weight.to(acc)

    if input.shape == target.shape:
        q = target.to(acc).movedim(0 if input.dim() == 1 else 1, -1)
        loss = -(w * ((1 - eps) * q + eps / classes) * z.log_softmax(-1)).sum(-1)
        normalizer = loss.numel()
    else:
        target = target.long().reshape(z.shape[:-1])
        counted = target != ignore_index
        t = torch.where(counted, target, 0)
        logp = torch.where(counted.unsqueeze(-1), z, 0.0).log_softmax(-1)
        w_t = torch.where(counted, w[t], 0.0)
        loss = -(1 - eps) * w_t * logp.gather(-1, t.unsqueeze(-1)).squeeze(-1)
        if eps:
            loss = loss - torch.where(counted, eps / classes * (w * logp).sum(-1), 0.0)
        loss = torch.where(counted, loss, 0.0)
        normalizer = w_t.sum()

    if reduction == "none":
        return loss.to(dtype)
    total = loss.sum()
    return (total / normalizer if reduction == "mean" else total).to(dtype)
