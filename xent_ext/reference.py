"""The specification: the loss in plain PyTorch, differentiable any number of times.

For a row with logits x (C of them) let

    z = logit_scale * x,  or  softcap * tanh(logit_scale * x / softcap)
    logp = log_softmax(z),  lse = log sum_c exp z_c

and let b be the row's *target mass*:

    class index t:           b_c = (1 - eps) * w_t * [c == t] + (eps / C) * w_c
    class probabilities q:   b_c = w_c * ((1 - eps) * q_c + eps / C)
    ignored row:             b   = 0, and no z-loss

    row loss l = - sum_c b_c * logp_c + z_loss * lse^2

`none` returns the row losses, each times its `sample_weight` f (1 without one), `sum` adds them, `mean` divides that
sum by `normalizer` or, without one, by the sum of f * w_t over the rows that are not ignored (for probabilities: by the
sum of f).

Without the options of training these are the definitions of `torch.nn.CrossEntropyLoss`; eps is its `label_smoothing`
(Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016) and w its `weight`. Softcap is that
of Gemma 2 (Gemma Team, 2024), the z-loss that of PaLM (Chowdhery et al., 2022). The logits of an ignored row take no
part at all.
"""

import torch

from .layout import visible
from .problem import NUMBERS, number

STATS = ("logprob", "lse", "entropy", "max_prob", "predicted", "correct")


def stat_dtype(name, acc):
    """dtype of the statistic `name` of a loss that is computed in `acc`."""
    return {"predicted": torch.int64, "correct": torch.bool}.get(name, acc)


def result_dtype(input, target, weight, autocast=False, dtype=None):
    """dtype of the loss. Probabilities promote with the input, as does their weight; autocast gives float32.

    `dtype` stands for the input's, if it is given.
    """
    dtype = dtype or input.dtype
    if input.shape == target.shape:
        dtype = torch.promote_types(dtype, target.dtype)
        if weight is not None:
            dtype = torch.promote_types(dtype, weight.dtype)
    return torch.promote_types(dtype, torch.float32) if autocast else dtype


def accumulation_dtype(dtype):
    """Float32 for half precision, else the dtype itself."""
    return torch.promote_types(dtype, torch.float32)


def cross_entropy(
    input,
    target,
    weight=None,
    *,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    dtype=None,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
    sample_weight=None,
    normalizer=None,
    on_all_ignored="nan",
    stats=(),
):
    """The loss, as the module's docstring defines it.

    Args:
        input: logits, (C), (N, C) or (N, C, d1, ...), floating point.
        target: class indices, int64 or uint8, shape of `input` without its class dimension; or class
            probabilities, floating point, shape of `input`.
        weight: (C), or None for all ones.
        dtype: dtype of the loss; None for PyTorch's rule, `result_dtype`.
        logit_scale, softcap, z_loss: a number or a 0-dim tensor; a softcap of None for no cap.
        sample_weight: one factor for each row, in the shape of the rows, or None for all ones.
        normalizer: what `mean` divides by, a number or a 0-dim tensor, or None for its own sum.
        on_all_ignored: "nan", or "zero" for a mean of 0, with gradient 0, where `mean` would divide by 0.
        stats: names of `STATS` to return besides, see `row_stats`; the loss is then the first of a tuple.
    Arguments are taken to be valid; `xent_ext.checks` is where they are checked.
    """
    dtype = dtype or result_dtype(input, target, weight)
    acc = accumulation_dtype(dtype)
    eps = max(label_smoothing, 0.0)
    x = input.to(acc).movedim(0 if input.dim() == 1 else 1, -1)
    classes = x.shape[-1]
    w = torch.ones(classes, dtype=acc, device=x.device) if weight is None else weight.to(acc)

    if input.shape == target.shape:
        q, t, counted = target.to(acc).movedim(0 if input.dim() == 1 else 1, -1), None, None
        z, logp = log_probabilities(x, logit_scale, softcap)
        loss = -(w * ((1 - eps) * q + eps / classes) * logp).sum(-1)
        w_t = None
    else:
        target = target.long().reshape(x.shape[:-1])
        counted = target != ignore_index
        q, t = None, torch.where(counted, target, 0)
        z, logp = log_probabilities(torch.where(counted.unsqueeze(-1), x, 0.0), logit_scale, softcap)
        w_t = torch.where(counted, w[t], 0.0)
        loss = -(1 - eps) * w_t * logp.gather(-1, t.unsqueeze(-1)).squeeze(-1)
        if eps:
            loss = loss - eps / classes * (w * logp).sum(-1)

    if isinstance(z_loss, torch.Tensor) or z_loss:
        loss = loss + z_loss * z.logsumexp(-1).square()
    if counted is not None:
        loss = torch.where(counted, loss, 0.0)
    loss = reduced(loss, w_t, counted, sample_weight, normalizer, reduction, on_all_ignored).to(dtype)
    return (loss, *row_stats(stats, z, logp, q, t, counted)) if stats else loss


