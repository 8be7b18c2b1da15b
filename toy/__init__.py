"""A language small enough to judge exactly, and the paper in miniature on it."""
