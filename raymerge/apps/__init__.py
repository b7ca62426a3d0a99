"""Applications built on a run: the demo and its zoo, experiments, fine-tuning, peers, jobs."""
