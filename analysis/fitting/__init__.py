"""From runs to a fitted law."""
