"""Learning from examples: what is learned (`objectives.py`), steps (`step.py`), a run (`trainer.py`)."""
