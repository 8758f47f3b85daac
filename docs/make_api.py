"""What is written from the code: docs/api.md, the index of what is public, and configs/schema. `make api` runs it.

Public is what the modules below define under a name without an underscore (or list in `__all__`). Everything else may
change at any time.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from pipeline.config.schema import MODELS, json_schema

MODULES = (
    "pipeline.extract",
    "pipeline.train",
    "pipeline.evaluate",
    "pipeline.generate",
    "pipeline.export",
    "pipeline.inspect",
    "pipeline.config.loading",
    "stages.losses",
    "storage.reader",
    "storage.writer",
    "storage.plan",
    "storage.target",
    "storage.rows",
    "storage.errors",
    "storage.files",
    "storage.codecs",
    "storage.exchange.arrow",
    "storage.exchange.jsonl",
    "storage.tools.status",
    "storage.tools.verify",
    "storage.tools.repair",
    "storage.tools.gc",
    "storage.tools.diff",
    "storage.tools.convert",
)
HEAD = """# Public interface

Made by `make api`; a test keeps it current. Each docstring tells shapes, units and errors.
Configurations are documented by `pipeline schema extract` and `pipeline schema train`, the store by
[storage/FORMAT.md](../storage/FORMAT.md).
"""


def index() -> str:
    """Return the content of docs/api.md."""
    lines = (line for name in MODULES for line in _module_lines(importlib.import_module(name)))
    return "\n".join([HEAD, *lines])


def _module_lines(module: ModuleType) -> Iterator[str]:
    yield f"## {module.__name__}\n"
    yield f"{_first_sentence(module)}\n"
    for name, value in _public(module):
        if inspect.isclass(value):
            yield f"* class `{name}`: {_first_sentence(value)}"
            for method, function in vars(value).items():
                function = function.__func__ if isinstance(function, classmethod | staticmethod) else function
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"    * `{method}{_parameters(function)}`: {_first_sentence(function)}"
        else:
            yield f"* `{name}{_parameters(value)}`: {_first_sentence(value)}"
    yield ""


def _public(module: ModuleType) -> Iterator[tuple[str, type]]:
    listed = getattr(module, "__all__", None)
    for name in listed or vars(module):
        value = getattr(module, name)
        own = listed is not None or getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
            yield name, value


def _parameters(function: object) -> str:
    """Return the names alone: types and defaults are in the code."""
    parts: list[str] = []
    for parameter in inspect.signature(function).parameters.values():  # type: ignore[arg-type]
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        if parameter.name not in ("self", "cls"):
            parts.append(f"{star}{parameter.name}")
    return f"({', '.join(parts)})"


def _first_sentence(documented: object) -> str:
    """Return the first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


if __name__ == "__main__":
    folder = Path(__file__).parent
    (folder / "api.md").write_text(index())
    for phase in MODELS:
        (folder.parent / "configs/schema" / f"{phase}.json").write_text(json_schema(phase))
