"""Text in and out, shared by every room: JSON lines, journals, command lines and tables."""
