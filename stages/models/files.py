"""A model on disk: found by directory or hub name, checked, and hashed, without loading a weight; and `quiet` loading.

Data path: configuration -> **model directory** -> identity for the plan, tokenizer, teacher.
"""

from __future__ import annotations

import errno
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.utils import logging

from stages.input_files import FileState, file_sha256, user_path
from storage.errors import UsageError
from storage.files.regular import LARGEST_FILE, kind_of
from storage.values import Json

WEIGHTS = "*.safetensors"
DESCRIPTION = ("*.json", "*.jinja", "*.txt", "tokenizer.model")  # everything but weights


@dataclass(frozen=True, kw_only=True)
class ModelDirectory:
    """A model's directory, the name it was asked for by, and the hub commit if it came from there."""

    directory: Path
    name: str
    commit: str | None = None

    def recorded(self) -> dict[str, Json]:
        """Return what a plan records and never compares: a path may move."""
        return {"name": self.name, "commit": self.commit, "directory": str(self.directory.absolute())}


def find_model(
    name: str, revision: str | None = None, *, weights: bool = True, key: str = "path", fetch: bool = True
) -> ModelDirectory:
    """Return the directory of a model: `name` itself, or the hub's copy in the local cache, downloaded if need be.

    Args:
        weights: fetch and require safetensors weights too; False serves those who need config and tokenizer only.
        key: the configuration key that names the model, for messages.
        fetch: ask the hub. Only for what the user has written: what a store or a run says is never a name to fetch.

    Raises:
        UsageError: no such model, no path, gated, offline, without safetensors weights, or with something else than
            files in it.
    """
    local = user_path(name, key=key)
    if local.is_dir():
        model = ModelDirectory(directory=local, name=name)
    elif not fetch or local.exists() or name.startswith((".", "/", "~")):
        raise UsageError(f"no model directory {name}", where=key, fix="check the path")
    else:
        model = _download(name, revision, weights=weights, key=key)
    for path in sorted(model.directory.iterdir()):
        if not path.name.startswith("."):  # such as the lock of an editor
            require_model_file(path)
    if not (model.directory / "config.json").is_file():
        raise UsageError("no config.json", where=str(model.directory), fix="name a Hugging Face model directory")
    if weights and not list(model.directory.glob(WEIGHTS)):
        raise UsageError(
            "no safetensors weights; other formats can run code when loaded and are not read",
            where=str(model.directory),
            fix="convert once: AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIRECTORY)",
        )
    refuse_hub_kernels(model.directory / "config.json")
    return model


def recorded_model(recorded: Json) -> ModelDirectory:
    """Return the model that a plan or a run has recorded: of this machine, never a name to ask the hub for.

    Raises:
        UsageError: it has recorded no absolute path, or no model is there.
    """
    directory = recorded.get("directory") if isinstance(recorded, dict) else None
    if not isinstance(directory, str) or not Path(directory).is_absolute():
        what = f"what is recorded is no directory of this machine: {directory!r}"
        raise UsageError(what, where="teacher.directory", fix="name the model")
    return find_model(directory, fetch=False)


def require_model_file(path: Path) -> None:
    """Check that what libraries would read of a model is a file, or a link to one as in the hub's cache, of a fit size.

    Raises:
        UsageError: it is something else, or a description larger than any.
    """
    described = any(path.match(pattern) for pattern in DESCRIPTION)
    if not described and not path.match(WEIGHTS):
        return  # no library reads it
    fix = "fetch the model anew, or take away what is there"
    try:
        status = path.stat()
    except OSError as error:
        lost = error.errno in {errno.ENOENT, errno.ELOOP}
        what = "is a link that leads nowhere, not a file" if lost else f"cannot be reached: {error.strerror}"
        raise UsageError(f"{path.name} {what}", where=str(path), fix=fix if lost else "make it readable") from error
    kind, size = kind_of(status.st_mode), status.st_size
    if kind != "a file":
        raise UsageError(f"{path.name} is {kind}, not a file", where=str(path), fix=fix)
    if described and size > LARGEST_FILE:
        raise UsageError(f"{path.name} has {size:,} bytes, too many to be read", where=str(path), fix=fix)


def refuse_hub_kernels(config: Path) -> None:
    """Refuse a configuration that names code of the hub, such as an attention kernel: it would be fetched and run.

    Raises:
        UsageError: `attn_implementation`, or something of the kind, is the name of a repository.
    """
    try:
        content = json.loads(config.read_bytes())
    except (ValueError, RecursionError):
        return  # whoever loads it says what is wrong with it
    for key, value in _texts(content):
        if "implementation" in key and "/" in value:
            raise UsageError(
                f"{key}: {value!r} would be fetched from the hub and run; remote code is never run",
                where=str(config),
                fix=f"take {key} out of the file",
            )


