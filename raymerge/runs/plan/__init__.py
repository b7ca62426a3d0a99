"""The plan of a run: every check that needs only headers and listings, and the estimates."""
