"""Images: where they are, which ones a step uses, and the uint8 cache that pins them."""
