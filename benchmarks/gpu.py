"""What one GPU is asked within ten minutes: its tests, the SVD of a whole model, starts and steps.

python benchmarks/gpu.py [--device cuda] [--log gpu.log]

Each part runs in a process of its own with a limit, so that one that hangs costs the others
nothing. The lines go to the log as they come; the last ones say what ran, for how long, and how it
ended. Its figures belong in docs/performance.md, with the card and the commit. `--device cpu` tries
the script itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SMALL = ["--layers", "1", "--hidden", "512", "--intermediate", "1376", "--rank", "32"]
"""Of svd_model, on a processor."""


def parts(device: str) -> dict[str, tuple[list[str], int]]:
    """Command and most seconds of each part."""
    size = SMALL if device == "cpu" else []
    tests = ["-m", "pytest", "-q", str(HERE.parent / "tests/test_gpu.py")]
    steps = ["--device", device, "--hidden", "512" if device == "cpu" else "2048"]
    return {
        "tests": (tests, 300),
        "svd_model": ([str(HERE / "svd_model.py"), "--device", device, *size], 120),
        "start and step": ([str(HERE / "step.py"), *steps], 120),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--log", type=Path, default=Path("gpu.log"))
    options = parser.parse_args()
    ended = []
    with options.log.open("w", encoding="utf-8") as log:
        for name, (command, limit) in parts(options.device).items():
            log.write(f"== {name}\n")
            log.flush()
            began = time.monotonic()
            words = [sys.executable, *command]
            try:
                run = subprocess.run(words, stdout=log, stderr=log, timeout=limit, check=False)
                how = "ended well" if run.returncode == 0 else f"ended with {run.returncode}"
            except subprocess.TimeoutExpired:
                how = f"was stopped after {limit} s"
            ended.append(f"{name}: {how}, {time.monotonic() - began:.0f} s")
        log.write("\n".join(["== all", *ended]) + "\n")
    print(options.log.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
