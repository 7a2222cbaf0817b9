"""Layer x position: at which layer, and from which token, a changed decision comes."""
