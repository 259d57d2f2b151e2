"""Read by Python as it starts, where this folder is on its path: the emulated device, if EMU_LIB names it."""

import os

if os.environ.get("EMU_LIB"):
    import emu  # noqa: F401
