"""Files on disk and behind URLs, threads and progress, for all other rooms."""
