"""Packaging: what is installed, and which extras bring what."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "cxr_tf" / "__init__.py").read_text(encoding="utf-8")).group(1)

CV = ["keras-cv>=0.9"]
HUB = ["keras-hub>=0.20"]
DICOM = ["python-gdcm>=3.0.24", "highdicom>=0.25"]
SERVING = ["grpcio>=1.60"]

setup(
    name="cxr-tf",
    version=VERSION,
    description="Pre-train, fine-tune, judge and deploy chest-radiograph models with Keras 3 and TensorFlow",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["cxr_tf*", "export*"]),
    package_data={"cxr_tf": ["py.typed", "evaluate/*.toml", "evaluate/*.html"]},
    python_requires=">=3.11,<3.14",
    install_requires=[
        "ai-edge-litert>=2.0",
        "flatbuffers>=24.3",
        "google-crc32c>=1.5",
        "imagehash>=4.3",
        "jinja2>=3.1",
        "keras>=3.10",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "onnx>=1.16.1",
        "onnxruntime>=1.20",
        "pandas>=2.2",
        "pillow>=10.3",
        "protobuf>=4.25",
        "pydantic>=2.9",
        "pydicom>=3.0",
        "pylibjpeg>=2.0",
        "pylibjpeg-openjpeg>=2.3",
        "pylibjpeg-rle>=2.0",
        "rich>=13.7",
        "scikit-image>=0.25",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tensorflow>=2.19",
        "tf2onnx>=1.16.1",
        "threadpoolctl>=3.1",
        "typer>=0.15",
    ],
    extras_require={
        "gpu": ["tensorflow[and-cuda]>=2.19"],
        "cv": CV,
        "hub": HUB,
        "dicom": DICOM,
        "serving": SERVING,
        "tracking": ["tensorboard>=2.19", "mlflow>=2.20"],
        "bench": ["torch==2.14.1", "torchvision==0.29.1", "lightly==1.6.0"],
        "test": [
            *CV,
            *DICOM,
            *HUB,
            *SERVING,
            "hypothesis>=6.100",
            "mypy>=1.13",
            "pandas-stubs>=2.2",
            "pytest>=8.2",
            "pytest-xdist>=3.6",
            "pyyaml>=6.0",
            "ruff>=0.8",
            "tensorflow-serving-api>=2.19",
        ],
    },
    entry_points={
        "console_scripts": [
            "cxr-tf = cxr_tf.cli:main",
            "cxr-tf-client = export.serving.client:main",
            "cxr-tf-edge = export.edge.__main__:main",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Healthcare Industry",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
