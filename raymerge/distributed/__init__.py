"""The only place that imports Ray: connecting, placing workers, calling them, mapping tasks."""
