"""The sections of the page, one file each; see `hyperlens.report`."""
