"""Packaging of xent_ext: metadata, dependencies, and where the folder kernels/ is imported from."""

import re
from pathlib import Path

from setuptools import setup


def read(name):
    return (Path(__file__).resolve().parent / name).read_text(encoding="utf-8")


VERSION = re.search(r'^__version__ = "(.+)"$', read("xent_ext/__init__.py"), re.M)[1]

BENCH = ["numpy", "matplotlib", "scikit-learn", "tqdm"]
INTEGRATION = ["transformers>=5", "accelerate>=1", "lightning>=2.5", "peft>=0.17"]
TEST = [
    *BENCH,
    "pytest>=7",
    "pytest-xdist>=3.2",
    "hypothesis>=6",
    "expecttest",
    "mypy>=1.16",
    "build",
    "setuptools>=77",
    "wheel",
    "ruff",
]

setup(
    name="xent_ext",
    version=VERSION,
    description="Fused softmax cross-entropy for PyTorch: a drop-in for torch.nn.CrossEntropyLoss over Triton kernels",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # A top-level module `kernels` would collide with a well-known package of that name.
    packages=["xent_ext", "xent_ext.kernels"],
    package_dir={"xent_ext": "xent_ext", "xent_ext.kernels": "kernels"},
    package_data={"xent_ext": ["py.typed"]},
    install_requires=["torch>=2.8", 'triton>=3.4; platform_system == "Linux"'],
    extras_require={"test": TEST, "bench": BENCH, "integration": INTEGRATION},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: OS Independent",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
