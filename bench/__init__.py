"""Measurements of xent_ext beside PyTorch's own loss: `python -m bench --help` lists them.

Needs the `bench` extra: `pip install -e ".[bench]"`.
"""

import os

# Without this PyTorch's profiler, which counts the memory on a CPU, writes its own log between our lines. It
# reads the variable when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
