"""Packaging. Pinned versions that were tested together are in constraints.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "coupalign" / "version.py").read_text())[1]

setup(
    name="coupalign",
    version=VERSION,
    description="Distributed training of CoupAlign for referring image segmentation",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["coupalign", "coupalign.*"]),
    package_data={"coupalign.report": ["page.css", "page.js"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "torchvision",
        "timm>=1.0.20,<2",
        "transformers>=5,<6",
        "tokenizers",
        "huggingface_hub",
        "deepspeed>=0.19,<0.20",
        "webdataset>=1.0,<2",
        "mlflow>=3.10,<4",
        "pydantic>=2.7,<3",
        "pyyaml>=6",
        "pycocotools>=2.0.8",
        "safetensors>=0.4",
        "fsspec",
        "requests>=2.32,<3",
        "urllib3>=2.6,<3",
        "numpy>=2",
        "pillow>=11.3",
        "imagehash>=4.3,<5",
        "psutil",
        "simplejpeg>=1.8,<2",
        "tabulate>=0.9,<1",
        "tqdm",
    ],
    extras_require={
        "s3": ["s3fs"],
        "test": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "import-linter",
            "wids",
            "s3fs",
            "moto[s3,server]",
            "triton",
            "playwright",
        ],
    },
    entry_points={"console_scripts": ["coupalign = coupalign.cli.parser:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
)
