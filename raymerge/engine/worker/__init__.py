"""A worker: one process's shard of the task vectors and examples, and its computations on them."""
