"""Figures as people read them."""


def size_text(size_bytes: int) -> str:
    """A size in decimal units as the Hub shows them."""
    if size_bytes < 1e5:
        return f"{size_bytes / 1e3:.2f} kB"
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.2f} MB"


def duration_text(seconds: float) -> str:
    """A rough duration in the unit that says it in few digits."""
    for least, unit, name in ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "h"), (120, 60, "min")):
        if seconds >= least:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"
