"""What every room stands on: command lines, finished folders, recipes, model references."""
