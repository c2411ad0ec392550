"""The implementations that are compared, one module each: a new file here is a new peer.

A peer's docstring says what its numbers include and what it cannot do, its PEER (see bench/peer.py) how to get it.
Where a package is not installed, or does not take a case, the peer is reported as absent with the reason.

Not here: cut-cross-entropy, and the fused linear losses of PyTorch, Liger and quack. They take the hidden states and
the weights of the last layer, and their time is mostly that of its matrix products; beside losses of given logits
neither their time nor their memory means anything. They are in bench/linear_peers.py.
"""

import importlib
import pkgutil

_MODULES = {found.name: importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)}
PEERS = {name: module.PEER for name, module in _MODULES.items()}
ABOUT = {name: " ".join(module.__doc__.split()) for name, module in _MODULES.items()}
OURS = "xent_ext"
