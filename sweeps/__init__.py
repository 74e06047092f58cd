"""Which runs there are and where they execute."""
