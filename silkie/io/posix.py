"""What training and the loop need of a POSIX system: locks on files that end with their process, and limits."""

try:
    import fcntl
    import resource
except ImportError as error:  # Windows
    raise ImportError(
        "silkie trains on Linux and macOS: it locks its output directory with POSIX file locks, which this system"
        " lacks. On Windows use WSL 2 (examples/install.md)."
    ) from error

__all__ = ["fcntl", "resource"]
