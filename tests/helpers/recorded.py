"""What is recorded in benchmarks/results, and the pages that quote it."""

import json
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
README, PAGE, METHODS, HOW_TO, COMPARING = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/benchmarks.md", "docs/methods.md", "docs/how-to.md", "docs/comparing.md")
)
RESULTS_DIR = ROOT / "benchmarks" / "results"
RESULTS = {path.stem: json.loads(path.read_text()) for path in RESULTS_DIR.glob("*.json")}
