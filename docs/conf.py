"""The API reference: `make docs` builds it from the docstrings, warnings are errors."""

from hyperlens import __version__

project = "hyperlens"
author = "hyperlens contributors"
copyright = "hyperlens contributors, MIT licence"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "hyperlens"
exclude_patterns = ["build"]
html_extra_path = ["llms.txt"]

# Signatures keep their shapes as they are written: Float[Tensor, "batch pos d_model"].
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Types stand in the signatures; repeated as text, a shape such as "*sets d" would be emphasis.
napoleon_attr_annotations = False
napoleon_custom_sections = [("Metrics", "params_style"), ("Extras", "params_style")]
napoleon_use_rtype = False
myst_heading_anchors = 3
