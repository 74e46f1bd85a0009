"""Arithmetic that two or more variants share."""
