"""Transformer Engine's parallel_cross_entropy with reduce_loss=True, without a process group.

Includes its waits for the device. Takes (batch, tokens, C) in float32 and bfloat16 on GPUs; (N, C) is given to it as
(1, N, C), a view. Some versions write the gradient over the logits, so that each call gets fresh ones, copied back
outside of the time.

Moves 2 + 1 copies of the logits: forward reads them, backward reads them and writes the gradient, over the logits.
Versions that do otherwise are shown as differing from this model.
"""

from ..peer import Peer, copies, named


def load():
    function = named("transformer_engine.pytorch.cross_entropy", "parallel_cross_entropy")

    def loss(logits, target):
        return function(logits.unsqueeze(0), target.unsqueeze(0), 0.0, True)

    return loss


PEER = Peer(
    load=load,
    moved=lambda case: copies(case, 2, 1, 0),
    devices=("cuda",),
    dtypes=("float32", "bfloat16"),
    writes_logits=True,
)
