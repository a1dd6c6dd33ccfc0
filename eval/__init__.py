"""Scores of trained models: held-out retrieval, MTEB, reports and search."""
