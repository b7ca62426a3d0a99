"""One run: from a config to an output folder."""
