"""The weight transplant: whole parts of one model in the other."""
