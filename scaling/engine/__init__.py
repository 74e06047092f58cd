"""How a run is trained: compiled programs, the loop around them, checkpoints, the devices."""
