"""Figures that cost nothing: to draw one takes longer than a short training."""

from contextlib import contextmanager

import pytest
from matplotlib.figure import Figure

from autowu import plotting


@contextmanager
def blank():
    """Leave the figures of train.py's runs blank."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("draw_run", "draw_layers"):
            patch.setattr(plotting, name, lambda *_, **__: Figure())
        yield
