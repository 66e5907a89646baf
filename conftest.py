"""Configuration of the whole test run, doctests in the package included."""

from importlib.util import find_spec

from tests._torchvision import declare_operators

declare_operators()

# Collecting doctests imports every module.
collect_ignore_glob = ["fastxkd/train/integrations/*"]
if not find_spec("triton"):
    collect_ignore_glob.append("fastxkd/_triton/*")
