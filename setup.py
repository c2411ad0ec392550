"""Packaging of xent_ext: metadata, dependencies, and where the folder kernels/ is imported from."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "xent_ext" / "__init__.py").read_text(), re.M)[1]

TEST = ["pytest>=7", "hypothesis>=6", "expecttest", "numpy", "build", "setuptools>=69", "wheel"]
BENCH = ["numpy", "matplotlib", "scikit-learn", "tqdm"]

setup(
    name="xent_ext",
    version=VERSION,
    description="Fused softmax cross-entropy for PyTorch: a drop-in for torch.nn.CrossEntropyLoss over Triton kernels",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # A top-level module `kernels` would collide with a well-known package of that name.
    packages=["xent_ext", "xent_ext.kernels"],
    package_dir={"xent_ext": "xent_ext", "xent_ext.kernels": "kernels"},
    package_data={"xent_ext": ["py.typed"]},
    install_requires=["torch>=2.6", 'triton>=3.2; platform_system == "Linux"'],
    extras_require={"test": [*TEST, *BENCH], "bench": BENCH},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
