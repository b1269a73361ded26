"""Preference groups -> the tensors of one forward pass."""
