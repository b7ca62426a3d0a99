"""The only room that imports Ray: it connects, places and calls workers, and maps tasks."""
