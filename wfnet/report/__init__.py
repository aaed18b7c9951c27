"""The report of a run: one HTML page that loads nothing, and its figures."""
