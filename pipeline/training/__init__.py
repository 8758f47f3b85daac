"""How phase 2 is done: data, recipe, processes, dry run, and the events that tell of it."""
