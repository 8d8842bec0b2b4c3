"""Measurements too slow for the test suite, each with a command; results go to ``results/``."""
