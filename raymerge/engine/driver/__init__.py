"""The driver: the loops that learn λ from the gradients of a group of workers."""
