"""The typed description of a run, and its resolution into a plan."""
