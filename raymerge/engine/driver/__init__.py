"""The driver: the loops that learn λ by asking a group of workers."""
