"""The example's files import each other as a script's neighbours do; the tests put their folder on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "smollm2"))
