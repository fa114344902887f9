"""vlscale: pre-training of region-based vision-language Transformers at cluster scale."""

__version__ = "0.1.0"
