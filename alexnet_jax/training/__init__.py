"""The train step and what it needs."""
