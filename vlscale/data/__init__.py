"""Stores, plans and batches. Knows no model."""
