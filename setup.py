import pathlib

from setuptools import find_packages, setup

TEST_PEERS = [
    "pytorch-fid",
    "diffusers",
    "torchmetrics",
    "scikit-learn",
    "pycocotools",
    "cityscapesscripts",
    "transformers",
]

setup(
    name="semantic-diffusion-model",
    version="0.2.0",
    description="SDM: Semantic Image Synthesis via Diffusion Models (arXiv 2207.00050) in PyTorch",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["guided_diffusion", "guided_diffusion.*"]),
    package_data={"guided_diffusion": ["py.typed", "data/palettes/*.csv"]},
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "mpi4py>=4.0",
        "numpy",
        "blobfile>=2.0",
        "safetensors>=0.4.3",
        "Pillow>=10.1",
        "scipy",
        "lpips>=0.1.4",
        "safetensors>=0.4.3",
        "tqdm",
    ],
    extras_require={
        "mpi": ["mpich; sys_platform != 'win32'"],
        "plots": ["matplotlib"],
        "tensorboard": ["tensorboard"],
        "segmenters": ["transformers"],
        "hub": ["huggingface_hub>=0.25"],
        "diffusers": ["diffusers"],
        "coco": ["pycocotools"],
        "cityscapes": ["cityscapesscripts"],
        # setuptools: for a wheel
        "test": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "matplotlib",
            "tensorboard",
            "setuptools>=70.1",
            "huggingface_hub>=0.25",
            *TEST_PEERS,
        ],  # a wheel
    },
)
