"""Compiled parts, one C file a library, called through ctypes (which lets go of the GIL). Each has a fallback."""
