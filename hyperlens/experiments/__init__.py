"""Experiments on a pair of models; each returns a `Result`."""
