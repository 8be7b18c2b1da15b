"""The benchmark: its tasks, metrics, judges and reports."""
