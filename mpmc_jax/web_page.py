"""Pages of HTML in a single file: no script, no font, nothing from the network.

They follow the reader's light or dark mode and fit a phone.
"""

import base64
import html
from collections.abc import Sequence

from mpmc_jax.text import printable

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #ccd; --bar: #3568a8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --line: #445; --bar: #7fb0ee; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }}
h2 {{ margin: 2rem 0 .5rem; }}
section, li {{ border-top: 1px solid var(--line); padding: .6rem 0; }}
ul {{ list-style: none; padding: 0; }}
figure {{ display: inline-block; margin: .4rem .6rem .4rem 0; max-width: 100%; }}
figure img {{ display: block; max-width: 100%; height: auto; background: #fff; }}
figcaption {{ font-size: .8rem; max-width: 360px; }}
.wide {{ overflow-x: auto; }}
.wide td, .wide th {{ overflow-wrap: break-word; padding-right: 1rem; }}
table {{ border-collapse: collapse; width: 100%;
  font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .2rem .5rem .2rem 0; vertical-align: top; }}
.n {{ text-align: right; white-space: nowrap; }}
.bar {{ height: .6rem; background: var(--bar); min-width: 1px; }}
.swatch {{ display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border: 1px solid var(--line); }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def page(title: str, body: str) -> str:
    """Returns a page with a heading; `body` is HTML."""
    return _PAGE.format(title=escape(title), body=body)


def escape(value: object) -> str:
    """Returns a value as text for HTML."""
    return html.escape(printable(value))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Makes a table that scrolls where it is too wide.

    Numbers that are not whole have one digit after the point.
    """
    head = "".join(f'<th scope="col">{escape(name)}' for name in header)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="wide" tabindex="0"><table><tr>{head}</tr>\n{body}</table></div>'
    )


def _cell(value: object) -> str:
    return f"<td>{escape(f'{value:.1f}' if isinstance(value, float) else value)}"


def image(content: bytes, kind: str, alt: str, caption: str = "") -> str:
    """Makes a figure of a picture, which the page holds.

    Args:
      content: the picture's file.
      kind: of the file: "png", "jpeg" or "svg+xml".
      alt: what it shows, for those who do not see it.
      caption: written below it.
    """
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    source = data_uri(content, kind)
    return f'<figure><img src="{source}" alt="{escape(alt)}">{below}</figure>'


def data_uri(content: bytes, kind: str) -> str:
    """Returns the address of a picture that is in the page itself, see `image`."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
