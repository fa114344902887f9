"""Attention over packed sequences and inexact proximal optimal transport, each with interchangeable backends."""
