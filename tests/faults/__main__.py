"""`python -m tests.faults [--tries 200] [--seed 0] [--only PHASE] [--out FILE.md]`: see tests/faults/campaign.py."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.faults.campaign import Row, campaign, table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", help="one phase: 'fid', 'sampling', ...")
    options = parser.parse_args()

    def report(row: Row) -> None:
        sys.stderr.write(f"{row}\n")

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        rows = campaign(options.tries, options.seed, Path(folder), report, options.only)
    text = table(rows)
    sys.stdout.write(text + "\n")
    if options.out is not None:
        options.out.write_text(text + "\n", "utf-8")
    return int(any(row.survived < row.tries or row.equal < row.ends for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
