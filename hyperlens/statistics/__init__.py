"""Pure functions: distances, participation ratio, intervals, tests."""
