"""Results: tables that save and load, and the files they are written to."""
