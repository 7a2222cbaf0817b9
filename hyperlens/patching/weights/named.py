"""What the parts of a model that are no blocks are called."""

from __future__ import annotations

NAMED = ("embedding", "final_norm", "unembedding")
"""In this order; "embedding" is whatever else there is, positions included."""
