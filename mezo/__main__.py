"""`python -m mezo`, and `torchrun -m mezo train`: the command line."""

import sys

from mezo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
