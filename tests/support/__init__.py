"""Tiny models, processors and data that the tests build from config (no hub)."""
