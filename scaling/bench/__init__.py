"""Speed and memory of the training engine, measured: `scaling bench`."""
