"""Talking to trained models: `scaling chat`, as a page on loopback (server.py, page.html) or in the terminal."""
