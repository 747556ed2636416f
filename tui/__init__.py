"""The terminal interface; installs as ``localvlm.tui``."""
