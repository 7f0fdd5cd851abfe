"""The largest numbers that are taken. Beyond them indices and float32 overflow, or plans are never done."""

MOST = 2**31 - 1
"""Of anything that is counted, unless it has a limit of its own below."""
MOST_SEED = MOST_BYTES = 2**63 - 1
MOST_PROCESSES = 1024
"""Of a layout: plans visit every pair of processes."""
MOST_LAYERS = 10_000
MOST_MICROBATCHES = 4096
"""Of a pass of one replica: schedules list every action of each."""
MOST_SEQUENCES = 2**20
"""Of an iteration, or a pass."""
MOST_NAME = 256
"""Characters of what a log or a figure calls something."""
MOST_TOKENS = 2**20
"""Of a prompt or a response."""
SMALLEST, LARGEST = 1e-30, 1e30
"""Of a positive real number: float32 has no others."""
