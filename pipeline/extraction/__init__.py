"""How phase 1 is done: survey, plan and estimate, the work on a shard, and the events that tell of it."""
