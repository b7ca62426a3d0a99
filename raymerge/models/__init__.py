"""Models: which one a config names, its weights, its encoder over a flat vector, and its heads."""
