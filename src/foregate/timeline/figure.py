"""Tokens of a timeline as a figure: copies under compute, as rows of bars. By matplotlib (``foregate[analysis]``)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foregate.errors import ConfigError
from foregate.timeline import tracks
from foregate.timeline.reading import Slice, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {
    "attention": "#56B4E9",
    "routing": "#8F6400",
    "expert": "#0072B2",
    tracks.PREDICT: "#333333",
    tracks.DEMAND_READ: "#D55E00",
    tracks.SPECULATIVE_READ: "#007A5A",
    tracks.DEMAND_WAIT: "#D55E00",
    tracks.LATE_WAIT: "#B0568A",
}
"""Okabe and Ito (2008), as in the figures of ``foregate analyze``; what was read in vain is hatched."""
FORMATS = (".svg", ".png", ".pdf")


def check_figure(path: Path) -> None:
    """Raises ConfigError where matplotlib is missing or ``path`` names no format that can be written."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: a figure must end in one of {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib, which is not installed: pip install 'foregate[analysis]'")


def tokens_of(timeline: Timeline, first: int | None, last: int | None) -> list[Slice]:
    """Tokens ``first`` to ``last`` of the run; without them, the decoded token of median duration."""
    tokens = timeline.on(tracks.TOKENS)
    if first is not None:
        chosen = [token for token in tokens if first <= token.args["index"] <= (first if last is None else last)]
        if not chosen:
            raise ConfigError(f"token {first} is not in this timeline: it has {len(tokens)} tokens, from 0")
        return chosen
    decoded = sorted(tokens[1:] or tokens, key=lambda token: token.ended - token.began)
    if not decoded:
        raise ConfigError("this timeline has no token")
    return [decoded[len(decoded) // 2]]


def draw(timeline: Timeline, tokens: Sequence[Slice], path: Path) -> None:
    """Write the figure. Same file, same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    began, ended = tokens[0].began, tokens[-1].ended
    part = timeline.cut(began, ended)
    rows = {track: f"reader {track - tracks.READERS}" for track in part.readers}
    rows = {tracks.COMPUTE: "compute", tracks.WAITS: "waits", tracks.PREDICTIONS: "predictions", **rows}
    style: dict[Any, Any] = {
        "svg.hashsalt": "foregate", "svg.fonttype": "none", "font.size": 9.0, "hatch.linewidth": 0.5,
    }  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(8.6, 1.5 + 0.36 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        place = {track: row for row, track in enumerate(rows)}
        _bars(axes, part, place, began)
        _arrows(axes, part, place, began)
        _dress(axes, list(rows.values()), (ended - began) / 1e3)
        axes.set_title(_title(timeline, tokens, began, ended), loc="left", fontsize=9)
        figure.legend(*_legend(part), loc="outside lower center", ncols=4, fontsize="small", frameon=False)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None} if path.suffix == ".png" else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def _bars(axes: Axes, part: Timeline, place: dict[int, int], zero: float) -> None:
    for piece in part.slices:
        if piece.track not in place or piece.name not in COLORS:
            continue
        spoiled = piece.args.get("fate") in ("wasted", "cancelled")
        axes.barh(
            place[piece.track],
            (piece.ended - piece.began) / 1e3,
            left=(piece.began - zero) / 1e3,
            height=0.72,
            color="white" if spoiled else COLORS[piece.name],
            edgecolor=COLORS[piece.name],
            linewidth=0.4,
            hatch="////" if spoiled else None,
        )


def _arrows(axes: Axes, part: Timeline, place: dict[int, int], zero: float) -> None:
    for arrow in part.arrows:
        points = [((at - zero) / 1e3, place[track]) for track, at in arrow.points if track in place]
        for tail, head in pairwise(points):
            axes.annotate(
                "", xy=head, xytext=tail, arrowprops={"arrowstyle": "->", "color": "#333333", "lw": 0.6, "alpha": 0.6}
            )


def _dress(axes: Axes, names: list[str], milliseconds: float) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, milliseconds)
    axes.set_xlabel("milliseconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)


def _title(timeline: Timeline, tokens: Sequence[Slice], began: float, ended: float) -> str:
    times = timeline.overlap(began, ended)
    first, last = tokens[0].args["index"], tokens[-1].args["index"]
    which = f"token {first}" if first == last else f"tokens {first} to {last}"
    hidden = f"{times['hidden_s'] / times['reading_s']:.0%} of reading hidden" if times["reading_s"] else "nothing read"
    return f"{timeline.about.get('model', '')}, {which}: {times['waiting_s'] * 1e3:.1f} ms of waits, {hidden}"


def _legend(part: Timeline) -> tuple[list[Any], list[str]]:
    from matplotlib.patches import Patch

    shown = {piece.name for piece in part.slices}
    # The two colours of reads and waits of the same cause are the same on purpose.
    names = [name for name in COLORS if name in shown]
    handles = [Patch(facecolor=COLORS[name], label=name) for name in names]
    if any(piece.args.get("fate") in ("wasted", "cancelled") for piece in part.slices):
        names.append("read in vain")
        handles.append(Patch(facecolor="white", edgecolor=COLORS[tracks.SPECULATIVE_READ], hatch="////"))
    return handles, names
