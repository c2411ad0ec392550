"""The options for training on a CPU: any of them, in blocks, by a softmax that all of them can use.

The formula is `xent_ext.reference`'s in the form of kernels/math.py, with m the maximum of a row's logits z:

    p = softmax(z),  s = sum exp(z - m) = 1 / max p,  mass = sum b,  dot = sum b * (z - m)
    row loss = mass * log(s) - dot,   row gradient = mass * p - b

PyTorch's softmax takes less time than its exponential, which for z - m below -87, as in confident or masked rows, takes
ten times as long.

With a z-loss, lse = m + log(s), the loss has z_loss * lse^2 more and the mass of the gradient 2 * z_loss * lse. What
turns logits into z, and gradients of statistics, add operators to a block only where they are asked for.
"""

from typing import NamedTuple

import torch

from .cpu_plain import FEW_CLASSES, LONG_ROW, exp_, less_maximum
from .memory import buffer

# Stands for z - m = -inf in the entropy, where p is 0 in float64 too, and so is the product with this.
LOWEST = -1e4
NEED_DISTANCE = {"logprob", "entropy", "entropy_upstream"}  # those of `Walk.extras` that are made of z - m


def walk(rows, g, upstream, with_slope, stats):
    """Row losses before `sample_weight`, the statistics `stats` and, if wanted, slopes, all (outer, inner) or None.

    The gradient for `upstream` is written to g, (outer, inner, class), unless that is None.
    """
    return Walk(rows).walk(g, upstream, with_slope, stats)


def buffer_like(like, dtype, name="block"):
    """Memory of the shape and order of `like`, a block of logits; one for each name."""
    if like.stride(1) < like.stride(2):
        return buffer(like.transpose(1, 2).shape, dtype, name).transpose(1, 2)
    return buffer(like.shape, dtype, name)


def softmax(z, out):
    """Along the classes, in the order of memory that `out`, a block, has: by what is quick there, as in `cpu_plain`."""
    axis = 2
    if out.stride(1) < out.stride(2):
        axis, z, out = 1, z.transpose(1, 2), out.transpose(1, 2)
    if axis == 2 and z.shape[2] >= LONG_ROW:
        torch.softmax(z, 2, out=out)
    elif axis == 2 and z.shape[2] < FEW_CLASSES:
        exp_(less_maximum(z, 2, out))
        out.div_(out.sum(2, keepdim=True))
    else:
        exp_(torch.log_softmax(z, axis, out=out))


def gather(x, index, out):
    """x[..., index] by row: PyTorch's gather is quick where the dimension is not the last."""
    torch.gather(x.transpose(1, 2), 1, index.unsqueeze(1), out=out.unsqueeze(1))


class RowValues(NamedTuple):
    """One number for each row of a call, or of a block."""

    scale: torch.Tensor  # upstream gradient over the normaliser
    point: torch.Tensor  # mass at the class index beside the dense mass; 0 for probabilities
    z: torch.Tensor  # logit at the class index
    m: torch.Tensor
    s: torch.Tensor
    mass: torch.Tensor
    dot: torch.Tensor


