"""Images: their sources, the ones that a step uses, and their decoded copies in memory."""
