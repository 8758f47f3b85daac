"""`pipeline init`: two commented configurations to start from, with the schemas that let an editor complete them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from storage.errors import UsageError

PHASES = ("extract", "train")


def starter_files() -> dict[str, str]:
    """Return the content of the starter files by name relative to the new directory.

    The schemas are those of configs/schema, which a test keeps current: to make them anew would load torch.
    """
    starter = files("pipeline.config") / "starter"
    names = [f"{phase}.yaml" for phase in PHASES] + [f"schema/{phase}.json" for phase in PHASES]
    return {name: (starter / name).read_text(encoding="utf-8") for name in names}


def write_starter(directory: Path) -> list[Path]:
    """Write the starter files into `directory`, which is made if missing, and return their paths.

    Raises:
        UsageError: one of the files exists already; nothing is written then.
    """
    content = {directory / name: text for name, text in starter_files().items()}
    taken = [path for path in content if path.exists()]
    if taken:
        raise UsageError(
            f"{taken[0].name} exists already and is never overwritten",
            where=str(taken[0]),
            fix="name an empty directory: pipeline init DIR",
        )
    for path, text in content.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    return list(content)
