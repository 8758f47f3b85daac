"""The demo: its settings, its teacher, its run, and how its students compare."""
