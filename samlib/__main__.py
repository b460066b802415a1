"""``samlib`` and ``python -m samlib``: the command line, or what it takes to have it."""

from __future__ import annotations

import sys

from .extras import EXTRAS, remedy

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        from .cli import app

        app()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        command = " ".join(["samlib", *[word for word in sys.argv[1:2] if not word.startswith("-")]])
        print(f"samlib: {remedy(error, command)}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
