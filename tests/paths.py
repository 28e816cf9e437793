"""Where the tests find the repository and its golden files."""

from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
GOLDEN_TRAINING = ROOT / "tests" / "golden_training"
