"""Hooked models: one surface for all kinds, `ResidualModel`, loading and the parity check."""
