"""The streaming pass over the texts, its memory plan, and the logits it shares between probes."""
