"""patch_expansion: is it the extra dimensions? Take them away, or bring them about, and judge."""
