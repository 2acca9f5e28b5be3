"""The style sheet of reports: light and dark, wide and narrow, on screen and on paper."""

from __future__ import annotations

__all__ = ("STYLE",)

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16191f; --soft: #5b6472; --rule: #e2e6ec;
  --blue: #2563eb; --green: #0f8a5f; --plum: #8b3fd1; --rust: #c2500b; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1217; --card: #181c23; --ink: #eceff4; --soft: #9aa4b2;
  --rule: #2a303a; --blue: #6ea8ff; --green: #4fd1a0; --plum: #c79bff; --rust: #ff9f5a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { margin: 0 0 24px; font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 40px 0 12px; font-size: 1.05rem; }
h1, h2 { overflow-wrap: anywhere; text-wrap: balance; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 12px; margin: 0; }
.cards div, figure, .scroll { background: var(--card); border: 1px solid var(--rule); border-radius: 12px; }
.cards div { padding: 14px 16px; }
.cards .wide { grid-column: span 2; }
dt { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
dd { margin: 2px 0 0; font-size: 1.35rem; font-weight: 650; line-height: 1.25; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.hue0 { --hue: var(--blue); } .hue1 { --hue: var(--green); } .hue2 { --hue: var(--plum); } .hue3 { --hue: var(--rust); }
.phase h2::before { content: ""; display: inline-block; width: .65em; height: .65em; margin-right: .5em;
  border-radius: 50%; background: var(--hue); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 310px), 1fr)); gap: 12px; }
figure { margin: 0; padding: 14px 14px 8px; min-width: 0; }
figcaption { display: flex; justify-content: space-between; gap: 12px; padding: 0 2px 8px; }
figcaption strong { font-weight: 600; }
figcaption small { color: var(--soft); }
figcaption b { color: var(--hue); font-weight: 650; font-variant-numeric: tabular-nums; }
details { margin-top: 12px; } summary { padding: 4px 2px 12px; color: var(--soft); font-size: .92rem; cursor: pointer; }
footer { margin-top: 14px; color: var(--soft); font-size: .82rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
.grid { stroke: var(--rule); stroke-width: 1; }
.raw, .smooth { fill: none; stroke: var(--hue); stroke-linejoin: round; stroke-linecap: round; }
.raw { stroke-width: 1; opacity: .38; }
.smooth { stroke-width: 2.4; }
.end { fill: var(--hue); stroke: var(--card); stroke-width: 2; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .92rem; }
th, td { padding: 9px 14px; text-align: start; vertical-align: top; border-bottom: 1px solid var(--rule); }
tbody tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; white-space: nowrap; }
td { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; tab-size: 4; min-width: 5em; }
td.long { min-width: 17em; font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
th.number, td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
@media (max-width: 600px) { main { padding: 24px 14px 40px; } .cards { grid-template-columns: 1fr 1fr; }
  dd { font-size: 1.15rem; } th, td { padding: 8px 10px; } }
@media print { body { background: none; } figure, .cards div, tr { break-inside: avoid; } }
"""
