"""`python -m dmpctl`."""

from dmpctl.cli.app import entry

if __name__ == "__main__":
    entry()
