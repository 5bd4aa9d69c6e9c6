"""`python -m megavl`: the same as the `megavl` command."""

import sys

from megavl.main.cli import main

# megatron-core's checkpoint writer starts a process that imports the main module again.
if __name__ == "__main__":
    sys.exit(main())
