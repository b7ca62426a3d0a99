"""The learning engine: a driver that takes steps on λ, and the workers that compute gradients."""
