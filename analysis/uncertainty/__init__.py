"""How sure a fit is: bootstrap, profiles, coverage."""
