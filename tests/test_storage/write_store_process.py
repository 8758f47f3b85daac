"""Run as a program: write the synthetic store at argv[1], as a worker that may be killed anywhere."""

import sys
from pathlib import Path

import storage_cases as cases

if __name__ == "__main__":
    cases.write_store(Path(sys.argv[1]))
