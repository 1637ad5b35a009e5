"""The style of the report: one column on a phone, light and dark."""

# Contrast with --card: text at least 4.5 to 1, lines and marks of plots at least 3 to 1 (WCAG 2.1).
COLOURS = """\
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d2429; --muted: #5c6670; --rule: #d9d7d1;
  --ours-1: #00788a; --ours-2: #3d918b; --ours-3: #c4552d; --ours-4: #ad7410;
  --peer-1: #6b7886; --peer-2: #8d7f63; --peer-3: #7d6490; --peer-4: #4f7f62;
  --peer-5: #a36a7c; --peer-6: #4d6fa5; --peer-7: #808080;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181b; --card: #1b2125; --ink: #e7e9ea; --muted: #a2adb5; --rule: #3a444b;
    --ours-1: #3fbccb; --ours-2: #35998f; --ours-3: #f0875c; --ours-4: #f2c063;
    --peer-1: #93a1af; --peer-2: #b8a77f; --peer-3: #b193c6; --peer-4: #7fb594;
    --peer-5: #d294a7; --peer-6: #86a6dd; --peer-7: #b5b5b5;
  }
}
"""

LAYOUT = """\
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 44px; }
h1 {
  margin: 4px 0 8px; font-size: clamp(27px, 5vw, 40px); line-height: 1.15; letter-spacing: -.015em;
}
h2 { margin: 52px 0 14px; font-size: 22px; letter-spacing: -.01em; }
h3 { margin: 0 0 8px; font-size: 16px; line-height: 1.35; }
p { margin: 0 0 12px; max-width: 74ch; }
a { color: var(--ours-1); }
:focus-visible { outline: 2px solid var(--ours-1); outline-offset: 2px; }
.over { margin: 0; color: var(--ours-1); font-weight: 650; font-size: 14px; }
.lead, .note, figcaption, footer { color: var(--muted); }
.note, figcaption, footer { font-size: 14px; }
.warning { border-left: 3px solid var(--ours-3); padding: 2px 0 2px 12px; }
.figures div, figure, .box {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
}
"""

FIGURES = """\
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 170px), 1fr));
  gap: 12px; margin: 26px 0 0;
}
.figures div { padding: 14px 16px; }
.figures dt { color: var(--muted); font-size: 14px; line-height: 1.4; }
.figures dd { margin: 0; font-size: 27px; font-weight: 650; letter-spacing: -.01em; }
.figures small {
  display: block; color: var(--muted); font-size: 13px; font-weight: 400; letter-spacing: 0;
  line-height: 1.4;
}
.plots { columns: 2 440px; column-gap: 16px; }
figure { margin: 0 0 16px; padding: 16px 16px 14px; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; max-width: 560px; margin: 0 auto 8px; }
figure svg * { stroke-linejoin: round; }
"""

TABLES = """\
.box { overflow-x: auto; margin: 0 0 8px; }
table {
  border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums;
}
th, td {
  padding: 7px 13px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule);
}
thead th { border-top: 0; color: var(--muted); font-weight: 600; }
th:first-child, td:first-child {
  position: sticky; left: 0; background: var(--card); border-right: 1px solid var(--rule);
}
.left { text-align: left; }
td.left:not(:first-child) { white-space: normal; min-width: 18ch; }
tr.ours td:first-child { font-weight: 650; color: var(--ours-1); }
.tables > h3, details h3 { margin-top: 30px; }
dl.plain { display: grid; grid-template-columns: max-content 1fr; gap: 5px 20px; margin: 0; }
dl.plain dt { color: var(--muted); }
dl.plain dd { margin: 0; min-width: 0; }
ul { padding-left: 20px; max-width: 74ch; }
li { margin-bottom: 6px; }
details { margin: 16px 0; }
summary { cursor: pointer; font-weight: 600; padding: 6px 0; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .92em; }
footer { padding: 44px 20px 60px; }
@media (max-width: 560px) {
  header { padding-top: 28px; }
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  figure { padding: 14px 10px 12px; }
  dl.plain { grid-template-columns: 1fr; gap: 0; }
  dl.plain dd { margin-bottom: 10px; }
}
@media print { .box { overflow: visible; } }
"""

STYLE = COLOURS + LAYOUT + FIGURES + TABLES
