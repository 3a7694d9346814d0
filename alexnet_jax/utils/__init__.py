"""Errors, files and processes; knows nothing of AlexNet."""
