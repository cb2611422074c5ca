"""Figures as people read them."""


def size_text(size_bytes: int) -> str:
    """A size in decimal units as the Hub shows them."""
    if size_bytes < 1e5:
        return f"{size_bytes / 1e3:.2f} kB"
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.2f} MB"
