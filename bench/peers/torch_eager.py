"""torch.nn.functional.cross_entropy, called as most training scripts do.

Includes everything: log-softmax and its selection forward, both gradients backward. Takes all dtypes and layouts.

Moves 3 + 3 copies of the logits: forward reads the logits and writes their log-softmax; backward writes a gradient
of zeros with one value a row, reads it and the log-softmax, and writes the gradient. Those three are held at once.
"""

import torch.nn.functional as F

from ..peer import Peer, copies

PEER = Peer(load=lambda: F.cross_entropy, moved=lambda case: copies(case, 3, 3, 3), images=True)
