"""The look of a report: one style sheet, light and dark, on screen and on paper."""

from __future__ import annotations

COLOUR_LEVELS = 64
_VIRIDIS = bytes.fromhex(
    "440154481f704439833b528b31688e287c8e21918c20a48635b7795ec96290d743c8e020fde725"
)
"""Thirteen stops of matplotlib's map, three bytes each."""
_HUES = (212, 24, 140, 348, 268, 44, 178, 312, 96, 232)


def style_sheet() -> str:
    return _PAGE + _series_rules() + _colour_rules()


def _series_rules() -> str:
    """Twenty lines: ten hues, drawn solid and then dashed."""
    rules = [f".s{i}{{--c:hsl({_HUES[i % 10]} var(--saturation) var(--tone))}}" for i in range(20)]
    dashed = ",".join(f".s{i} .line" for i in range(10, 20))
    return "\n".join(rules) + f"\n{dashed}{{stroke-dasharray:6 3}}\n"


def _colour_rules() -> str:
    return "\n".join(f".c{i}{{fill:{viridis(i)}}}" for i in range(COLOUR_LEVELS))


def viridis(level: int) -> str:
    """The colour of a level, by linear interpolation between the stops."""
    stops = len(_VIRIDIS) // 3
    place = level / (COLOUR_LEVELS - 1) * (stops - 1)
    index = min(int(place), stops - 2)
    below, above = (_VIRIDIS[3 * i : 3 * i + 3] for i in (index, index + 1))
    mixed = [a + (place - index) * (b - a) for a, b in zip(below, above, strict=True)]
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


_PAGE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1b1f24; --muted: #5b6570; --rule: #d9dee3; --grid: #e8ebee;
  --accent: #1f5fa8; --quiet: #9fb4cc; --reference: #c3c9d0; --tint: #f4f6f8;
  --saturation: 68%; --tone: 40%;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e4e7ea; --muted: #9aa4ae; --rule: #343a41; --grid: #262b30;
    --accent: #6fa8e6; --quiet: #46617f; --reference: #4b525a; --tint: #1c2024;
    --saturation: 62%; --tone: 66%;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 48px 32px 72px; max-width: 1144px;
  background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial,
    "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
header { padding-bottom: 20px; border-bottom: 1px solid var(--rule); }
h1 { margin: 0 0 10px; font-size: 30px; line-height: 1.2; font-weight: 650;
  letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 44px 0 6px; font-size: 20px; line-height: 1.3; font-weight: 650; }
h3 { margin: 28px 0 4px; font-size: 16px; font-weight: 650; }
p { margin: 6px 0; max-width: 74ch; }
.lead { font-size: 18px; }
.lead strong { white-space: nowrap; }
.note { color: var(--muted); font-size: 14px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; font-size: 14px; line-height: 1.35; }
th, td { padding: 5px 12px; text-align: left; vertical-align: bottom;
  border-bottom: 1px solid var(--grid); }
th { font-weight: 600; }
thead th { color: var(--muted); border-bottom-color: var(--rule); }
th:first-child, td:first-child { padding-left: 0; }
.number { text-align: right; }
td.number { white-space: nowrap; }
tbody th { font-weight: 400; white-space: nowrap; }
tr.total > * { border-top: 1px solid var(--rule); font-weight: 600; }
tr.reference > *, td.reference { color: var(--muted); }
td.best { font-weight: 700; }
td.mean { border-left: 1px solid var(--rule); }
tr.mean > * { border-top: 1px solid var(--rule); border-left: 0; }
td.code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 12px; overflow-wrap: anywhere; }
.facts tbody th { color: var(--muted); vertical-align: top; white-space: normal;
  overflow-wrap: anywhere; }
pre { margin: 8px 0; padding: 14px 16px; overflow-x: auto; background: var(--tint);
  border-radius: 6px; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
summary { cursor: pointer; color: var(--accent); }
ul { margin: 8px 0; padding-left: 20px; max-width: 74ch; }
.chart { overflow-x: auto; margin: 12px 0 4px; }
svg { display: block; width: 100%; min-width: 720px; height: auto; font-size: 12px; }
svg text { fill: var(--ink); }
svg .tick, svg .axis { fill: var(--muted); }
svg .grid { stroke: var(--grid); }
.series { --c: var(--ink); }
.series .line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
.series .leader { fill: none; stroke: var(--c); stroke-width: .8; opacity: .55; }
.series .name, .series .dot { fill: var(--c); }
.series.strong .line { stroke-width: 2.8; }
.series.strong .name { font-weight: 700; }
.series.constant .line { stroke: var(--muted); stroke-dasharray: 2 4; }
.series.constant .leader { stroke: var(--muted); }
.series.constant .name { fill: var(--muted); }
.series:hover .line { stroke-width: 3.4; }
.bar .fill { fill: var(--quiet); }
.bar.best .fill { fill: var(--accent); }
.bar.reference .fill { fill: var(--reference); }
.bar.best text { font-weight: 700; }
.cells { shape-rendering: crispEdges; }
.cells rect:hover { stroke: var(--ink); stroke-width: 1; }
svg .block { stroke: var(--paper); shape-rendering: crispEdges; }
footer { margin-top: 48px; padding-top: 12px; border-top: 1px solid var(--rule); }
@media (max-width: 640px) { body { padding: 24px 16px 48px; } h1 { font-size: 24px; } }
@media print {
  @page { margin: 14mm; }
  body { padding: 0; max-width: none; font-size: 10.5pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  h2, h3 { break-after: avoid; }
  h2 { margin-top: 26px; }
  .chart, tr, .keep { break-inside: avoid; }
  .chart, .scroll, pre { overflow: visible; }
  svg { min-width: 0; overflow: visible; font-size: 13px; }
  .note { break-before: avoid; }
  footer { margin-top: 16px; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  table { font-size: 8.5pt; }
  th, td { padding: 3px 7px; }
  summary { display: none; }
  details::details-content { display: block; content-visibility: visible; block-size: auto; }
}
"""
