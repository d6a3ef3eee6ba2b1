"""What the launcher says to people."""

import sys


def say(message: str) -> None:
    """Print one line at once, marked as the launcher's."""
    print(f"gmscale launch: {message}", file=sys.stderr, flush=True)
