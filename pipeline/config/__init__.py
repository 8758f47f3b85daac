"""Typed configuration of both phases: models, loading with overrides, JSON Schema."""
