"""Measurements on real devices: training, generation, switching, and checks of what a CPU cannot show."""
