"""The loops: sampling, and the search for a mode."""
