"""Names missing optional packages in one message, before any work begins."""

from __future__ import annotations

from importlib.util import find_spec

from megavl.config.errors import UsageError


def require(*modules: str, extra: str = "corpus") -> None:
    """Check that modules can be imported, without importing them.

    Raises:
        UsageError: naming those that cannot, and how to install them.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)}: not installed; pip install 'megavl[{extra}]'")
