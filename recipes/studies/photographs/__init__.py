"""Preference training on real weights and real photographs: see README.md beside this file."""
