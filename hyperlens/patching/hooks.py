"""Hooks for code of your own: record, patch and change activations, also while text is generated.

They are made in `hyperlens.hooks`, where experiments find them, too.
"""

from ..hooks.patched_generation import changing as changing
from ..hooks.patched_generation import donating as donating
from ..hooks.patching import patch_hooks as patch_hooks
from ..hooks.patching import record as record
from ..hooks.sites import Site as Site
from ..hooks.sites import in_blocks as in_blocks
