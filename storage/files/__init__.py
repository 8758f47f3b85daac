"""Every file operation of a store."""
