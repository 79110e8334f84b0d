"""More commands, beside training and measuring: python -m tools.NAME, from the folder of the repository."""
