"""Lets torchvision be imported beside a torch of another build, as far as the tests here use it.

PyPI has torchvision for CUDA alone. Beside a torch for the CPU its operators cannot be loaded, and its import stops at
two of them. No client here calls one: torch itself resizes pixels.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

_DECLARED: list[torch.library.Library] = []
"""A declaration lives as long as its library."""


def pytest_configure() -> None:
    """Declare the operators that the import of torchvision names, where torchvision cannot load them."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
