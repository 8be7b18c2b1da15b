"""What the six files stand on, and no reader of the paper needs."""
