"""The report's style sheet: light and dark, phone and paper, no font or file from elsewhere."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #171b22; --soft: #5b6472; --rule: #e1e5eb; --wash: #eef1f5;
  --one: #2460d8; --two: #c2570c; --three: #8a3fb8; --good: #14794a; --bad: #c0271d; --good-wash: #e3f4ea; --bad-wash: #fce6e4;
  --heat: 36 96 216;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1216; --card: #181c22; --ink: #e8ebf0; --soft: #98a2b1; --rule: #2b313a; --wash: #20252d;
    --one: #7aa5ff; --two: #f0a060; --three: #cf9bf0; --good: #5fd39a; --bad: #ff8a80; --good-wash: #15301f; --bad-wash: #3a1c1a;
    --heat: 122 165 255;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main, header, footer { max-width: 1040px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 44px; }
h1 { font-size: clamp(1.75rem, 5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .4em; font-weight: 700; }
h2 { font-size: 1.45rem; letter-spacing: -.01em; margin: 56px 0 .3em; line-height: 1.25; }
h3 { font-size: 1.05rem; margin: 30px 0 .5em; }
p { margin: 0 0 1em; max-width: 68ch; }
.lead { font-size: 1.1rem; color: var(--soft); max-width: 62ch; }
.soft { color: var(--soft); }
a { color: var(--one); }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em; }
code { background: var(--wash); padding: .1em .35em; border-radius: 4px; }
pre { background: var(--wash); padding: 14px 16px; border-radius: 8px; overflow-x: auto; line-height: 1.5; margin: 0 0 1em; }
pre code { background: none; padding: 0; font-size: 1em; }
.num, td.num, .tile b { font-variant-numeric: tabular-nums; }

.badge {
  display: inline-block; font-size: .82rem; font-weight: 600; padding: 3px 10px; border-radius: 7px; margin-bottom: 16px;
}
span.met { color: var(--good); background: var(--good-wash); }
span.missed { color: var(--bad); background: var(--bad-wash); }
span.unjudged { color: var(--soft); background: var(--wash); }

.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; margin: 26px 0 8px; }
.tile, .card {
  background: var(--card); border: 1px solid var(--rule); border-radius: 12px; break-inside: avoid;
}
.tile { padding: 16px 18px 15px; }
.tile span:not(.badge) { display: block; color: var(--soft); font-size: .86rem; }
.tile b { display: block; font-size: 1.95rem; letter-spacing: -.02em; line-height: 1.25; margin: 2px 0 6px; font-weight: 650; }
.tile b small { font-size: .55em; font-weight: 500; color: var(--soft); letter-spacing: 0; margin-left: .25em; }
.tile .badge { display: inline-block; margin: 0; font-size: .79rem; line-height: 1.4; }
.card { padding: 18px 20px; margin: 14px 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 14px; }
.pair > .card { margin: 0; }

.plot { margin: 0; }
.plot figcaption { font-weight: 600; font-size: .95rem; margin-bottom: 6px; }
.chart { display: block; width: 100%; height: auto; }
.chart text { font-size: 12px; fill: var(--soft); font-variant-numeric: tabular-nums; font-family: inherit; }
.grid { stroke: var(--rule); } .tick, .base { stroke: var(--soft); fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.one { stroke: var(--one); } .line.two { stroke: var(--two); } .line.three { stroke: var(--three); } .line.faint { stroke: var(--soft); opacity: .6; }
.dot.one { fill: var(--one); } .dot.two { fill: var(--two); } .dot.three { fill: var(--three); } .dot.faint { fill: var(--soft); }
.mark { stroke: var(--soft); stroke-dasharray: 5 4; fill: none; stroke-width: 1.5; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 0; padding: 0; font-size: .84rem; }
.legend svg { width: 22px; height: 8px; margin-right: 7px; vertical-align: middle; }

.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .84rem; }
td.num, th.num { text-align: right; padding: 7px 0 7px 12px; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.even { table-layout: fixed; min-width: 560px; } .even + .even { margin-top: 20px; } .even th:first-child { width: 34%; }
tfoot td { font-weight: 650; border-top: 2px solid var(--rule); }
.up { color: var(--good); font-weight: 600; } .down { color: var(--bad); font-weight: 600; }

.confusion { table-layout: fixed; max-width: 430px; border-spacing: 2px; border-collapse: separate; }
.confusion th, .confusion td {
  border: 0; padding: 0; text-align: center; font-size: .82rem; height: 32px; vertical-align: middle;
  font-variant-numeric: tabular-nums;
}
.confusion td { border-radius: 4px; background: var(--wash); }
.confusion td.zero { color: transparent; }
.confusion td.wrong { outline: 2px solid var(--bad); outline-offset: -2px; font-weight: 700; }

.digits { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 12px; margin: 0; padding: 0; list-style: none; }
.digits li { font-size: .8rem; line-height: 1.35; }
.digits img, .crops img { image-rendering: pixelated; display: block; width: 100%; height: auto; border-radius: 6px; }
.digits .wrong img { outline: 2px solid var(--bad); }
.digits b { font-weight: 650; }

.sheets { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 18px; }
.sheets figure { margin: 0; }
.sheets img { display: block; width: 100%; height: auto; }
.sheets figcaption { font-size: .84rem; margin-top: 8px; line-height: 1.4; }
.sheets figcaption b { display: block; }

.photo > h3 { margin: 0 0 2px; }
.photo { padding-bottom: 20px; }
.whole { position: relative; margin: 12px 0 0; }
.whole img { display: block; width: 100%; height: auto; border-radius: 6px; }
.whole i { position: absolute; border: 2px solid #fff; outline: 1px solid rgb(0 0 0 / .75); }
.view { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 2.55fr); gap: 16px; align-items: start; }
.crops { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 10px; margin-top: 12px; }
.crops figure { margin: 0; }
.crops figcaption { font-size: .84rem; margin-top: 6px; line-height: 1.35; }
.crops figcaption b { display: block; }
details { margin: 0 0 10px; } summary { cursor: pointer; font-weight: 600; }
details pre { margin-top: 10px; max-height: 420px; overflow: auto; }
footer { color: var(--soft); font-size: .86rem; padding-top: 40px; padding-bottom: 50px; }

@media (max-width: 640px) {
  header { padding-top: 28px; }
  h2 { margin-top: 40px; }
  main, header, footer { padding-left: 14px; padding-right: 14px; }
  .card { padding: 14px; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 12px 13px; } .tile b { font-size: 1.5rem; }
  .view { grid-template-columns: 1fr; gap: 0; }
  .sheets { grid-template-columns: 1fr 1fr; gap: 12px; }
  .crops { gap: 6px; } .crops figcaption { font-size: .76rem; }
  .confusion th, .confusion td { height: 27px; font-size: .74rem; }
}
@media print {
  :root {
    color-scheme: light;
    --page: #fff; --card: #fff; --ink: #000; --soft: #444; --rule: #ccc; --wash: #f1f1f1;
    --one: #2460d8; --two: #c2570c; --three: #8a3fb8; --good: #14794a; --bad: #c0271d; --good-wash: #fff; --bad-wash: #fff; --heat: 36 96 216;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11pt; } header { padding-top: 0; }
  h2 { break-after: avoid; margin-top: 24pt; } details:not([open]) { display: none; }
}
"""
