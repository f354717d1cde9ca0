"""Experiments: what training under the losses does, measured on held-out text.

    python -m experiments.run repetition

The model, the data and the optimizer are the trainer's, whose modules are imported by
folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
