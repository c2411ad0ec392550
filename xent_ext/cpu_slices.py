"""Classes of which other ranks have the rest, on a CPU: summaries of rows, and results and gradient from all of them.

The fields of a summary are those of `xent_ext.summary`. What merges them here merges them in kernels/math.py.
"""

from typing import NamedTuple

import torch

from .cpu_options import LOWEST, Walk, buffer_like, gather, softmax
from .summary import base_of

_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class SliceValues(NamedTuple):
    """One number for each row of a call, or of a block, where these are a part of its classes."""

    scale: torch.Tensor  # upstream gradient over the normaliser
    point: torch.Tensor  # mass at the class index beside the dense mass, if that class is here
    share: torch.Tensor  # of these classes in the row's probabilities
    m: torch.Tensor  # the maximum here, or 0 where all logits are -inf
    mass: torch.Tensor  # these are the row's
    lse: torch.Tensor
    mean: torch.Tensor  # of z under p
    total: torch.Tensor


class SliceWalk(Walk):
    """The rows of a slice, by blocks; with the summaries of all ranks once they are gathered, (ranks, fields, rows)."""

    def __init__(self, rows, gathered=None):
        super().__init__(rows)
        self.problem, self.gathered = rows.problem, gathered

    # Before the summaries are gathered

    def summarise(self, packed):
        """Write the summary of each row to `packed`, (fields, rows)."""
        rows, names = self.rows, base_of(self.problem)
        packed.zero_()
        packed[0].fill_(-torch.inf)
        if self.problem.stats:
            as_integers(packed[names.index("best")]).fill_(2 * rows.classes)
        if not rows.layout.classes:
            return
        fields = [rows.by_row(field) for field in packed]
        point = None if rows.index is None else rows.point_mass()
        for x, _, _, q, index, here, point_here, *values in rows.by_block(
            None, rows.q, rows.index, rows.here, point, *fields
        ):
            self.summarise_block(x, q, index, here, point_here, dict(zip(names, values, strict=True)))

    def summarise_block(self, x, q, index, here, point, row):
        z, _ = self.transformed(self.widened(x))
        p = buffer_like(x, self.rows.acc)
        torch.amax(z, -1, out=row["m"])
        none, origin = self.softmax_of(z, p, row["m"])
        row["s"].copy_(torch.amax(p, -1).reciprocal_().masked_fill_(none, 0))
        distance = None
        if self.rows.dense or self.problem.stats:
            distance = torch.sub(z, origin.unsqueeze(-1), out=buffer_like(z, self.rows.acc, "distance"))
        if index is not None:
            at_target = torch.empty(index.shape, dtype=self.rows.acc)
            gather(z, index, at_target)
            at_target = torch.where(here > 0, at_target - origin, 0)  # whatever the logit of another class is
            row["mass"].copy_(point)
            row["dot"].copy_(torch.where(point == 0, 0, point * at_target))
        if self.rows.dense:
            b = self.dense_mass(q)
            row["mass"].add_(b.expand(p.shape).sum(-1))
            row["dot"].add_(b * distance.sum(-1) if b.dim() == 0 else (b * distance).sum(-1))
        if self.problem.stats:
            self.summarise_stats(z, p, q, distance, row)
            if index is not None:
                row["total"].copy_(here)
                row["cross"].copy_(at_target)

    def summarise_stats(self, z, p, q, distance, row):
        if q is not None:
            q = q.to(self.rows.acc)
            row["total"].copy_(q.sum(-1))
            row["cross"].copy_((q * distance).sum(-1))
        m, best = torch.max(z, -1)
        best += self.problem.class_start
        as_integers(row["best"]).copy_(torch.where(m.isnan(), best, best + self.rows.classes))
        row["spread"].copy_((distance.clamp_(min=LOWEST) * p).sum(-1) * row["s"])

    @staticmethod
    def softmax_of(z, p, m):
        """Write softmax(z) to p, 0 where all of a row's logits are -inf. Returns where, and m, or 0 there."""
        none = m == -torch.inf
        origin = m.masked_fill(none, 0)
        softmax(z, p)
        if none.any():
            p.masked_fill_(none.unsqueeze(-1), 0)
        return none, origin

    # After it

    def walk(self, g, upstream, with_slope=False, stats=()):
        """As `Walk.walk`, of whole rows."""
        rows = self.rows
        whole = self.whole_rows()
        extras = {}
        if g is not None and rows.layout.classes:
            row, extras = self.values(whole, upstream), self.extras(upstream, with_slope, ())
            if rows.here is not None:
                extras["here"] = rows.here
            for x, to, ignored, q, index, *values in rows.by_block(g, rows.q, rows.index, *row, *extras.values()):
                here, more = SliceValues(*values[: len(row)]), dict(zip(extras, values[len(row) :], strict=True))
                self.block(x, to, q, index, ignored, here, more)
        slope = extras.get("slope")
        if with_slope and slope is None:
            slope = torch.zeros(rows.shape, dtype=rows.acc)
        losses = whole["mass"] * whole["s"].log() - whole["dot"]
        if rows.z_loss:
            losses.add_(lse_of(whole).square_(), alpha=rows.z_loss)
        found = [self.stat_of(name, whole) for name in stats]
        return rows.cleared_(losses), found, rows.cleared_(slope)

    def whole_rows(self):
        """The merged summaries, by field, (outer, inner)."""
        names = base_of(self.problem)
        return {
            name: self.rows.by_row(field)
            for name, field in merged(
                dict(zip(names, self.gathered.unbind(1), strict=False)), self.rows.classes
            ).items()
        }

    def values(self, whole, upstream):
        """`SliceValues`."""
        rows = self.rows
        m, s = (rows.by_row(field) for field in self.gathered[self.problem.rank, :2])
        spread = whole.get("spread")
        none = torch.zeros((), dtype=rows.acc)
        return SliceValues(
            scale=none if upstream.loss is None else rows.upstream_scale(upstream.loss),
            point=none if rows.index is None else rows.point_mass(),
            share=s * (m - whole["m"]).exp() / whole["s"],
            m=origin_of(m),
            mass=whole["mass"],
            lse=lse_of(whole),
            mean=none if spread is None else whole["m"] + spread / whole["s"],
            total=whole.get("total", none),
        )

    def probabilities(self, z, p, q, index, row, more):
        """Write softmax(z), of these classes alone, to p; returns the dense mass, or None."""
        if "entropy_upstream" in more:
            distance = torch.sub(z, row.m.unsqueeze(-1), out=buffer_like(z, self.rows.acc, "distance"))
            more["distance"], more["mean_distance"] = distance.clamp_(min=LOWEST), row.mean - row.m
        softmax(z, p)
        nothing = row.share == 0
        if nothing.any():  # where all logits are -inf the softmax is NaN
            p.masked_fill_(nothing.unsqueeze(-1), 0)
        return self.dense_mass(q) if self.rows.dense else None

    def scale_by_mass(self, p, q, row, more):
        """Multiply the probabilities by what the gradient has of each."""
        mass = row.mass * row.scale
        if self.rows.z_loss:
            mass += 2 * self.rows.z_loss * row.lse * row.scale
        if "lse_upstream" in more:
            mass += more["lse_upstream"]
        if "logprob_upstream" in more:
            mass -= more["logprob_upstream"] * row.total
        if "entropy_upstream" not in more:
            p.mul_((mass * row.share).unsqueeze(-1))
            return
        up, distance = more["entropy_upstream"], more["distance"]
        mass += up * more["mean_distance"]
        p.mul_(distance.mul_((-up * row.share).unsqueeze(-1)).add_((mass * row.share).unsqueeze(-1)))

    def stat_of(self, name, whole):
        """The statistic `name`, (outer, inner)."""
        if name == "lse":
            value = lse_of(whole)
        elif name == "max_prob":
            value = whole["s"].reciprocal()
        elif name == "logprob":
            value = whole["cross"] - whole["total"] * whole["s"].log()
        elif name == "entropy":
            value = whole["s"].log() - whole["spread"] / whole["s"]
        else:
            value = whole["best"] % self.rows.classes
        return self.rows.cleared_(value, -1 if name == "predicted" else 0)


def merged(fields, classes):
    """The summaries of whole rows from those of their parts, each field (ranks, rows).

    All are then relative to m, which is 0 where all logits are -inf.
    """
    most = fields["m"].amax(0)
    m = origin_of(most)
    down, e = origin_of(fields["m"]) - m, (fields["m"] - m).exp()
    found = {
        "m": m,
        "s": (fields["s"] * e).sum(0),
        "mass": fields["mass"].sum(0),
        "dot": (fields["dot"] + fields["mass"] * down).sum(0),
    }
    if "best" in fields:
        best = as_integers(fields["best"]).long()
        found["spread"] = (e * (fields["spread"] + fields["s"] * down)).sum(0)
        found["total"] = fields["total"].sum(0)
        found["cross"] = (fields["cross"] + fields["total"] * down).sum(0)
        found["best"] = torch.where((best < classes) | (fields["m"] == most), best, 2 * classes).amin(0)
    return found


def origin_of(m):
    """What exponents are taken relative to: the maximum, or 0 where every logit is -inf."""
    return m.masked_fill(m == -torch.inf, 0)


def lse_of(whole):
    return whole["m"] + whole["s"].log()


def as_integers(bits):
    return bits.view(_BITS[bits.dtype])
