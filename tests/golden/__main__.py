"""`python -m tests.golden DIR`: exit 0 within every tolerance, 1 beyond one, 2 wrong usage, 3 nothing to check in DIR."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.golden.check import check_directory


def main(argv: Sequence[str] | None = None) -> int:
    """Print what `check_directory` found, return its exit code. `argv` None: the process's own arguments."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Check golden pairs against dmpctl.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="holds NAME.weights.safetensors and NAME.tensors.safetensors")
    lines, code = check_directory(parser.parse_args(argv).directory)
    sys.stdout.write("\n".join(lines) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
