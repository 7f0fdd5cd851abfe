"""Many runs: the experiments of the figures, what they need, and running them one after another."""
