"""The norm question: how much of a terminal expansion is block, how much final norm."""
