"""What comes with the package: texts, and the toy model of tests and `demo --offline`."""

from pathlib import Path

DATA = Path(__file__).parent
