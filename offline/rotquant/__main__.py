"""`python -m rotquant`."""

import sys

from rotquant.cli import main

# vLLM starts its engine with multiprocessing's spawn, which imports this module again.
if __name__ == "__main__":
    sys.exit(main())
