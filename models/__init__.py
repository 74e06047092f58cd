"""What is trained: the transformer, its sizes and its FLOPs. Imports nothing else of this project."""
