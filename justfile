# `just --list` shows these; each is a plain command that works without just, too.

# Make a virtual environment with everything that tests need
setup:
    python3 -m venv .venv
    .venv/bin/python -m pip install -e '.[test]'

# README's test command
test:
    python -m pytest

# Stop at the first failure, last failures first: for work in progress
test-fast *ARGS:
    python -m pytest -x --ff {{ARGS}}

# The slow stage of CI
test-slow:
    python -m pytest -m slow

lint:
    ruff check dmpctl tests benchmarks examples
    ruff format --check dmpctl tests benchmarks examples

types:
    mypy

# Rooms, files, lines and order of the package
house:
    python -m tests.house

# Timings: `just bench steps sampling`; all parts without a name
bench *PARTS:
    python -m benchmarks.bench {{PARTS}}

# Reference tensors of the published code
golden:
    python -m tests.golden tests/golden

# Read the help of every command
docs:
    for command in "" download pretrain patch sample fid compare inspect-gates report push import export doctor; do dmpctl $command --help; done

# All that CI runs, in a fresh environment
ci:
    bash .ci/run
