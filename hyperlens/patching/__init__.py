"""Causality: put activations or weights of one model of a pair into the other."""
