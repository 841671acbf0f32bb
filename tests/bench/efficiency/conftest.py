"""Makes `hand_made.py` importable: tests/ is no package, on purpose."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
