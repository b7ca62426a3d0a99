"""The papers' experiments, each one config and one command, on any world."""
