"""Colours that colour-blind readers tell apart: Okabe and Ito (2008) for curves, cividis for matrices.

Curves also differ by marker and dash, so that a figure survives a black-and-white printer.
"""

from __future__ import annotations

LIGHT = ("#0072B2", "#D55E00", "#007A5A", "#B0568A", "#8F6400", "#333333", "#56B4E9")
DARK = ("#56B4E9", "#FF9A4D", "#3DDC97", "#F0A6CC", "#F0E442", "#DDDDDD", "#9AD0F5")
"""The same hues, lighter: at least 4.5 to 1 against a dark page."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HEAT = "cividis"
CIVIDIS = ("#00204D", "#00336F", "#39486B", "#575C6D", "#707173", "#8A8678", "#A69D75", "#C4B56C", "#FFEA46")
