"""Training: the client of one model, its order of operations, and the futures of their results."""
