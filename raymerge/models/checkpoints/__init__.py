"""Reading and writing checkpoints: lazily, safely (no code is ever run), atomically."""
