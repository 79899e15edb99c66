"""The scripts, and the programs in extras/, for the tests in this folder to import."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "extras")]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # beside other work, more threads take longer
