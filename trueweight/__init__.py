"""The command line, and the wiring behind it: the one package that may import every other one."""

from runtime.version import VERSION

__version__ = VERSION
