"""`pipeline init`: two commented configurations to start from, with the schemas that let an editor complete them."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from pipeline.config.schema import MODELS, json_schema
from storage.errors import UsageError


def starter_files() -> dict[str, str]:
    """Return the content of the starter files by name relative to the new directory."""
    templates = files("pipeline.config") / "starter"
    content = {f"{phase}.yaml": (templates / f"{phase}.yaml").read_text(encoding="utf-8") for phase in MODELS}
    return content | {f"schema/{phase}.json": json_schema(phase) for phase in MODELS}


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
