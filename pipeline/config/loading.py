"""Configuration file and `--set` arguments -> a validated model, or one error that names file, line, key and remedy.

Data path: **YAML -> config** -> plan -> shards, and **YAML -> config** -> store -> student.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config.extract import ExtractConfig
from pipeline.config.overrides import apply_overrides
from pipeline.config.problems import ConfigSource, explain, shown
from pipeline.config.train import TrainConfig
from stages.yaml_text import MAX_BYTES, Located, parse
from storage.errors import StorageUnavailableError, UsageError

M = TypeVar("M", bound=BaseModel)


def load_extract(path: Path, overrides: Sequence[str] = ()) -> ExtractConfig:
    """Load the configuration of `pipeline extract`. Raises UsageError."""
    return load(ExtractConfig, path, overrides)


def load_train(path: Path, overrides: Sequence[str] = (), *, most: int = MAX_BYTES) -> TrainConfig:
    """Load the configuration of `pipeline train`. Raises UsageError."""
    return load(TrainConfig, path, overrides, most=most)


def load(model: type[M], path: Path, overrides: Sequence[str] = (), *, most: int = MAX_BYTES) -> M:
    """Read a YAML file, lay `overrides` over it, and validate it as `model`.

    Args:
        model: what the file must describe.
        path: YAML file.
        overrides: `section.key=value`, the later one wins.
        most: bytes that it may have. What a run writes may be longer than what it was given: defaults are spelled out.

    Raises:
        UsageError: the file is missing, is not a YAML mapping, or does not describe a `model`.
        StorageUnavailableError: the file cannot be read.
    """
    located = _read(path, most)
    values: dict[str, Any] = located.values
    source = ConfigSource(
        name=str(path), lines=located.lines, origins=apply_overrides(values, overrides), values=values
    )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explain(error, model, source) from None


def _read(path: Path, most: int) -> Located:
    name = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise UsageError(f"more than {most:,} bytes is too long for a configuration", where=name)
        text = data.decode()
    except FileNotFoundError:
        fix = "pipeline init writes one to start from"
        raise UsageError("there is no such configuration file", where=name, fix=fix) from None
    except IsADirectoryError:
        raise UsageError("a configuration is a YAML file, this is a directory", where=name) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: {error.reason}", where=f"{name}, byte {error.start}") from None
    except OSError as error:
        raise StorageUnavailableError(f"cannot read the configuration: {error.strerror}", where=name) from error
    located = parse(text, name=name)
    if not isinstance(located.values, dict):
        found = "a list" if isinstance(located.values, list) else shown(located.values)
        raise UsageError(
            f"a configuration is a mapping of keys to values, found {found}",
            where=f"{name}:1",
            fix="write lines of the form `key: value`; pipeline init writes an example",
        )
    return located
