"""The maths of merging over tensors, and the registry of methods: no Ray, no files, no models."""
