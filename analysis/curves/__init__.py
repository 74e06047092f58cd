"""Laws of whole loss curves."""
