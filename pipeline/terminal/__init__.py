"""The terminal: signals, errors, exit codes, progress and text. Beside cli.py and commands/ only this knows click."""
