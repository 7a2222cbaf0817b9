"""Presentation: blocks, how numbers are written, and the three ways of showing both."""
