"""Plans as immutable values made by pure functions: layouts, shards, schedules, switches, memory, cost."""
