"""JSON Schema of the configurations, for editors and for machines that write configurations."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import BaseModel

from pipeline.config.extract import ExtractConfig
from pipeline.config.train import TrainConfig

Phase = Literal["extract", "train"]
MODELS: dict[Phase, type[BaseModel]] = {"extract": ExtractConfig, "train": TrainConfig}


def json_schema(phase: Phase) -> str:
    """Return the JSON Schema (draft 2020-12) of a phase's configuration file, indented, ending in a newline."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **MODELS[phase].model_json_schema()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
