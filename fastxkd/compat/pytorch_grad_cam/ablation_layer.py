"""Which axis of a layer's output :class:`AblationCAM` takes channels from."""

from __future__ import annotations


class AblationLayer:
    """Channels on the second axis, ``[n, channels, ...]``."""

    axis = 1


class AblationLayerVit(AblationLayer):
    """Channels on the last axis, ``[n, tokens, channels]``."""

    axis = -1
