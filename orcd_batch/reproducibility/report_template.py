"""The HTML page's template and style. Nothing in them refers to anything outside the page."""

# What a browser may load for this page: nothing, except what is inside it.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1a1f26; --quiet: #545d6a; --line: #d5dae1;
  --good: #116329; --warning: #7a4b00; --bad: #a40e26;
  --s1: #2f5fd0; --s2: #c2500a; --s3: #0f7b6c; --s4: #8a3ea8; --s5: #b3255f; --s6: #5d6b1c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12151a; --card: #1b2027; --ink: #e7eaee; --quiet: #a5afbc; --line: #38414d;
    --good: #6fdd8b; --warning: #f0b958; --bad: #ff8f9a;
    --s1: #82aaff; --s2: #ffa05c; --s3: #4fd1bd; --s4: #d49bf0; --s5: #ff85b3; --s6: #c4d35f;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
}
main { max-width: 76rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p { margin: 0 0 .75rem; max-width: 48rem; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); }
.facts {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(10.25rem, 1fr));
  gap: .75rem; margin: 1rem 0; padding: 0; list-style: none;
}
.facts li, figure, .table, .reading {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
}
.facts li { padding: .6rem .8rem; min-width: 0; }
.facts b { display: block; font-size: 1.05rem; line-height: 1.3; overflow-wrap: anywhere; }
.facts span { color: var(--quiet); font-size: .85rem; display: block; }
.notice {
  border-left: .3rem solid; padding: .5rem .8rem; background: var(--card); max-width: none;
  border-radius: .3rem;
}
.notice.good { border-color: var(--good); } .notice.good b { color: var(--good); }
.notice.warning { border-color: var(--warning); } .notice.warning b { color: var(--warning); }
.notice.bad { border-color: var(--bad); } .notice.bad b { color: var(--bad); }
.figures {
  display: grid; gap: 1rem; margin: 0 0 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); align-items: start;
}
figure { margin: 0; padding: .8rem; min-width: 0; max-width: 46rem; }
figcaption { font-weight: 600; margin: 0 0 .4rem; }
figcaption span { display: block; font-weight: 400; font-size: .9rem; color: var(--quiet); }
figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
.table { padding: .8rem; margin: 0 0 1rem; }
.scroll {
  overflow-x: auto; max-width: 100%;
  background:
    linear-gradient(to right, var(--card) 40%, transparent) left / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--card) 40%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to right, var(--line), transparent) left / .8rem 100% no-repeat scroll,
    linear-gradient(to left, var(--line), transparent) right / .8rem 100% no-repeat scroll;
}
.scroll:focus-visible { outline: 2px solid var(--s1); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.4rem .3rem 0; }
th { color: var(--quiet); font-weight: 600; border-bottom: 1px solid var(--line); }
th { white-space: nowrap; }
td { border-bottom: 1px solid var(--line); min-width: 14rem; overflow-wrap: anywhere; }
td.short, td.number { min-width: 0; white-space: nowrap; }
tr:last-child td { border-bottom: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; font-weight: 600; }
details[open] > summary { margin-bottom: .5rem; }
.readings { display: grid; gap: 1rem; align-items: start; }
.reading { padding: .8rem; min-width: 0; }
.reading h3 { white-space: pre-wrap; overflow-wrap: anywhere; }
.reading dl { margin: 0; display: grid; gap: .6rem 1rem; }
.reading dt { color: var(--quiet); font-size: .85rem; margin-bottom: -.5rem; }
.reading dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.table p { font-size: .9rem; }
@media (max-width: 30rem) {
  th, td { padding-right: .9rem; }
  td { min-width: 11rem; }
}
@media (min-width: 48rem) {
  .reading dl { grid-template-columns: max-content minmax(0, 1fr); }
  .reading dt { margin: 0; }
}
footer { color: var(--quiet); font-size: .85rem; margin-top: 2rem; }
@media print { body { background: none; } figure, .table { break-inside: avoid; } }
"""

TEMPLATE = """\
{% macro box(table) %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.title }}">
<table>
<thead><tr>
{% for name in table.columns %}
<th scope="col"{% if loop.index0 in table.numeric %} class="number"{% endif %}>\
{{ plain(name) }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>
{% for cell in row %}
{% set kind = "number" if loop.index0 in table.numeric else "short" if cell | length < 40 else "" %}
<td class="{{ kind }}">{{ plain(cell) }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endmacro %}
{% macro notices(found) %}
{% for notice in found %}
<p class="notice {{ notice.kind }}"><b>{{ signs[notice.kind] }}</b> {{ plain(notice.text) }}</p>
{% endfor %}
{% endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="POLICY">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{{ plain(page.title) }}</title>
<link rel="icon" href="data:,">
<style>{{ style | safe }}</style>
</head>
<body>
<main>
<header>
<h1>{{ plain(page.title) }}</h1>
<p class="quiet">{{ plain(page.subtitle) }}</p>
</header>
{% if page.facts %}
<ul class="facts">
{% for fact in page.facts %}
<li><span>{{ plain(fact.name) }}</span><b>{{ plain(fact.value) }}</b>\
{% if fact.note %}<span>{{ plain(fact.note) }}</span>{% endif %}</li>
{% endfor %}
</ul>
{% endif %}
{{ notices(page.notices) }}
{% for section in page.sections %}
<section>
<h2>{{ plain(section.title) }}</h2>
{% if section.intro %}
<p>{{ plain(section.intro) }}</p>
{% endif %}
{{ notices(section.notices) }}
{% if section.figures %}
<div class="figures">
{% for figure in section.figures %}
<figure>
<figcaption>{{ plain(figure.title) }}<span>{{ plain(figure.alt) }}</span></figcaption>
{{ figure.svg | safe }}
</figure>
{% endfor %}
</div>
{% endif %}
{% for table in section.tables %}
<div class="table">
{% if table.folded %}
<details><summary>{{ plain(table.title) }}</summary>
{% if table.note %}
<p class="quiet">{{ plain(table.note) }}</p>
{% endif %}
{{ box(table) }}
</details>
{% else %}
<h3>{{ plain(table.title) }}</h3>
{% if table.note %}
<p class="quiet">{{ plain(table.note) }}</p>
{% endif %}
{{ box(table) }}
{% endif %}
</div>
{% endfor %}
{% if section.readings %}
<div class="readings">
{% for reading in section.readings %}
<article class="reading">
<h3>{{ plain(reading.prompt) }}</h3>
<dl>
{% for label, completion in reading.completions %}
<dt>{{ plain(label) }}</dt><dd>{{ plain(completion) }}</dd>
{% endfor %}
</dl>
</article>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
<footer>Made by orcd-batch report. The page loads nothing from anywhere.</footer>
</main>
</body>
</html>
""".replace("POLICY", POLICY)
