"""Installation of ftdefense; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (HERE / "ftdefense" / "__init__.py").read_text()
).group(1)

TEST = ["pytest>=8,<10", "pytest-xdist>=3.6,<4"]
DEV = [*TEST, "ruff>=0.14,<1", "tensorboardX>=2.6,<3"]

setuptools.setup(
    name="ftdefense",
    version=VERSION,
    description="Defense-aware optimization: fine-tuning defenses, attacks, evaluation",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["ftdefense", "ftdefense.*"]),
    install_requires=[
        "absl-py>=2.1,<3",
        "datasets>=4,<6",
        "flax>=0.12.5,<0.13",
        "jax>=0.10,<0.11",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        # What the field expects beside them.
        "jinja2>=3.1,<4",
        "matplotlib>=3.9,<4",
        "optuna>=5,<6",
        "safetensors>=0.5,<1",
        "scipy>=1.13,<2",
        "threadpoolctl>=3.5,<4",
        "tokenizers>=0.22,<1",
        "tqdm>=4.66,<5",
        "transformers>=5,<6",
    ],
    extras_require={
        "test": TEST,
        "dev": DEV,
        # Independent references; install the CPU build of torch first (README).
        "parity": ["torch>=2.8,<3", "peft>=0.17,<1"],
        "tensorboard": ["tensorboardX>=2.6,<3"],
    },
)
