"""The one style of all plots: colours, dashes, markers and matplotlib's settings; data alone.

Colours are Okabe and Ito's, safe for the colour-blind; those that would be pale on white are darker
here: each is at least 3:1 against it. No plot rests on colour alone: a series has dashes and a
marker of its own. `v4jax/analysis` draws with matplotlib, `v4jax/launching` writes SVG; what both
draw looks alike.
"""

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, OCHRE = "#A64D86", "#8F6B00"
GREY, LIGHT_GREY, FAINT = "#555555", "#BBBBBB", "#E8E8E8"

SERIES = (BLUE, ORANGE, GREEN, PURPLE, OCHRE, GREY)
"""Of the first, second, ... line of a plot, on white."""

SERIES_ON_BLACK = ("#56B4E9", "#FF8A3D", "#2FCB9A", "#E39BC6", "#E6B800", "#BBBBBB")
"""The same, where a page is dark."""

DASHES: tuple[tuple[float, ...], ...] = ((), (7, 3), (2, 2.5), (9, 3, 2, 3))
"""On, off, on, ... in pixels or points; () is a whole line."""

MARKERS = "os^D"
"""In matplotlib's letters: circle, square, triangle, diamond."""

SHADES = ("#FFFFFF", "#9CC9E3", BLUE, "#00304B")
"""From least to most, of what is shown as a colour."""

MATPLOTLIB = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 220,
}
"""rcParams, upon matplotlib's own defaults."""
