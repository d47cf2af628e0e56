"""Packaging of vitriton: the folders kernels/ and vit/ are installed as vitriton.kernels and vitriton.vit.

The names `kernels` and `vit` belong to other projects on PyPI, hence the `vitriton` namespace. Everything here is
static: nothing is probed at install time, and triton is asked for only where it exists.
"""

from pathlib import Path

from setuptools import setup

DEMO = ["scikit-learn", "matplotlib", "Pillow", "rich"]
BENCH = ["matplotlib", "rich", "timm", "onnx", "onnxscript", "onnxruntime", "openvino"]
TEST = ["pytest", "pytest-benchmark", "hypothesis", "numpy"]
INTEGRATIONS = ["timm", "transformers", "torchvision", "vit-pytorch", "open_clip_torch"]

setup(
    name="vitriton",
    version="0.1.0",
    description="Fused Triton kernels for Vision Transformers, as drop-in modules, forward and backward, GPU and CPU",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=["vitriton.kernels", "vitriton.vit", "vitriton.vit.bench", "vitriton.vit.integrations"],
    package_dir={
        "vitriton.kernels": "kernels",
        "vitriton.vit": "vit",
        "vitriton.vit.bench": "vit/bench",
        "vitriton.vit.integrations": "vit/integrations",
    },
    package_data={"vitriton.kernels": ["*.cpp", "*.h", "py.typed"], "vitriton.vit": ["py.typed"]},
    install_requires=["torch>=2.9", "einops>=0.7", 'triton>=3.5; sys_platform == "linux"'],
    extras_require={
        "demo": DEMO,
        "bench": BENCH,
        "test": TEST,
        "integrations": INTEGRATIONS,
        "dev": DEMO + TEST + INTEGRATIONS + ["ruff"],
    },
    entry_points={"console_scripts": ["vitriton = vitriton.vit.cli:command"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
