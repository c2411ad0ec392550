"""The last linear layer with its loss, of `DTensor`s: of the shard of the batch, or of the classes, that is here.

Imported when there are any.
"""

from torch.distributed.tensor import DTensor, Replicate, Shard

from .sharded import Shards, local


class LayerShards(Shards):
    """A call of the layer with a `DTensor` of its input and one of its weight, and the call that is made of it.

    Along each dimension of the mesh either the input is in shards of the batch, and there is all of the weight (it is
    gathered if it is sharded, as FSDP shards it), or there is all of the input, and the weight may be in shards of its
    classes, as a column-parallel layer has it.
    """

    def __init__(self, arguments, options, rows_of):
        """`rows_of` makes the `linear_call.Rows` of the call here."""
        self.given, self.options_given = arguments, options
        check(self.given, options)
        input, weight = self.given.input, self.given.linear_weight
        self.shape = (*input.shape[:-2], input.shape[-2] - 1) if options.shift else input.shape[:-1]
        after = input.dim()  # behind all dimensions of the batch
        logits = [
            batch if is_batch(batch, input, options) else Shard(after) if classes.is_shard(0) else Replicate()
            for batch, classes in zip(input.placements, weight.placements, strict=True)
        ]
        self.place(input.device_mesh, logits, after)
        self.arguments, self.options = self.arguments_here(), self.options_here(weight.shape[0])
        rows = rows_of(self.arguments, self.options)
        self.problem = rows.call.problem
        self.settle_normalizer(self.problem, rows.tensors)

    def arguments_here(self):
        given, probabilities = self.given, self.given.target.dim() > len(self.given.input.shape[:-1])
        of_layer = [Shard(0) if p.is_shard(0) and d == self.classes else q
                    for d, (p, q) in enumerate(zip(self.by_class, self.summed, strict=True))]  # fmt: skip
        of_target = [
            Shard(given.target.dim() - 1) if probabilities and d == self.classes else p for d, p in enumerate(self.rows)
        ]
        return given._replace(
            input=local(given.input, self.rows, self.rows),
            linear_weight=local(given.linear_weight, self.by_class, of_layer),
            linear_bias=self.placed(given.linear_bias, self.by_class, of_layer),
            target=self.placed(given.target, of_target),
            weight=self.placed(given.weight, self.by_class, self.summed),
        )


def is_batch(placement, input, options):
    """Whether this shards the batch of the layer's input: with `shift` not its positions."""
    return placement.is_shard() and placement.dim < (1 if options.shift else input.dim() - 1)


def check(arguments, options):
    """Raise for what has no loss of shards."""
    input, weight = arguments.input, arguments.linear_weight
    for name, value in (("input", input), ("linear_weight", weight)):
        if not isinstance(value, DTensor):
            raise RuntimeError(f"input and linear_weight must both be DTensors, or neither, got {name} {type(value)}")
    for name, value in {**arguments._asdict(), **options._asdict()}.items():
        if isinstance(value, DTensor) and value.device_mesh != input.device_mesh:
            raise RuntimeError(f"{name} must be a DTensor on the mesh of input, {input.device_mesh}")
    of_classes = [
        classes.is_shard(0) and not is_batch(batch, input, options)
        for batch, classes in zip(input.placements, weight.placements, strict=True)
    ]
    if sum(of_classes) > 1:
        raise NotImplementedError(
            f"the classes of linear_weight must be sharded on one dimension of the mesh, got {weight.placements}"
        )
    if options.process_group is not None:
        raise ValueError("process_group is for plain tensors: a DTensor says where its classes are")
