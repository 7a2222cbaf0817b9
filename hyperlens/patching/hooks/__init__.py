"""Put activations in, at any site, while a model reads or writes."""
