"""The page on which a network trains in the reader's browser: what the build puts into it."""

from __future__ import annotations

import json
from pathlib import Path

from ..figures import COLOURS

__all__ = ["EXAMPLES", "digits", "stage_live"]

EXAMPLES = 300
_BASE_17 = "0123456789abcdefg"


def stage_live(stage: Path) -> None:
    """Put the worker, the images and the book's colours into the page of a staged book, if it has that page."""
    page = stage / "book" / "live.html"
    if not page.exists():
        return
    parts = {
        "@NETWORK@": page.with_suffix(".js").read_text(encoding="utf-8"),
        "@DIGITS@": digits(),
        "@COLOURS@": json.dumps(COLOURS),
    }
    text = page.read_text(encoding="utf-8")
    for place, content in parts.items():
        text = text.replace(place, content)
    page.write_text(text, encoding="utf-8")


def digits() -> str:
    """The first images of scikit-learn's digits, a line each: the label, then 64 pixels as digits of base 17."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    lines = zip(images[:EXAMPLES].astype(int), labels, strict=False)
    return "\n".join(f"{label}{''.join(_BASE_17[pixel] for pixel in image)}" for image, label in lines)
