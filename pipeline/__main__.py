"""`python -m pipeline`: the same as the console script `pipeline`."""

from __future__ import annotations

from pipeline.cli import main

if __name__ == "__main__":
    main(prog_name="pipeline")