def _texts(content: Json) -> Iterator[tuple[str, str]]:
    """Yield every text in a JSON value with the keys that lead to it."""
    left = [("", content)]
    while left:
        key, value = left.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, dict | list):
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{key}.{name}" if key else str(name), item) for name, item in inside]


def _download(name: str, revision: str | None, *, weights: bool, key: str) -> ModelDirectory:
    patterns = [*DESCRIPTION, WEIGHTS] if weights else list(DESCRIPTION)
    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        fix = f"accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
        raise UsageError(f"model {name!r} is gated", where=key, fix=fix) from error
    except HFValidationError as error:
        raise UsageError(
            f"no model directory {name!r}, and it is not a hub name", where=key, fix="check the path"
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"model {name!r} has no revision {revision!r}", where=key) from error
    except RepositoryNotFoundError as error:
        what = f"no model {name!r} on the hub, and no such directory"
        fix = "check the name; for a private model run `hf auth login`"
        raise UsageError(what, where=key, fix=fix) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise UsageError(
            f"no directory {name!r}; as a hub name it is not in the cache, and the hub cannot be reached",
            where=key,
            fix="give a local directory, or connect once (HF_HUB_OFFLINE must not be 1)",
        ) from error
    return ModelDirectory(directory=directory, name=name, commit=directory.name)


def load_config(model: ModelDirectory) -> PretrainedConfig:
    """Read config.json. Raises UsageError if it is broken, of an unknown architecture, or needs remote code."""
    return _parsed(model.directory / "config.json")


def read_config(path: Path) -> PretrainedConfig:
    """Read a model's configuration from a file outside of a ModelDirectory. Raises UsageError as `load_config`."""
    require_model_file(path)
    refuse_hub_kernels(path)
    return _parsed(path)


def _parsed(path: Path) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except MemoryError:
        raise
    except Exception as error:  # transformers parses a file of the user here, and fails in as many ways as it can
        raise UsageError(
            f"cannot read the model's configuration: {first_line(error)}", where=str(path), fix=_advice_on(path)
        ) from error
    return config


def _advice_on(path: Path) -> str:
    """Say what mends a configuration that transformers does not read: the file, its architecture, or one value."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return "repair the file, or download it again: it is not JSON"
    kind = content.get("model_type") if isinstance(content, dict) else None
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        return "repair that value, or download the file again"
    return (
        f"choose another model, or upgrade transformers if a newer one than {version('transformers')} knows {kind!r}; "
        "code that comes with a model is never run"
    )


def position_limit(model_config: PretrainedConfig) -> int | None:
    """Return how many positions a model knows; None for a model without a limit."""
    text = model_config.get_text_config()
    limits = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    # A model without a limit has none, None or -1 here.
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)


def require_positions(model_config: PretrainedConfig, tokens: int, *, role: str, where: str) -> None:
    """Refuse a model that knows fewer positions than the longest sequence has tokens.

    Args:
        role: what messages call the model.
        where: its directory or configuration key, for messages.

    Raises:
        UsageError: names both numbers.
    """
    limit = position_limit(model_config)
    if limit is not None and tokens > limit:
        raise UsageError(
            f"the longest sequence has {tokens} tokens, the {role} knows {limit} positions",
            where=where,
            fix=f"choose a {role} with at least {tokens} positions, or a store with windows of at most {limit} tokens",
        )


def first_line(error: Exception) -> str:
    """Return what a library says about a failure, in one line, led by its kind where that says more."""
    lines = str(error).strip().splitlines() or [""]
    reason = " ".join(line.strip() for line in (lines[:2] if lines[0].endswith(":") else lines[:1]))
    return reason if " " in reason else f"{type(error).__name__} {reason}".strip()


def file_hashes(model: ModelDirectory) -> dict[str, str]:
    """Return sha256 (hex) of config.json, of every weight file and of their index, by name."""
    return {path.name: file_sha256(path) for path in _content(model)}


def file_states(model: ModelDirectory) -> tuple[FileState, ...]:
    """Return the state of the same files: taken before hashing, it tells whether what is loaded is what was hashed."""
    return tuple(FileState.of(path) for path in _content(model))


def _content(model: ModelDirectory) -> list[Path]:
    found = [*model.directory.glob(WEIGHTS), *model.directory.glob("*.safetensors.index.json")]
    return sorted([model.directory / "config.json", *found])


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' bars, log messages below errors, and warnings; then restore what was set."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
