"""The options for training on a CPU: any of them, in blocks, by exponentials that all of them can use.

The formula is `xent_ext.reference`'s in the form of kernels/math.py, with m the maximum of a row's logits z:

    e = exp(z - m),  s = sum e,  mass = sum b,  dot = sum b * (z - m)
    row loss = mass * log(s) - dot,   row gradient = mass * e / s - b

With a z-loss, lse = m + log(s), the loss has z_loss * lse^2 more and the mass of the gradient 2 * z_loss * lse. What
turns logits into z, and gradients of statistics, add operators to a block only where they are asked for.
"""

from typing import NamedTuple

import torch

from .memory import buffer

# Stands for z - m = -inf in the entropy, where its exponential is 0 in float64 too, and so is the product with this.
LOWEST = -1e4


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
        """Where a block's exponentials go: its gradient, or a buffer, in which half precision is widened before."""
        return g if g is not None and x.dtype == self.rows.acc else buffer_like(x, self.rows.acc)

    def block(self, x, g, q, index, ignored, row, more):
        """Fill in the values of a block's rows; write their gradient to g, unless that is None."""
        e = self.memory(x, g)
        given = x
        if "slope" in more and e is g and self.rows.problem.inplace:  # which needs the logits when they are overwritten
            given = buffer_like(x, self.rows.acc, "given").copy_(x)
        if x.dtype != self.rows.acc:
            x = e.copy_(x)
        z, capped = self.transformed(x, e)
        b = self.exponentials(z, e, q, index, row, more)
        if g is None:
            return
        self.scale_by_mass(e, q, row, more)
        if b is not None:
            e.addcmul_(b, row.scale.unsqueeze(-1), value=-1)
        if index is not None:
            point = row.point * -row.scale
            if "logprob_upstream" in more:
                point += more["logprob_upstream"]
            e.transpose(1, 2).scatter_add_(1, index.unsqueeze(1), point.unsqueeze(1))
        elif "logprob_upstream" in more:
            e.addcmul_(q.to(self.rows.acc), more["logprob_upstream"].unsqueeze(-1))
        if capped is not None:
            e.mul_(capped.square_().neg_().add_(1))
        if "slope" in more:
            torch.sum(e * given, -1, out=more["slope"])
        if self.rows.scaled:
            e.mul_(self.rows.scale)
        if ignored is not None:
            e.masked_fill_(ignored.unsqueeze(-1), 0)
        if e is not g:
            g.copy_(e)

    def transformed(self, x, e):
        """z, in e where it is not x, and z / softcap if there is a cap."""
        cap = self.rows.softcap
        if cap is None:
            return torch.mul(x, self.rows.scale, out=e) if self.rows.scaled else x, None
        capped = torch.mul(x, self.rows.scale / cap, out=buffer_like(x, self.rows.acc, "capped")).tanh_()
        return torch.mul(capped, cap, out=e), capped

    def exponentials(self, z, e, q, index, row, more):
        """Write exp(z - m) to e, and mass, s and dot to the row; returns the dense mass, or None."""
        if "predicted" in more:
            torch.max(z, -1, out=(row.m, more["predicted"]))
        else:
            torch.amax(z, -1, out=row.m)
        if index is not None:
            gather(z, index, out=row.z)
            torch.mul(row.point, row.z - row.m, out=row.dot)
        torch.sub(z, row.m.unsqueeze(-1), out=e)
        b = None
        if self.rows.dense:
            b = self.dense_mass(q)
            row.mass.add_(b.expand(e.shape).sum(-1))
            dot = b * e.sum(-1) if b.dim() == 0 else (b * e).sum(-1)
            row.dot.copy_(dot if index is None else dot.add_(row.dot))
        if more:
            self.statistics(e, q, row, more)
        else:
            torch.sum(e.exp_(), -1, out=row.s)
        return b

    def statistics(self, e, q, row, more):
        """Turn z - m in e into its exponentials and sum them, filling in what is asked for besides."""
        if "logprob" in more:
            torch.sum(q.to(self.rows.acc) * e, -1, out=more["logprob"])
        if "true" in more and q is not None:
            torch.argmax(q, -1, out=more["true"])
        with_entropy = "entropy" in more or "entropy_upstream" in more
        if with_entropy:
            distance = torch.clamp(e, min=LOWEST, out=buffer_like(e, self.rows.acc, "distance"))
        torch.sum(e.exp_(), -1, out=row.s)
        if "logprob" in more:
            more["logprob"].sub_(q.to(self.rows.acc).sum(-1) * row.s.log())
        if with_entropy:
            more["distance"], more["mean_distance"] = distance, (distance * e).sum(-1).div_(row.s)
        if "entropy" in more:
            torch.sub(row.s.log(), more["mean_distance"], out=more["entropy"])

    def scale_by_mass(self, e, q, row, more):
        """Multiply the exponentials by what the gradient has of each p, over their sum."""
        mass = row.mass * row.scale
        if self.rows.z_loss:
            mass += 2 * self.rows.z_loss * self.lse(row) * row.scale
        if "lse_upstream" in more:
            mass += more["lse_upstream"]
        if "logprob_upstream" in more:
            mass -= more["logprob_upstream"] * (1 if q is None else q.to(self.rows.acc).sum(-1))
        if "entropy_upstream" not in more:
            e.mul_((mass / row.s).unsqueeze(-1))
            return
        # d entropy / dz_c = -p_c * (distance_c - mean_distance)
        up, distance = more["entropy_upstream"], more["distance"]
        mass += up * more["mean_distance"]
        e.mul_(distance.mul_((-up / row.s).unsqueeze(-1)).add_((mass / row.s).unsqueeze(-1)))

    def dense_mass(self, q):
        """The mass that every class has beside the point mass, as (), (C) or (outer, inner, C)."""
        if q is None:
            return self.rows.smoothing_mass()
        b = self.rows.smoothed(q.to(self.rows.acc))
        return b if self.rows.weight is None else b * self.rows.weight
