"""One self-contained HTML page: its frame, styles and tables. It opens offline, on a phone, in light and dark.

Whatever comes from data goes through `text`; only what this package writes itself is markup.
"""

import html
from collections.abc import Sequence

SERIES_COLOURS = 8

_STYLE = """
:root{color-scheme:light dark;--bg:#f6f6f3;--card:#fff;--ink:#1d1f21;--muted:#62666d;--line:#e2e2dc;--right:#16803c;
--wrong:#b42318;--soft:#eef0ec;--s0:#2563c9;--s1:#d96c1a;--s2:#7d55c7;--s3:#0f8f81;--s4:#b8376f;--s5:#7a7a1c;--s6:#4a5f7a;
--s7:#a0522d}
@media (prefers-color-scheme:dark){:root{--bg:#131416;--card:#1c1e21;--ink:#e8e8e6;--muted:#9ba0a8;--line:#33363b;
--right:#4fc57a;--wrong:#ff8a7a;--soft:#26292d;--s0:#6ea2f5;--s1:#f29b57;--s2:#b394f0;--s3:#46c2b3;--s4:#ec7fab;
--s5:#c5c558;--s6:#9db3d0;--s7:#d99873}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1160px;margin:0 auto;padding:20px 16px 64px}
h1{font-size:1.6rem;line-height:1.25;margin:8px 0 4px}h2{font-size:1.2rem;margin:36px 0 8px}
h3{font-size:1rem;margin:20px 0 6px}p{margin:6px 0 10px;max-width:78ch}.note{color:var(--muted);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:6px 16px;margin:12px 0;font-size:.9rem}a{color:var(--s0)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:10px 0}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;margin:8px 0}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--muted);font-weight:600;vertical-align:bottom}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);white-space:normal;min-width:8.5em}
tr.sum th:first-child{background:var(--soft)}
tr.sum td,tr.sum th{font-weight:600;background:var(--soft)}
td small{color:var(--muted)}
dl.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px 20px;margin:0}
dl.facts dt{color:var(--muted);font-size:.8rem}dl.facts dd{margin:0;overflow-wrap:anywhere}
details{margin:10px 0}summary{cursor:pointer;font-weight:600}
ul.warnings{margin:6px 0;padding-left:20px;font-size:.9rem}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.875rem;margin:0 0 10px}
.key{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.bars{display:grid;grid-template-columns:minmax(90px,max-content) 1fr;gap:8px 14px;align-items:center;font-size:.875rem}
.bars .label{overflow-wrap:anywhere}.bars svg,.curve svg{display:block;width:100%}
.bars svg text{font-size:11px;fill:var(--ink)}.whisker{stroke:var(--ink);stroke-width:1.2;opacity:.75}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(290px,1fr));gap:12px}
.curve text{font-size:10px;fill:var(--muted)}.grid{stroke:var(--line)}.curve path{fill:none;stroke-width:1.6}
.filters{display:flex;flex-wrap:wrap;gap:10px;align-items:center;margin:10px 0;font-size:.9rem}
.filters select{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:6px 10px;max-width:100%}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:12px}
.gallery .card{margin:0;min-width:0}.tags{display:flex;flex-wrap:wrap;gap:6px;font-size:.75rem;color:var(--muted)}
.tag{background:var(--soft);border-radius:99px;padding:1px 9px}
.tag.right{color:var(--right)}.tag.wrong{color:var(--wrong)}
.ask{display:flex;gap:12px;margin:10px 0;align-items:flex-start}.ask div{min-width:0;overflow-wrap:anywhere}
.ask .said{font-weight:600}
.picture{width:64px;height:64px;object-fit:contain;background:#fff;border:1px solid var(--line);border-radius:8px;
padding:2px;display:block;flex:none}
.by{font-size:.8rem;margin:8px 0 4px}.found{display:grid;grid-template-columns:repeat(5,1fr);gap:6px;list-style:none;
margin:0;padding:0}
.found li{border:2px solid var(--line);border-radius:8px;padding:4px;font-size:.72rem;text-align:center;min-width:0;
background:var(--bg)}
.found li.right{border-color:var(--right)}.found li.right .score::after{content:" ✓";color:var(--right);font-weight:700}
.found .picture{width:100%;height:auto;aspect-ratio:1;border:0}
.found .words{text-align:left;overflow-wrap:anywhere;hyphens:auto;
max-height:7.5em;overflow:hidden;line-height:1.25;margin:2px}
.score{color:var(--muted)}[hidden]{display:none!important}
@media (max-width:480px){main{padding:12px 12px 48px}.gallery{grid-template-columns:1fr}th,td{padding:6px 8px}
.bars{grid-template-columns:1fr;gap:2px 0}.bars svg{margin-bottom:8px}}
"""

_SCRIPT = """
const gallery=document.querySelector('.gallery');
if(gallery){const chosen=document.querySelectorAll('.filters select'),shown=document.querySelector('.shown');
const filter=()=>{let count=0;for(const card of gallery.children){
card.hidden=[...chosen].some(select=>select.value&&card.dataset[select.name]!==select.value);count+=!card.hidden}
shown.textContent=count+' shown'};chosen.forEach(select=>select.addEventListener('change',filter));filter()}
"""


def text(value: object) -> str:
    """Escaped for element content and quoted attributes."""
    return html.escape(str(value), quote=True)


def page(title: str, sections: Sequence[tuple[str, str, str]], lead: str = "") -> str:
    """The whole document.

    Args:
      sections: (anchor, heading, markup) of each; one without markup is left out.
      lead: markup under the title.
    """
    there = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{anchor}">{text(heading)}</a>' for anchor, heading, _ in there)
    body = "".join(
        f'<section id="{anchor}"><h2>{text(heading)}</h2>{inner}</section>' for anchor, heading, inner in there
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>{text(title)}</h1>{lead}<nav>{links}</nav>{body}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], sums: Sequence[int] = ()) -> str:
    """A table of markup cells; the rows numbered in `sums` stand out. Empty without rows."""
    if not rows:
        return ""
    lines = []
    for number, (first, *others) in enumerate(rows):
        mark = ' class="sum"' if number in sums else ""
        lines.append(f'<tr{mark}><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in others)}</tr>')
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def folded(heading: str, inner: str, *, shown: bool = False) -> str:
    """Markup that opens on a click, or is open already; empty without any."""
    opened = " open" if shown else ""
    return f"<details{opened}><summary>{text(heading)}</summary>{inner}</details>" if inner else ""


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values, side by side where there is room."""
    inner = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts card">{inner}</dl>'


def warnings(lines: Sequence[str]) -> str:
    """A list of warnings; empty without any."""
    return (
        "".join(['<ul class="warnings card">', *(f"<li>{text(line)}</li>" for line in lines), "</ul>"]) if lines else ""
    )


def percent(value: float | None) -> str:
    """A fraction of 1 as a percentage with one digit; a dash for none or NaN."""
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def points(value: float) -> str:
    """A difference of fractions in points, signed."""
    return "–" if value != value else f"{100 * value:+.1f}".replace("-", "−")
