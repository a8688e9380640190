"""`python -m dmpctl`."""

from dmpctl.cli.app import main

if __name__ == "__main__":
    raise SystemExit(main())
