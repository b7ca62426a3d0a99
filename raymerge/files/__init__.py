"""Files on disk and behind URLs, threads and progress: what every other room may use."""
