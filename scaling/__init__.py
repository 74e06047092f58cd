"""How one run is trained: data, optimiser, mesh, loop, checkpoint."""
