"""Texts: reading them, token ids, batches."""
