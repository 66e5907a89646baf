"""Configuration of the whole test run, doctests in the package included."""

from tests._torchvision import declare_operators

declare_operators()
