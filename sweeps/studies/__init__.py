"""Studies: a question, the runs and evaluations that answer it, and claims that get a verdict by rule."""
