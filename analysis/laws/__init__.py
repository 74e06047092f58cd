"""The laws, as formulas with units, and the published ones."""
