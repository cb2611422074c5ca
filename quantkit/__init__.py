"""quantkit: a bf16 checkpoint to validated, quantized releases, by recipe."""

__version__ = "0.1.0"
