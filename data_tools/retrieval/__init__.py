"""Retrieving images and texts that are like those of a pair; see ``build_retrieval``."""
