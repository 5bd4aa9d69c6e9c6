"""The released client, unmodified: package `deepseek_vl` as a wheel of another project carries it.

deepseek-ai/DeepSeek-VL is not on PyPI; `xinference` 0.14.4 vendors its package at commit 681bffb. Only that folder is
taken out of the wheel, and nothing of it is kept. `make test-clients` sets up what the tests need and runs them.

torchvision may be of another build than torch; see conftest.py.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

VARIABLE = "MEGAVL_RELEASED_CLIENT"
SHA256 = "4621d6e6d3f4d309cd0160cf0035f1999e60c734e1ca6d7c01e3b50023980b71"
PACKAGES = ("attrdict", "einops", "six", "timm", "torchvision")
_FOLDER = "xinference/thirdparty/deepseek_vl/"


def why_absent() -> str | None:
    """Why the client cannot run here; None when it can."""
    if not os.environ.get(VARIABLE):
        return f"{VARIABLE} does not name the wheel of xinference 0.14.4 (see tests/numerics/released_client.py)"
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"the released client needs {', '.join(missing)}" if missing else None


def import_client(folder: Path) -> ModuleType:
    """Unpack the package below `folder` and import its models; the wheel is the one whose hash is pinned here."""
    wheel = Path(os.environ[VARIABLE])
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert found == SHA256, f"{wheel} has sha256 {found}, expected {SHA256}: is it xinference 0.14.4?"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(_FOLDER) and not name.startswith(_FOLDER + "serve/"):
                archive.extract(name, folder)
    sys.path.insert(0, str(folder / Path(_FOLDER).parent))
    try:
        return importlib.import_module("deepseek_vl.models")
    finally:
        sys.path.pop(0)
