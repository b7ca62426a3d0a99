"""A worker: one process's part of the task vectors and examples, and what it computes from them."""
