"""Pure tensor maths of merging: no Ray, no files, no models."""