class Walk:
    """The rows of a call, by blocks."""

    def __init__(self, rows):
        self.rows = rows

    def walk(self, g, upstream, with_slope, stats):
        rows = self.rows
        row = RowValues(*torch.empty((len(RowValues._fields), *rows.shape), dtype=rows.acc))
        row.scale.copy_(0 if upstream.loss is None else rows.upstream_scale(upstream.loss))
        row.point.copy_(0 if rows.index is None else rows.point_mass())
        row.mass.copy_(row.point)
        extras = self.extras(upstream, with_slope, stats)
        for x, to, ignored, q, index, *values in rows.by_block(g, rows.q, rows.index, *row, *extras.values()):
            here, more = RowValues(*values[: len(row)]), dict(zip(extras, values[len(row) :], strict=True))
            self.block(x, to, q, index, ignored, here, more)
        losses = row.mass * row.s.log() - row.dot
        if rows.z_loss:
            losses.add_(self.lse(row).square_(), alpha=rows.z_loss)
        found = [self.stat(name, row, extras) for name in stats]
        return rows.cleared_(losses), found, rows.cleared_(extras.get("slope"))

    def extras(self, upstream, with_slope, stats):
        """What options ask a block to fill in, or to read, for each row; by name."""

        def empty(dtype=self.rows.acc):
            return torch.empty(self.rows.shape, dtype=dtype)

        found = {
            f"{name}_upstream": self.rows.by_row(up.to(self.rows.acc))
            for name, up in upstream._asdict().items()
            if name != "loss" and up is not None
        }
        if with_slope:
            found["slope"] = empty()
        if "entropy" in stats:
            found["entropy"] = empty()
        if "logprob" in stats and self.rows.q is not None:
            found["logprob"] = empty()
        if "predicted" in stats or "correct" in stats:
            found["predicted"] = empty(torch.int64)
        if "correct" in stats:
            found["true"] = self.rows.index if self.rows.q is None else empty(torch.int64)
        return found

    def stat(self, name, row, extras):
        """The statistic `name`, (outer, inner)."""
        if name == "lse":
            value = self.lse(row)
        elif name == "max_prob":
            value = row.s.reciprocal()
        elif name == "logprob" and self.rows.q is None:
            value = row.z - row.m - row.s.log()
        elif name == "correct":
            value = extras["predicted"] == extras["true"]
        else:
            value = extras[name]
        return self.rows.cleared_(value, -1 if name == "predicted" else 0)

    @staticmethod
    def lse(row):
        return row.s.log() + row.m

    def memory(self, x, g):
        """Where a block's probabilities go: its gradient, even in the logits' place, or a buffer where that is half."""
        return g if g is not None and x.dtype == self.rows.acc else buffer_like(x, self.rows.acc)

    def block(self, x, g, q, index, ignored, row, more):
        """Fill in the values of a block's rows; write their gradient to g, unless that is None."""
        p = self.memory(x, g)
        given = x
        if "slope" in more and p is g and self.rows.problem.inplace:  # which needs the logits when they are overwritten
            given = buffer_like(x, self.rows.acc, "given").copy_(x)
        z, capped = self.transformed(self.widened(x))
        b = self.probabilities(z, p, q, index, row, more)
        if g is None:
            return
        self.scale_by_mass(p, q, row, more)
        self.subtract_targets(p, b, q, index, row, more)
        if capped is not None:
            p.mul_(capped.square_().neg_().add_(1))
        if "slope" in more:
            torch.sum(p * given, -1, out=more["slope"])
        if self.rows.scaled:
            p.mul_(self.rows.scale)
        if ignored is not None:
            p.masked_fill_(ignored.unsqueeze(-1), 0)
        if p is not g:
            g.copy_(p)

    def widened(self, x):
        return x if x.dtype == self.rows.acc else buffer_like(x, self.rows.acc, "widened").copy_(x)

    def transformed(self, x):
        """z, and z / softcap if there is a cap."""
        cap = self.rows.softcap
        if cap is None:
            return torch.mul(
                x, self.rows.scale, out=buffer_like(x, self.rows.acc, "z")
            ) if self.rows.scaled else x, None
        capped = torch.mul(x, self.rows.scale / cap, out=buffer_like(x, self.rows.acc, "capped")).tanh_()
        return torch.mul(capped, cap, out=buffer_like(x, self.rows.acc, "z")), capped

    def probabilities(self, z, p, q, index, row, more):
        """Write softmax(z) to p, and mass, s and dot to the row; returns the dense mass, or None."""
        if "predicted" in more:
            torch.max(z, -1, out=(row.m, more["predicted"]))
        else:
            torch.amax(z, -1, out=row.m)
        if index is not None:
            gather(z, index, out=row.z)
            torch.mul(row.point, row.z - row.m, out=row.dot)
        b, distance = None, None
        if self.rows.dense or NEED_DISTANCE & more.keys():
            distance = torch.sub(z, row.m.unsqueeze(-1), out=buffer_like(z, self.rows.acc, "distance"))
        softmax(z, p)  # after this there are no logits, where p takes their place
        torch.amax(p, -1, out=row.s).reciprocal_()
        if self.rows.dense:
            b = self.dense_mass(q)
            row.mass.add_(b.expand(p.shape).sum(-1))
            dot = b * distance.sum(-1) if b.dim() == 0 else (b * distance).sum(-1)
            row.dot.copy_(dot if index is None else dot.add_(row.dot))
        if more:
            self.statistics(p, q, distance, row, more)
        return b

    def statistics(self, p, q, distance, row, more):
        """Fill in what is asked for besides, of the probabilities and of z - m."""
        if "logprob" in more:
            q = q.to(self.rows.acc)
            torch.sub((q * distance).sum(-1), q.sum(-1) * row.s.log(), out=more["logprob"])
        if "true" in more and q is not None:
            torch.argmax(q, -1, out=more["true"])
        if "entropy" in more or "entropy_upstream" in more:
            more["distance"] = distance.clamp_(min=LOWEST)
            more["mean_distance"] = (distance * p).sum(-1)
        if "entropy" in more:
            torch.sub(row.s.log(), more["mean_distance"], out=more["entropy"])

    def scale_by_mass(self, p, q, row, more):
        """Multiply the probabilities by what the gradient has of each."""
        mass = row.mass * row.scale
        if self.rows.z_loss:
            mass += 2 * self.rows.z_loss * self.lse(row) * row.scale
        if "lse_upstream" in more:
            mass += more["lse_upstream"]
        if "logprob_upstream" in more:
            mass -= more["logprob_upstream"] * (1 if q is None else q.to(self.rows.acc).sum(-1))
        if "entropy_upstream" not in more:
            p.mul_(mass.unsqueeze(-1))
            return
        # d entropy / dz_c = -p_c * (distance_c - mean_distance)
        up, distance = more["entropy_upstream"], more["distance"]
        mass += up * more["mean_distance"]
        p.mul_(distance.mul_(-up.unsqueeze(-1)).add_(mass.unsqueeze(-1)))

    def subtract_targets(self, p, b, q, index, row, more):
        """Subtract the target masses from the gradient, and add what comes of the targets' log-probabilities."""
        if b is not None:
            p.addcmul_(b, row.scale.unsqueeze(-1), value=-1)
        if index is not None:
            point = row.point * -row.scale
            if "logprob_upstream" in more:
                point += more["logprob_upstream"] * more.get("here", 1)
            p.transpose(1, 2).scatter_add_(1, index.unsqueeze(1), point.unsqueeze(1))
        elif "logprob_upstream" in more:
            p.addcmul_(q.to(self.rows.acc), more["logprob_upstream"].unsqueeze(-1))

    def dense_mass(self, q):
        """The mass that every class has beside the point mass, as (), (C) or (outer, inner, C)."""
        if q is None:
            return self.rows.smoothing_mass()
        b = self.rows.smoothed(q.to(self.rows.acc))
        return b if self.rows.weight is None else b * self.rows.weight
