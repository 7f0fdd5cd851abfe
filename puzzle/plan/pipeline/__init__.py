"""Pipeline schedules: actions, their builders, transfers between stages, and the check of all."""
