"""The layer sweep: one block's activation of one model put into the other."""
