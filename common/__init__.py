"""Foundations of all packages: command lines, finished folders, recipes, model references."""
