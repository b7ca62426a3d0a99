"""Applications of the library: the demo and its zoo, experiments, fine-tuning, peers' configs, jobs."""
