"""A scene as inline SVG, its colours by class, so that the page's style sheet makes them light or dark."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from vllm_puzzle.bench.efficiency.drawing.markers import outline
from vllm_puzzle.bench.efficiency.drawing.scene import Marker, Path, Scene, Stroke, Text
from vllm_puzzle.bench.efficiency.drawing.style import DARK, LIGHT, ROLES


def style_sheet() -> str:
    """The colours as variables, and the classes that use them."""
    light, dark = (" ".join(f"--{role}: {colours[role]};" for role in ROLES) for colours in (LIGHT, DARK))
    classes = [f".f-{role} {{ fill: var(--{role}); }} .k-{role} {{ stroke: var(--{role}); }}" for role in ROLES]
    return "\n".join(
        [
            f":root {{ color-scheme: light dark; {light} }}",
            f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}",
            *classes,
            "svg text { font-family: inherit; }",
            ".halo { paint-order: stroke; stroke: var(--page); stroke-width: 3px; stroke-linejoin: round; }",
        ]
    )


def svg(scene: Scene) -> str:
    """The scene; scales with the page, and says what it is to those who hear it."""
    label = f"{scene.title}. {scene.description}" if scene.description else scene.title
    head = (
        f'<svg viewBox="0 0 {scene.width:.0f} {scene.height:.0f}" role="img" '
        f'style="max-width: {scene.width:.0f}px" aria-label={quoteattr(clean(label))}>'
    )
    body = [_shape(shape) for shape in scene.shapes]
    return "\n".join([head, f"<title>{escape(clean(scene.title))}</title>", *body, "</svg>"])


def clean(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(char for char in text if char in "\t\n\r" or (char >= " " and not "\ud800" <= char <= "\udfff"
                   and char not in "\ufffe\uffff"))  # fmt: skip


def _shape(shape: Path | Marker | Text) -> str:
    if isinstance(shape, Path):
        return _path(shape)
    return _marker(shape) if isinstance(shape, Marker) else _text(shape)


def _path(path: Path) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in path.points)
    if path.fill is not None:
        faint = "" if path.opacity == 1 else f' fill-opacity="{path.opacity:g}"'
        return f'<polygon class="f-{path.fill}" points="{points}"{faint}/>'
    assert path.stroke is not None, "a path is filled or drawn"
    return f'<polyline fill="none"{_stroke(path.stroke)} points="{points}"/>'


def _stroke(stroke: Stroke) -> str:
    dash = f' stroke-dasharray="{" ".join(f"{length:g}" for length in stroke.dash)}"' if stroke.dash else ""
    faint = "" if stroke.opacity == 1 else f' stroke-opacity="{stroke.opacity:g}"'
    return f' class="k-{stroke.role}" stroke-width="{stroke.width:g}"{dash}{faint}'


def _marker(marker: Marker) -> str:
    points = outline(marker.shape, marker.x, marker.y, marker.size)
    d = "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points) + " Z"
    fill = f"f-{marker.role}" if marker.is_filled else "f-page"
    return f'<path class="{fill} k-{marker.role}" stroke-width="1.5" d="{d}"/>'


def _text(text: Text) -> str:
    turn = f' transform="rotate(-{text.turn} {text.x:.1f} {text.y:.1f})"' if text.turn else ""
    bold = ' font-weight="600"' if text.is_bold else ""
    halo = " halo" if text.has_halo else ""
    return (
        f'<text class="f-{text.role}{halo}" x="{text.x:.1f}" y="{text.y:.1f}" font-size="{text.size:g}" '
        f'text-anchor="{text.anchor}" dominant-baseline="central"{bold}{turn}>{escape(clean(text.text))}</text>'
    )
