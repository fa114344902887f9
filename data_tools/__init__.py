"""Tools that build datasets, each run as ``python -m data_tools.NAME``."""
