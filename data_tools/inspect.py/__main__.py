"""The former name of `view.py`, kept so that old command lines say where it went.

This is a folder because a file `inspect.py` would shadow the standard library's module in the other programs.
"""

from __future__ import annotations

import sys

print("error: data_tools/inspect.py is now data_tools/view.py; use that name with the same options", file=sys.stderr)
sys.exit(2)
