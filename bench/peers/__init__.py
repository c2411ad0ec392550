"""The implementations that `python -m bench run` compares, one module each: a new file here is a new peer.

A peer has INCLUDES, a sentence on what its numbers include, and load(), which returns a function of (logits, target)
with the mean loss as its result. load() may raise whatever says why the peer cannot run here.
"""

import importlib
import pkgutil

PEERS = {found.name: importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)}
OURS = "xent_ext"