def compute(problem, tensors):
    """The loss of a call, and a tuple of its statistics."""
    found = cross_entropy(
        visible(problem, tensors.input),
        tensors.target,
        tensors.weight,
        ignore_index=problem.ignore_index,
        reduction=problem.reduction,
        label_smoothing=problem.label_smoothing,
        dtype=problem.dtype,
        **{name: number(name, problem, tensors) for name in NUMBERS},
        sample_weight=tensors.sample_weight,
        normalizer=tensors.normalizer,
        on_all_ignored=problem.on_all_ignored,
        stats=problem.stats,
    )
    return (found[0], found[1:]) if problem.stats else (found, ())


def log_probabilities(x, logit_scale, softcap):
    """z, and log_softmax(z)."""
    z = x if isinstance(logit_scale, float) and logit_scale == 1.0 else logit_scale * x
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z, z.log_softmax(-1)


def reduced(losses, weights, counted, sample_weight, normalizer, reduction, on_all_ignored):
    """What becomes of the row losses.

    `weights` are those of the rows' classes, 0 in ignored rows; `counted` says which rows are not. Both are None for
    probabilities, where every row counts 1.
    """
    if sample_weight is not None:
        f = sample_weight.to(losses.dtype)
        f = f if counted is None else torch.where(counted, f, 0.0)
        losses = losses * f
        weights = f if weights is None else weights * f
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    if normalizer is None:
        normalizer = losses.numel() if weights is None else weights.sum()
    return total / mean_divisor(normalizer, on_all_ignored)


def mean_divisor(normalizer, on_all_ignored):
    """What a mean divides by: inf in place of 0, if that is to give 0."""
    if on_all_ignored != "zero":
        return normalizer
    if isinstance(normalizer, torch.Tensor):
        return torch.where(normalizer == 0, torch.inf, normalizer)
    return normalizer or torch.inf


def row_weights(problem, tensors, like):
    """`reduced`'s weights and counted rows of a call, in the shape of the row losses `like`."""
    if problem.probabilities:
        return None, None
    target = tensors.target.long().reshape(like.shape)
    counted = target != problem.ignore_index
    if tensors.weight is None:
        weights = torch.ones_like(like)
    else:  # of a class that there is, whatever the index: on a GPU another would stop the context
        index = (target * counted).clamp(0, tensors.weight.numel() - 1)
        # Not weight[index], which in a graph would read the value of a 0-dim index.
        weights = tensors.weight.to(like.dtype).index_select(0, index.reshape(-1)).reshape(index.shape)
    return torch.where(counted, weights, 0.0), counted


def mean_normalizer(problem, tensors, ones):
    """What `mean` divides the sum of a call's losses by where none is given; `ones` are in the shape of the losses."""
    weights, counted = row_weights(problem, tensors, ones)
    weights = ones if weights is None else weights
    return reduced(weights, weights, counted, tensors.sample_weight, None, "sum", problem.on_all_ignored)


def row_stats(names, z, logp, q, t, counted):
    """What is asked for of each row, of the distribution p = softmax(z) that the loss sees.

    logprob    log p_t, or sum_c q_c log p_c
    lse        log sum_c exp z_c
    entropy    - sum_c p_c log p_c, where a class with p_c = 0 adds 0
    max_prob   the largest p_c
    predicted  its class, the first of several
    correct    whether that is t, or the first of the largest q_c

    An ignored row has 0, False and a predicted class of -1.
    """
    found = []
    for name in names:
        if name == "logprob":
            value = (q * logp).sum(-1) if t is None else logp.gather(-1, t.unsqueeze(-1)).squeeze(-1)
        elif name == "lse":
            value = z.logsumexp(-1)
        elif name == "entropy":
            p = logp.exp()
            value = -(p * torch.where(p == 0, 0.0, logp)).sum(-1)
        elif name == "max_prob":
            value = logp.amax(-1).exp().detach()
        elif name == "predicted":
            value = z.argmax(-1)
        else:
            value = z.argmax(-1) == (q.argmax(-1) if t is None else t)
        if counted is not None:
            value = torch.where(counted, value, -1 if name == "predicted" else False if name == "correct" else 0.0)
        found.append(value)
    return found
