"""Pages that jobs leave behind: one file of HTML that holds its pictures and needs no network."""

import base64
import io
from collections.abc import Iterable

from matplotlib.figure import Figure
from PIL import Image

from isd_ray.markup import in_html

DPI = 110
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222;
       overflow-wrap: break-word }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .2rem .6rem; text-align: right }
td { white-space: nowrap } th { border-bottom: 1px solid #888; vertical-align: bottom }
td:first-child, th:first-child, td.text, th.text { text-align: left }
.scroll { overflow-x: auto; margin: .5rem 0 }
img { max-width: 100% } code, pre { background: #f4f4f4; padding: .1rem .3rem }
figure { margin: 1rem 0 1.5rem } figcaption, .note { color: #555; font-size: 13px }
@media (max-width: 640px) { body { margin-top: 1rem } .scroll > img { max-width: none; width: 38rem } }
"""


def page(title: str, body: Iterable[str], style: str = "") -> bytes:
    """Return a whole page; `style` is added to the common one. `body` is HTML."""
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'  # else a browser asks the server for one
        f"<title>{in_html(title)}</title><style>{STYLE}{style}</style></head>"
    )
    return f"{head}\n<body>\n{chr(10).join(body)}\n</body></html>\n".encode()


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file of 256 colours: a third of the bytes, and no difference that an eye finds."""
    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def picture(title: str, image: bytes, caption: str, level: int = 2) -> str:
    """Return heading, PNG and caption as HTML; on a narrow screen the picture scrolls instead of shrinking."""
    data, name = base64.b64encode(image).decode(), in_html(title)
    return (
        f'<h{level}>{name}</h{level}><figure><div class="scroll"><img alt="{name}" src="data:image/png;base64,{data}">'
        f"</div><figcaption>{in_html(caption)}</figcaption></figure>"
    )
