"""lorasft: 4-bit base, LoRA adapters, masked-label SFT, and a merge back into full weights."""

__version__ = "0.1.0"
